"Supervised trials: their identity, their rows, what is refused, and trials with a rebalancing technique."
from dataclasses import replace

import numpy as np
import pytest

from lthash.core.runtime import digest
from lthash.data.base import retrieval_split
from lthash.data.config import load_data
from lthash.experiments.baseline_trials import BaselineTrial
from lthash.experiments.trials import GROUPS, PROTOCOLS, Trial, run, run_trials
from lthash.models.training import TrainConfig
from lthash.supervised import rebalancing

SHORT = TrainConfig(samples=64, batch=32, lr=2e-3, augmentation='none')
TINY = Trial(size=32, recipe=SHORT, train_per_class=12, val_per_class=2, imbalance='natural', bits=32)


def test_trials_are_told_apart_by_every_field():
    base = Trial()
    values = dict(dataset='cifar10', size=64, imbalance='step', imbalance_factor=10., order_seed=1, train_per_class=5,
                  val_per_class=5, train_set='long-tail', method='CSQ', published='x', backbone='resnet20',
                  weights='cifar10', bits=64, seed=1, recipe=TrainConfig(samples=1))
    changed = [replace(base, **{k: v}) for k, v in values.items()]
    assert set(vars(base)) == set(values)
    assert len({digest(t) for t in (base, *changed)}) == len(changed) + 1


def test_a_trial_counts_the_code_of_what_it_uses_and_not_its_title():
    configs = [t.config() for t in (TINY, replace(TINY, method='CSQ'), replace(TINY, backbone='resnet20'),
                                    replace(TINY, dataset='cifar10'), replace(TINY, weights='silk'))]
    assert len({tuple(c['code']) for c in configs}) == len(configs)
    baselines = [BaselineTrial.of(TINY, t).config()['code'] for t in rebalancing.TECHNIQUES]
    assert len({tuple(c) for c in baselines}) == len(baselines)
    assert not any('title' in str(k) for k in TINY.config())


def test_an_unknown_training_set_is_refused():
    trial = Trial(train_set='wide-tail', train_per_class=8, val_per_class=4, recipe=SHORT, imbalance='step',
                  imbalance_factor=2.)
    with pytest.raises(ValueError, match="balanced.*long-tail.*'wide-tail'"):
        run(trial)


def test_rows_of_a_trial_and_its_result_from_disk(monkeypatch):
    rows = run_trials([TINY, (replace(TINY, seed=1), {'note': 'again'})], 'figure1b', factor='seed')
    assert {r['table'] for r in rows} == {'figure1b'} and {r['factor'] for r in rows} == {'seed'}
    first = [r for r in rows if r['seed'] == 0]
    assert len(first) == 9 and 'note' not in first[0] and {r['note'] for r in rows if r['seed'] == 1} == {'again'}
    assert {(r['protocol'], r['group']) for r in first} == {*((p, g) for p in PROTOCOLS for g in GROUPS),
                                                           ('validation', 'all')}
    assert {r['setting'] for r in rows} == {'balanced'} and all(0 < r['value'] <= 100 for r in rows)
    assert first[0]['images'] == 220 and first[0]['samples'] == 64 and first[0]['weights'] == 'random'
    monkeypatch.setattr('lthash.experiments.trials.fit', lambda *a, **k: pytest.fail('trained again'))
    assert run_trials([TINY], 'figure1b', factor='seed') == first
    assert TINY.codes().shape == (len(load_data(TINY)), 4)


def test_the_training_set_of_a_long_tailed_trial_is_smaller():
    balanced, longtail = run(TINY), run(replace(TINY, train_set='long-tail'))
    assert balanced['counts'] == longtail['counts'] and longtail['images'] == sum(longtail['counts']) < 220


@pytest.mark.parametrize('technique', ['duplicates', 'LTHNet', 'extra real images'])
def test_a_baseline_leaves_rows_and_codes_and_is_trained_once(technique, monkeypatch):
    trial = BaselineTrial.of(TINY, technique)
    rows = run_trials([trial], 'baselines')
    assert len(rows) == 9 and [r['protocol'] for r in rows].count('validation') == 1
    assert {r['setting'] for r in rows} == {technique} and {r['samples'] for r in rows} == {64}
    assert (rows[0]['images'] > sum(run(trial)['counts'])) == (technique == 'extra real images')
    monkeypatch.setattr(rebalancing, 'fit', lambda *a, **k: pytest.fail('trained again'))
    assert run_trials([trial], 'baselines') == rows                                # from disk
    assert len(trial.codes()) == len(load_data(trial))


def test_bad_technique_is_named():
    with pytest.raises(ValueError, match="technique is one of duplicates.*found 'magic'"):
        BaselineTrial(technique='magic')
    with pytest.raises(ValueError, match="did you mean 'mixup'"):
        BaselineTrial.of(TINY, 'mix-up')


def average_precision(distance: np.ndarray, relevant: np.ndarray) -> float:
    "Ties in expectation, by brute force over random orders."
    rng, found = np.random.default_rng(0), []
    for _ in range(300):
        hit = relevant[np.lexsort((rng.random(len(distance)), distance))]
        found.append((np.cumsum(hit)/np.arange(1, len(hit) + 1))[hit].mean())
    return np.mean(found)


def test_validation_images_are_no_queries_and_their_measure_is_that_of_the_codes():
    trial = BaselineTrial.of(replace(TINY, seed=3), 'duplicates')
    measured = run(trial)['validation']['mAP']
    data, codes = load_data(trial), trial.codes()
    part, labels = retrieval_split(data, 'paper'), data.labels.numpy()
    assert not set(part.validation.tolist()) & (set(part.query.tolist()) | set(part.train.tolist()))
    query, database = (np.unpackbits(codes[at], axis=1).astype(int) for at in (part.validation, part.train))
    distance = (query[:, None] != database[None]).sum(2)
    brute = np.mean([average_precision(d, labels[part.train] == y) for d, y in zip(distance, labels[part.validation])])
    assert abs(measured - brute) < .01
