"The feature store: standardised, kept, resumed, and what its code depends on."
from dataclasses import replace

import pytest
import torch

from lthash.unsupervised import features
from lthash.unsupervised.features import Encoder, FeatureConfig, feature_store, features_code

TINY = FeatureConfig(size=32, train_per_class=5, val_per_class=2, views=3, pretraining=128)


class Killed(Exception):
    "The end of a process."


@pytest.fixture(scope='module', autouse=True)
def own_home(tmp_path_factory):
    "No store of another test is found."
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LTHASH_HOME', str(tmp_path_factory.mktemp('home')))
        yield


def test_store_is_standardised_and_kept(monkeypatch):
    data = feature_store(TINY)
    assert data.views.shape == (len(data.train), 3, data.width)
    assert data.clean.dtype == data.views.dtype == torch.float16
    known = data.clean_train()
    torch.testing.assert_close(known.mean(0), torch.zeros(data.width), atol=.01, rtol=0)
    a, b = data.pair(torch.arange(len(data.train)))
    assert a.shape == known.shape and not torch.equal(a, b)
    monkeypatch.setattr(Encoder, '__call__', lambda *a: pytest.fail('encoded twice'))
    assert torch.equal(feature_store(TINY).views, data.views)


def test_interrupted_store_is_the_same(monkeypatch):
    config = replace(TINY, seed=1, weights='random')
    whole, calls, encode = feature_store(config), [], Encoder.__call__

    def dying(*args):
        calls.append(1)
        if len(calls) == 4:
            raise Killed
        return encode(*args)

    config = replace(config, pretraining=129)                   # another place on disk, the same features
    monkeypatch.setattr(Encoder, '__call__', dying)
    with pytest.raises(Killed):
        feature_store(config)
    monkeypatch.setattr(Encoder, '__call__', encode)
    resumed = feature_store(config)
    assert torch.equal(resumed.clean, whole.clean) and torch.equal(resumed.views, whole.views)


def test_fresh_views_come_from_the_same_augmentation():
    "Mean and spread of fresh views' features agree with those of many kept ones."
    kept, fresh = feature_store(replace(TINY, views=6)), feature_store(replace(TINY, views=0))
    index = torch.arange(len(kept.train))
    assert fresh.views is None and not torch.equal(fresh.pair(index)[0], fresh.pair(index)[0])
    drawn = torch.stack([fresh.pair(index)[0] for _ in range(6)], 1)
    torch.testing.assert_close(drawn.mean((0, 1)), kept.views.float().mean((0, 1)), atol=.35, rtol=0)
    assert drawn.std().item() == pytest.approx(kept.views.float().std().item(), rel=.15)


def test_code_depends_on_the_entries_that_are_used(monkeypatch):
    before = features_code(TINY)
    for table in (features.DATASETS, features.BACKBONES, features.VIEWS, features.ENCODER_WEIGHTS):
        monkeypatch.setitem(table, 'another', Killed)
    features_code.cache_clear()
    assert features_code(TINY) == before
    assert features_code(replace(TINY, weights='random')) != before


def test_a_pair_needs_two_views():
    with pytest.raises(ValueError, match='two different views'):
        feature_store(FeatureConfig(views=1))
