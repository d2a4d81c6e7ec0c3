"Made-up feature stores: no images, no encoder."
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lthash.data.base import Split
from lthash.unsupervised.features import FeatureConfig, Features


def small_store(m: int = 60, views_each: int = 3, d: int = 12, classes: int = 4, seed: int = 0) -> Features:
    "Classes are directions, the last images are validation."
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes, m + 20))
    clean = torch.from_numpy(rng.normal(size=(classes, d))[labels] + .5*rng.normal(size=(m + 20, d))).half()
    drawn = (clean[:m, None].float() + .3*torch.from_numpy(rng.normal(size=(m, views_each, d))).float()).half()
    split = Split('paper', torch.arange(m), torch.arange(m, m + 10), torch.arange(m + 10, m + 20), torch.arange(m),
                  'made-up')
    return Features(FeatureConfig(), split, torch.arange(m), clean, drawn, labels, tuple('abcd'))


def clustered(n: int = 480, clusters: int = 8, d: int = 48, noise: float = 1.6, seed: int = 0) -> Features:
    "Features of overlapping clusters and noisy views of the training images."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % clusters
    centres = rng.standard_normal((clusters, d))
    clean = centres[labels] + .5*noise*rng.standard_normal((n, d))
    views = clean[:, None] + .25*noise*rng.standard_normal((n, 4, d))
    train, validation, query = (torch.from_numpy(p) for p in np.split(np.arange(n), [n - 120, n - 80]))
    scale = clean.std(0)
    return Features(FeatureConfig('clusters'), Split('made up', train, validation, query, train, 'x'), train,
                    torch.from_numpy(clean/scale).half(), torch.from_numpy(views[:len(train)]/scale).half(),
                    torch.from_numpy(labels), tuple(map(str, range(clusters))))


@pytest.fixture(scope='session')
def small() -> Callable[..., Features]:
    "A function that makes a small store."
    return small_store


@pytest.fixture(scope='session')
def store() -> Features:
    "480 images in eight overlapping clusters."
    return clustered()
