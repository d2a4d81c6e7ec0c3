"Shallow hashing against formulations written independently, in float64."
import math

import numpy as np
import pytest

from lthash.evaluation.hamming import pack
from lthash.unsupervised.base import encode_features, make_method
from lthash.unsupervised.shallow import ITQ, LSH, PCASign, SpectralHashing, itq, lsh, pca_sign, spectral


def cloud(n=300, d=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3


def test_pca_directions_are_the_eigenvectors_of_the_covariance():
    x = cloud()
    w, b = pca_sign(x, 6)
    vectors = np.linalg.eigh(np.cov(x.T))[1]
    assert np.allclose(np.abs(w.T @ vectors[:, ::-1][:, :6]), np.eye(6), atol=1e-6)
    assert np.allclose((x @ w + b).mean(0), 0, atol=1e-8)


def test_itq_is_alternating_procrustes():
    x = cloud(seed=1)
    w0, b0 = pca_sign(x, 5)
    v = x @ w0 + b0
    r = np.linalg.qr(np.random.default_rng(7).standard_normal((5, 5)))[0]
    for _ in range(12):                                                  # Gong & Lazebnik's own update
        u, _, t = np.linalg.svd(np.sign(v @ r).T @ v)
        r = t.T @ u.T
    w, b = itq(x, 5, seed=7, iterations=12)
    assert np.allclose(x @ w + b, v @ r, atol=1e-8)


def test_spectral_hashing_is_the_authors_mode_table():
    x, bits = cloud(d=6, seed=2), 9
    w0, b0 = pca_sign(x, 6)
    v = x @ w0 + b0
    low, extent = v.min(0), v.max(0) - v.min(0)
    modes = []                                          # one non-zero mode per row, as in the published Matlab code
    for axis in range(6):
        last = math.ceil((bits + 1)*extent[axis]/extent.max())
        modes += [(k*np.pi/extent[axis], axis) for k in range(1, last + 1)]
    waves = [np.sin(np.pi/2 + omega*(v[:, axis] - low[axis])) for omega, axis in sorted(modes)[:bits]]
    w, b = spectral(x, bits)
    assert np.allclose(np.cos(x @ w + b), np.stack(waves, 1), atol=1e-8)


@pytest.mark.parametrize('kind', [LSH, PCASign, ITQ, SpectralHashing])
def test_shallow_methods_ignore_shift_and_give_the_same_codes_after_reloading(kind, store):
    clean = store.clean_train()
    codes = []
    for shift in (0., 5.):
        net = make_method(kind, store.width, 16)
        net.prepare(clean.double() + shift, 3)
        codes.append(np.unpackbits(pack(net.double()(clean.double() + shift))))
    assert (codes[0] != codes[1]).mean() < .01                            # rounding aside
    again = make_method(kind, store.width, 16)
    again.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
    assert (np.unpackbits(encode_features(again, clean + 5.)) != codes[1]).mean() < .01


def test_shallow_methods_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match='at most 10 principal directions'):
        itq(cloud(), 16)
    with pytest.raises(ValueError, match='1 of 300 rows'):
        lsh(np.where(np.arange(3000).reshape(300, 10) == 5, np.nan, cloud()), 4)
