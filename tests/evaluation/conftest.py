"References that the tests of the measures share: average precision by its definition, rankings, distances, problems."
import itertools
from fractions import Fraction

import numpy as np
import pytest

from lthash.evaluation.hamming import noisy_codes


class Reference:
    "Definitions, one item at a time."

    @staticmethod
    def ap(g, k, denominator, total=None):
        "Average precision of one ranking as a fraction, by its definition; None when the denominator is 0."
        total, found = sum(g) if total is None else total, sum(g[:k])
        D = {'retrieved': found, 'min': min(total, k), 'total': total}[denominator]
        summed = sum((Fraction(sum(g[:i + 1]), i + 1) for i in range(min(k, len(g))) if g[i]), Fraction(0))
        return summed/D if D else None

    @staticmethod
    def rankings(items, relevant):
        "Every ranking the levels allow, each arrangement of relevant items once (all are equally likely)."
        levels = []
        for n, r in zip(items, relevant):
            levels.append([tuple(int(i in chosen) for i in range(n)) for chosen in itertools.combinations(range(n), r)])
        return [sum(order, ()) for order in itertools.product(*levels)]

    @staticmethod
    def relevance(y, z):
        "Relevance of each item for each query, (q, n) bool."
        return y[:, None] == z[None] if y.ndim == 1 else y.astype(int) @ z.T.astype(int) > 0

    @staticmethod
    def distances(q, d):
        "Hamming distances, (q, n)."
        return np.bitwise_count(q[:, None] ^ d[None]).sum(2, dtype=int)

    @staticmethod
    def problem(seed, bits=16, queries=12, items=150, classes=5, noise=.3, multi=False):
        "Packed codes and labels of queries and of a database."
        rng = np.random.default_rng(seed)
        y, z = rng.integers(0, classes, queries), rng.integers(0, classes, items)
        q = noisy_codes(np.append(y, classes - 1), bits, noise, seed)[:-1]
        d = noisy_codes(np.append(z, classes - 1), bits, noise, seed + 1)[:-1]
        if multi:
            extra = rng.random((queries + items, classes)) < .15
            labels = (np.eye(classes)[np.append(y, z)] + extra > 0).astype(np.uint8)
            labels[:2] = 0                                                               # queries without any label
            y, z = labels[:queries], labels[queries:]
        return q, y, d, z

    @staticmethod
    def without_ties(multi=False):
        "Queries to which the distances 0, 1, 2, ... all differ, in a shuffled database."
        rng = np.random.default_rng(8)
        d = np.packbits(np.tri(41, 40, -1, dtype=bool), axis=1)[rng.permutation(41)]
        q, y, z = np.zeros((6, 5), np.uint8), rng.integers(0, 6, 6), rng.integers(0, 4, 41)   # 4 and 5: not in database
        if multi:
            y, z = (rng.random((6, 4)) < .3).astype(np.uint8), (rng.random((41, 4)) < .2).astype(np.uint8)
            y[1] = 0
        return q, y, d, z


@pytest.fixture(scope='session')
def ref() -> type[Reference]:
    "The references."
    return Reference
