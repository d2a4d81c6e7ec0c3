"The unsupervised study: every trial of its tables can be made, with the paper's sizes at profile `paper`."
import pytest

from lthash.papers import b1_bscdh, b2_methods, b3_ablations
from lthash.papers.b1_bscdh import (
    CONTRASTIVE,
    GENERATIVE,
    MOCO,
    SHALLOW,
    STRUCTURAL,
    STUDIES,
    UnsupervisedStudy,
    table_trials,
)
from lthash.unsupervised.base import make_method


@pytest.mark.parametrize('profile', STUDIES)
def test_every_trial_can_be_made(profile, monkeypatch):
    study = STUDIES[profile]
    if not study.features.train_images:                               # it counts images
        monkeypatch.setattr(UnsupervisedStudy, 'balanced', property(lambda self: self.features))
    tables, made = table_trials(study), set()
    for pairs in tables.values():
        for trial, columns in pairs:
            assert not columns or columns.keys() in ({'setting'}, {'factor', 'level'})
            key = trial.method, trial.bits, str(trial.options)
            if key not in made:
                small = {'hidden': 8} if 'hidden' in trial.options else {}
                make_method(trial.kind, 512, trial.bits, **{**trial.options, **small})
                made.add(key)
            if (images := trial.features.train_images) and trial.method in MOCO:
                assert trial.options['queue'] <= images//2
    table1 = [trial for trial, _ in tables['table1']]
    assert {t.method for t in table1} == {*CONTRASTIVE, *STRUCTURAL, *GENERATIVE, *SHALLOW}
    assert {t.seed for t in table1 if t.method in CONTRASTIVE} == set(range(study.seeds))
    for trial, columns in tables['table4']:
        assert float(columns['level']) == trial.options.get('hp_s', .7)
    if not study.swept:                                               # middle values are trials of Table 1
        known = {repr(t) for t in table1}
        for name in ('table4', 'ablation', 'lambda_b', 'quantisation'):
            assert known & {repr(t) for t, _ in tables[name]}, f'{name} shares no trial with Table 1'


def test_the_papers_sizes():
    "What paper B prints, and CIBH's head."
    study = STUDIES['paper']
    trial = study.trial('BSCDH', 32, 1)
    f = trial.features
    assert (trial.epochs, f.encoder, f.size, f.views, f.train_images) == (200, 'vgg16', 224, 0, 5000)
    recipe = trial.train_config(5000)
    assert (recipe.optimizer, recipe.lr, recipe.batch, recipe.samples) == ('sgd', .01, 64, 200*5000)
    net = make_method(trial.kind, 64, 32, **trial.options)
    assert (net.temperature, net.hp_s, net.lambda_b, net.quantisation, net.momentum) == (.3, .7, 'bounded', 1., .999)
    assert net.head[1].out_features == 1024
    assert study.trial('ITQ').epochs == 0 and 'hidden' not in study.trial('BiHalf').options


def test_the_notebooks_cover_the_tables():
    "Every trial of every table of paper B is one of some notebook's."
    study = STUDIES['real']
    covered = {repr(t) for notebook in (b1_bscdh, b2_methods, b3_ablations) for t in notebook.trials('real')}
    assert {repr(t) for pairs in table_trials(study).values() for t, _ in pairs} == covered
