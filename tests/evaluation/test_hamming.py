"Packing and counts against their definitions, on both paths."
import math
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.evaluation.hamming import as_numpy, as_packed, counts_by_matmul, distance_counts, pack, unpack


def test_pack():
    v = np.random.default_rng(0).normal(size=(7, 21))
    for same in (v, v.astype(np.float32), v > 0, torch.tensor(v), torch.tensor(v).bfloat16(), np.sign(v).astype(int),
                 torch.tensor(v, requires_grad=True)):
        assert (pack(same) == np.packbits(v > 0, axis=1)).all()
    assert (unpack(pack(v), 21) == np.sign(v)).all()
    with pytest.warns(UserWarning, match='2 of 4 values are exactly 0'):
        pack([[0., 0., 1., -1.]])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pack(np.eye(3))                                                    # a 0/1 code is no accident
    with pytest.raises(ValueError, match='row 1'):
        pack([[1., 2.], [math.nan, 1.]])
    for bad in (np.zeros(3), np.zeros((2, 0)), np.array([['a']]), np.zeros((2, 2), complex)):
        with pytest.raises(ValueError, match='shape'):
            pack(bad)


def test_uint8_is_packed_and_every_other_type_is_not():
    v = np.random.default_rng(0).normal(size=(7, 21))
    packed = pack(v)
    assert as_packed(packed) is packed
    for same in (v, v > 0, np.sign(v).astype(np.int8), torch.tensor(v), torch.tensor(v > 0), torch.tensor(packed)):
        assert (as_numpy(as_packed(same)) == packed).all() and isinstance(as_packed(same), type(same))
    with pytest.raises(ValueError, match=r'found shape \(3,\) of float64'):
        as_packed(np.zeros(3))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 80), st.integers(1, 200),
       st.sampled_from(['single', 'multi', 'negative']))
def test_counts_of_random_codes(ref, seed, queries, items, bits, kind):
    rng = np.random.default_rng(seed)
    q, d = pack(rng.normal(size=(queries, bits))), pack(rng.normal(size=(items, bits)))
    if kind == 'multi':
        y, z = (rng.random((n, 90)) < .02 for n in (queries, items))
    else:
        y, z = (rng.integers(-5 if kind == 'negative' else 0, 5, n) for n in (queries, items))
    counts, levels = distance_counts(q, y, d, z), 8*q.shape[1] + 1
    def histograms(which):
        return np.stack([np.bincount(row[keep], minlength=levels) for row, keep in zip(ref.distances(q, d), which)])
    assert (counts.items == histograms(np.ones((queries, items), bool))).all()
    assert (counts.relevant == histograms(ref.relevance(y, z))).all()
    by_torch = counts_by_matmul(*map(torch.as_tensor, (q, y, d, z)), pairs=64)
    assert (by_torch[:, levels:] == counts.relevant).all() and (by_torch.sum(1) == items).all()
    assert (by_torch[:, :levels] + by_torch[:, levels:] == counts.items).all()


def test_counts_cross_the_pieces_and_the_threads(ref):
    "More items than one piece, more queries than one thread's share, more classes than 16 bits hold."
    rng = np.random.default_rng(0)
    q, d = (rng.integers(0, 256, (n, 3), dtype=np.uint8) for n in (150, 70_001))
    z = np.arange(70_001)
    y = z[-150:]
    counts = distance_counts(q, y, d, z)
    assert (counts.items.sum(1) == 70_001).all() and (counts.total == 1).all()
    assert (np.argmax(counts.relevant, 1) == np.bitwise_count(q ^ d[-150:]).sum(1)).all()
    assert (counts.items == np.stack([np.bincount(row, minlength=25) for row in ref.distances(q, d)])).all()
    same = distance_counts(d[:1], y[:1], np.repeat(d[:1], 140_001, 0), np.repeat(y[:1], 140_001))   # one counter
    assert same.items[0, 0] == same.relevant[0, 0] == 140_001


def test_codes_on_the_gpu_give_the_same_counts(ref):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    for multi in (False, True):
        arrays = ref.problem(0, bits=100, queries=50, items=5000, multi=multi)
        here, there = distance_counts(*arrays), distance_counts(*(torch.as_tensor(a).cuda() for a in arrays))
        assert (here.items == there.items).all() and (here.relevant == there.relevant).all()


def test_read_only_install_without_a_cache():
    "Nowhere to keep compiled code: it is compiled for the process, and works."
    environment = {**os.environ, 'NUMBA_CACHE_DIR': '/proc/nowhere',
                   'NUMBA_CACHE_LOCATOR_CLASSES': 'UserProvidedCacheLocator'}
    code = '\n'.join(['import numpy as np', 'from lthash.evaluation.hamming import distance_counts',
                      'codes, labels = np.zeros((1, 1), np.uint8), np.zeros(1, int)',
                      'print(distance_counts(codes, labels, codes, labels).total[0])'])
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == '1', done.stderr
