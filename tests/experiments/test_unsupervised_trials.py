"An unsupervised trial from images to rows: trained once, kept, and evaluated from its codes."
import numpy as np
import pytest
import torch

from lthash.core.report import ROW_COLUMNS
from lthash.experiments.trials import run
from lthash.experiments.unsupervised_trials import UnsupervisedTrial, trained_method
from lthash.unsupervised.base import encode_features
from lthash.unsupervised.features import FeatureConfig, feature_store

TINY = FeatureConfig(size=32, train_per_class=5, val_per_class=2, views=3, pretraining=128)


@pytest.fixture(scope='module', autouse=True)
def own_home(tmp_path_factory):
    "No trial of another test is found."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LTHASH_HOME', str(tmp_path_factory.mktemp('home')))
        yield


def test_a_trial_from_images_to_rows(monkeypatch):
    options = dict(hidden=16, queue=16, suppressed=.2)
    trial = UnsupervisedTrial('BSCDH', 16, 1, TINY, epochs=2, options=options, checks=2)
    result = run(trial)
    paper, validation = trial.rows('table1', setting='made up')
    assert set(paper) <= set(ROW_COLUMNS) and (paper['protocol'], validation['protocol']) == ('paper', 'validation')
    assert 0 < paper['value'] <= 1 and 0 < validation['value'] <= 1
    facts = {name: paper[name] for name in ('setting', 'epochs', 'views', 'hidden', 'queue')}
    assert facts == dict(setting='made up', epochs=2, views=3, hidden=16, queue=16)
    assert set(result['checks'][0]) >= {'false negatives', 'base rate', 'lambda false', 'lambda true'}
    monkeypatch.setattr(UnsupervisedTrial, 'fit', lambda *a, **k: pytest.fail('trained twice'))
    assert run(trial) == result
    codes = encode_features(trained_method(trial), feature_store(TINY).clean)
    assert np.array_equal(codes, trial.codes())


def test_a_method_without_training_has_no_epochs():
    rows = UnsupervisedTrial('ITQ', 16, 0, TINY, epochs=0).rows('table1')
    assert [r['protocol'] for r in rows] == ['paper'] and not {'views', 'hidden', 'queue'} & set(rows[0])
    assert rows[0].get('epochs', 0) == 0


def test_samples_follow_epochs_and_images():
    config = UnsupervisedTrial('InfoNCE', epochs=40).train_config(5000)
    assert (config.optimizer, config.lr, config.batch, config.samples) == ('sgd', .01, 64, 40*5000)
    other = UnsupervisedTrial('InfoNCE', epochs=40, recipe=dict(batch=32)).train_config(5000)
    assert other.batch == 32 and torch.isclose(torch.tensor(other.lr), torch.tensor(.01))
