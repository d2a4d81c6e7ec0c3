"Properties of imbalance profiles, draws and groups."
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lthash.data.longtail import class_counts, class_groups, class_order, imbalance_factor, take

many = settings(max_examples=100, deadline=None)

@many
@given(st.sampled_from(['exponential', 'step', 'balanced']), st.integers(1, 5000), st.integers(2, 50),
       st.floats(1, 200), st.integers(0, 99))
def test_profiles(profile, largest, classes, factor, seed):
    assume(largest >= factor)
    counts = class_counts(profile, largest, classes, factor, seed)
    by_rank = counts[class_order(classes, seed)]
    assert counts.dtype == np.int64 and counts.shape == (classes,)
    assert by_rank[0] == counts.max() == largest and (np.diff(by_rank) <= 0).all() and counts.min() >= 1
    expected = {'exponential': lambda r: largest*math.exp(-math.log(factor)*r/(classes - 1)),
                'step': lambda r: largest if 2*r < classes else largest/factor,
                'balanced': lambda r: largest}[profile]
    assert all(abs(n - expected(r)) <= .5 + 1e-6 for r, n in enumerate(by_rank))

@many
@given(st.integers(2, 40), st.integers(0, 99), st.integers(0, 99))
def test_the_order_seed_only_renames_classes(classes, a, b):
    first, second = (class_counts('exponential', 960, classes, 48, s) for s in (a, b))
    assert sorted(first) == sorted(second) and (a != b or (first == second).all())

def test_the_papers_imagenette_setting():
    counts = class_counts('exponential', 960, 10, 48)
    assert imbalance_factor(counts) == 48 and counts.min() == 20

@many
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data(), st.integers(0, 99))
def test_draws_are_nested_and_exact(available, draw, seed):
    labels = torch.tensor([c for c, n in enumerate(available) for _ in range(n)], dtype=torch.int64)
    labels = labels[torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))]
    larger = [draw.draw(st.integers(0, n)) for n in available]
    smaller = [draw.draw(st.integers(0, n)) for n in larger]
    large, small = take(labels, larger, seed), take(labels, np.array(smaller), seed)
    assert set(small.tolist()) <= set(large.tolist()) and large.dtype == torch.int64
    for chosen, counts in ((large, larger), (small, smaller)):
        assert torch.bincount(labels[chosen], minlength=len(available)).tolist() == counts
        assert len(set(chosen.tolist())) == len(chosen)

def test_the_seed_of_a_draw_matters():
    labels = torch.arange(4).repeat(50)
    assert not torch.equal(take(labels, [10]*4, 0), take(labels, [10]*4, 1))

@many
@given(st.lists(st.integers(1, 1000), min_size=3, max_size=40))
def test_groups_are_ordered_thirds(counts):
    g, counts = class_groups(counts), np.array(counts)
    assert sorted(np.concatenate(list(g.values()))) == list(range(len(counts)))
    assert counts[g['head']].min() >= counts[g['mid']].max() and counts[g['mid']].min() >= counts[g['tail']].max()
    sizes = [len(g[k]) for k in ('head', 'mid', 'tail')]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[2] <= 1

@pytest.mark.parametrize('call,message', [
    (lambda: class_counts('exponentional', 10, 2), "'exponential', 'step' or 'balanced'; found 'exponentional'"),
    (lambda: class_counts('exponential', 40, 10, 48), 'leaves the smallest without an image'),
    (lambda: class_counts('step', 40, 10, .5), 'factor of at least 1; found 10 and 0.5'),
    (lambda: class_counts('balanced', 10, 0), 'at least one class'),
    (lambda: take(torch.tensor([0, 0, 1]), [2, 2], 0), 'class 1: 2 images wanted, 1 found'),
    (lambda: take(torch.tensor([0, 0]), [1, 1], 0), 'class 1: 1 images wanted, 0 found'),
    (lambda: take(torch.tensor([0, 0]), [-1], 0), 'class 0: -1 images wanted'),
    (lambda: imbalance_factor([5, 0]), 'every class needs an image'),
    (lambda: imbalance_factor([]), 'every class needs an image')])
def test_errors_say_what_was_found(call, message):
    with pytest.raises(ValueError, match=message):
        call()
