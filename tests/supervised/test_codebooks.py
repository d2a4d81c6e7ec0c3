"Codebooks: form, seeds, distances, and shapes that cannot be."
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.supervised.codebooks import (
    CODEBOOKS,
    bernoulli_codebook,
    gaussian_codebook,
    hadamard_codebook,
    max_distance_codebook,
)


def closest(book):
    return min(int((a != b).sum()) for a, b in itertools.combinations(book, 2))


@pytest.mark.parametrize('name', CODEBOOKS)
@pytest.mark.parametrize('classes, bits', [(2, 1), (2, 2), (10, 16), (7, 12), (30, 48), (40, 16)])
def test_codebook_form(name, classes, bits):
    book = CODEBOOKS[name](classes, bits, 3)
    assert book.shape == (classes, bits) and book.dtype == torch.int8 and set(book.unique().tolist()) == {-1, 1}
    assert len(book.unique(dim=0)) == classes
    assert torch.equal(book, CODEBOOKS[name](classes, bits, 3))


@pytest.mark.parametrize('name', ['bernoulli', 'gaussian', 'max-distance'])
def test_codebook_seed_and_global_state(name):
    np.random.seed(0)
    torch.manual_seed(0)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert not torch.equal(CODEBOOKS[name](10, 32, 0), CODEBOOKS[name](10, 32, 1))
    assert np.array_equal(np.random.get_state()[1], states[0]) and torch.equal(torch.get_rng_state(), states[1])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 7), st.data())
def test_hadamard_distances(power, data):
    bits = 2**power
    classes = data.draw(st.integers(2, max(2, 2*bits)))
    book = hadamard_codebook(classes, bits).int()
    products = book @ book.T
    assert (products.diagonal() == bits).all()
    off = products[~torch.eye(classes, dtype=torch.bool)]
    assert set(off.tolist()) <= ({0} if classes <= bits else {0, -bits})      # half of the bits differ, or all


@pytest.mark.parametrize('classes, bits', [(10, 12), (5, 17), (150, 64)])
def test_hadamard_fallback_is_balanced_and_spread(classes, bits):
    book = hadamard_codebook(classes, bits, 1)
    assert (book.sum(1).abs() == bits % 2).all()
    assert closest(book) >= .3*bits
    assert not torch.equal(book, hadamard_codebook(classes, bits, 2))


@pytest.mark.parametrize('make', [bernoulli_codebook, gaussian_codebook])
def test_random_bits_are_fair_and_codes_differ(make):
    assert abs(make(100, 400, 5).double().mean()) < 5/200                     # five standard deviations
    assert len(make(64, 6, 0).unique(dim=0)) == 64


def test_search_keeps_its_distance():
    for seed in range(3):
        found = closest(max_distance_codebook(10, 32, seed))
        assert found > max(closest(bernoulli_codebook(10, 32, seed)), .4*32)


def test_search_gives_up_with_advice():
    with pytest.raises(ValueError, match='differ in a fifth of their bits, not 200: use more bits'):
        max_distance_codebook(200, 8)


@pytest.mark.parametrize('name', CODEBOOKS)
@pytest.mark.parametrize('classes, bits, message', [(10, 0, 'at least 1 bit'), (1, 8, 'at least 2 classes'),
                                                    (9, 3, 'there are 8')])
def test_impossible_codebooks(name, classes, bits, message):
    with pytest.raises(ValueError, match=message):
        CODEBOOKS[name](classes, bits)
