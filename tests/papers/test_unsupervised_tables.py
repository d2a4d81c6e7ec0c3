"The unsupervised study: every planned trial can be made."
import pytest

from lthash import code_trials
from lthash.code_trials import CLASSICAL, CONTRASTIVE, GENERATIVE, MOCO, STRUCTURAL, STUDIES, CodeTrial, Study, code_rows, planned, trial_recipe
from lthash.contrastive import make_method, method_class
from lthash.runs import ROW_COLUMNS, RUN_COLUMNS


@pytest.mark.parametrize('profile', [p for p in STUDIES if p != 'real'])      # 'real' looks at no image here either, but its plan is that of 'paper' with other sizes
def test_every_planned_trial_can_be_made(profile, monkeypatch):
    study = STUDIES[profile]
    if not study.data.train_images: monkeypatch.setattr(Study, 'balanced', property(lambda self: self.data))     # it counts images
    tables, made = planned(study), {}
    for name, pairs in tables.items():
        for variant, trial in pairs:
            key = trial.method, trial.bits, str(trial.options)
            if key not in made: made[key] = make_method(trial.method, 512, trial.bits, **{**trial.options, **({'hidden': 8} if 'hidden' in trial.options else {})})
            if (m := trial.data.train_images) and trial.method in MOCO: assert trial.options['queue'] <= m//2
    assert {t.method for _, t in tables['table1']} == {*CONTRASTIVE, *STRUCTURAL, *GENERATIVE, *CLASSICAL}
    assert {t.seed for _, t in tables['table1'] if t.method in CONTRASTIVE} == set(range(study.seeds))
    ran = {str(t) for _, t in tables['table1']}
    for name in ('table4', 'ablation', 'lambda_b', 'quantisation'): assert ran & {str(t) for _, t in tables[name]}, f'{name} shares no trial with Table 1'
    for variant, trial in tables['table4']: assert float(variant.removeprefix('hp_s ')) == trial.options.get('floor', .7)


def test_the_papers_sizes():
    "What paper B prints, and CIBH's head."
    study = STUDIES['paper']
    trial = study.trial('BSCDH', 32, 1)
    assert (trial.epochs, trial.data.encoder, trial.data.size, trial.data.views, trial.data.train_images) == (200, 'vgg16', 224, 0, 5000)
    recipe = trial_recipe(trial, 5000)
    assert (recipe.optimizer, recipe.rate, recipe.batch, recipe.passes) == ('sgd', .01, 64, 200*5000)
    net = make_method('BSCDH', 64, 32, **trial.options)
    assert (net.temperature, net.floor, net.variant, net.quantisation, net.momentum) == (.3, .7, 'bounded', 1., .999) and net.head[1].out_features == 1024
    assert not method_class('ITQ').trained and study.trial('ITQ').epochs == 0 and 'hidden' not in study.trial('BiHalf').options


def test_a_row_says_what_is_smaller_than_in_the_paper():
    result = dict(images=50, best=3., seconds=1., device='CPU', versions='v', substitutes='squeezenet for VGG-16', mAP=.123456789, checks=[{'validation': .2}, {'validation': .1}])
    trial = CodeTrial('BSCDH', 16, 2, epochs=40, options=dict(hidden=512, queue=1024))
    paper, validation = code_rows(trial, result, 'table1', 'x')
    assert set(paper) <= {*ROW_COLUMNS, *RUN_COLUMNS} and (paper['value'], validation['value']) == (.12346, .2)
    for part in ('50 training images', '8 views', '40 epochs (paper: 200)', 'hidden 512', 'queue 1024'): assert part in paper['note']
    assert paper['substitutes'] == 'squeezenet for VGG-16' and code_rows(CodeTrial('ITQ', epochs=0), {**result, 'checks': []}, 't')[0]['note'] == '50 training images, no training'


def test_the_dry_run_of_profile_paper_lists_every_trained_trial_once():
    lines = list(code_trials.announced('paper'))
    trained = {str(t): t for pairs in code_trials.planned(code_trials.STUDIES['paper']).values() for _, t in pairs if code_trials.method_class(t.method).trained}
    listed = lines[1:-2]
    assert len(listed) == len(trained)
    for t in trained.values(): assert any(t.title in line for line in listed), t.title
    hours = sum(float(line.split()[0]) for line in listed)
    assert float(lines[-2].split()[0]) == pytest.approx(hours, abs=.01*len(listed))
    slow = code_trials.plan_costs(images_per_second=300.)
    assert slow.hours.sum() > 5*code_trials.plan_costs().hours.sum()
    assert not list(code_trials.announced('cpu'))
