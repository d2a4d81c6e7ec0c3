"Average precision and its mean against enumeration, exact fractions and exact distributions."
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.evaluation.average_precision import (
    average_precision,
    average_precision_terms,
    mean_over_queries,
    running_sum,
)
from lthash.evaluation.hamming import Counts

TIES, DENOMINATORS = ('expected', 'best', 'worst'), ('retrieved', 'min', 'total')


@st.composite
def small_levels(draw):
    "Up to four levels of up to five items, as (items, relevant)."
    level = st.integers(0, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n)))
    levels = st.lists(level, min_size=1, max_size=4)
    return draw(levels.filter(lambda levels: 0 < sum(n for n, _ in levels) <= 12))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_levels())
def test_average_precision_is_that_of_all_orders(ref, levels):
    items, relevant = zip(*levels)
    orders, counts = ref.rankings(items, relevant), Counts(np.array([items]), np.array([relevant]))
    for k, denominator in itertools.product(range(1, sum(items) + 1), DENOMINATORS):
        values = [ref.ap(g, k, denominator) for g in orders]
        defined, zero = [v for v in values if v is not None], [v or Fraction(0) for v in values]
        for ties, exact in zip(TIES, (sum(zero)/len(zero), max(zero), min(zero))):
            assert average_precision(counts, k, ties, denominator)[0] == pytest.approx(float(exact), abs=1e-14)
        _, kept = (x[0] for x in average_precision_terms(counts, k, 'expected', denominator))
        assert kept == pytest.approx(len(defined)/len(values), abs=1e-14)
        for ties, extreme in (('best', max), ('worst', min)):
            value, kept = (x[0] for x in average_precision_terms(counts, k, ties, denominator))
            assert kept == (0 if not defined else 1 if len(defined) == len(values) else .5)
            if defined:
                assert value == pytest.approx(float(extreme(defined)), abs=1e-14)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(small_levels(), min_size=2, max_size=3), st.integers(1, 4))
def test_mean_over_kept_queries_is_that_of_all_combinations(ref, queries, k):
    size = min(sum(n for n, _ in levels) for levels in queries)
    k = min(k, size)
    distributions = []                                              # per query: AP (None when empty) -> probability
    for levels in queries:
        orders = ref.rankings(*zip(*levels))
        distribution = {}
        for g in orders:
            v = ref.ap(g, k, 'retrieved')
            distribution[v] = distribution.get(v, 0) + Fraction(1, len(orders))
        distributions.append(distribution)
    expected, means = 0, []
    for combination in itertools.product(*(d.items() for d in distributions)):
        used = [v for v, _ in combination if v is not None]
        means.append(sum(used)/len(used) if used else Fraction(0))
        expected += means[-1]*math.prod(p for _, p in combination)
    counts = [Counts(*np.array(list(zip(*levels)))[:, None]) for levels in queries]
    for ties, exact in zip(TIES, (expected, max(means), min(means))):
        terms = zip(*(average_precision_terms(c, k, ties, 'retrieved') for c in counts))
        values, kept = (np.concatenate(t) for t in terms)
        assert mean_over_queries(values, kept, ties, 'skip') == pytest.approx(float(exact), abs=1e-13)


@pytest.mark.parametrize('queries', [3, 200, 3000])
def test_quadrature_of_skipped_queries_is_exact(queries):
    "E[sum / number kept] from the exact distribution of the number kept (Poisson binomial, by convolution)."
    rng = np.random.default_rng(queries)
    kept = np.where(rng.random(queries) < .7, 1., rng.random(queries))
    values = rng.random(queries)*kept
    without = np.ones(1)                                            # distribution of the number kept among all
    for p in kept:
        without = np.convolve(without, [1 - p, p])
    total = 0.
    for p, v in zip(kept[:200], values[:200]):   # remove one query again, stably: p >= .5 from the top, else the bottom
        other = np.zeros(queries)
        if p < .5:
            for m in range(queries):
                other[m] = (without[m] - (p*other[m - 1] if m else 0))/(1 - p)
        else:
            for m in range(queries, 0, -1):
                other[m - 1] = (without[m] - ((1 - p)*other[m] if m < queries else 0))/p
        total += v*(other/np.arange(1, queries + 1)).sum()
    rest = values.copy()
    rest[200:] = 0
    assert mean_over_queries(rest, kept, 'expected', 'skip') == pytest.approx(total, rel=1e-11)


def test_large_database_keeps_its_digits():
    "Levels far out, where harmonic numbers cancel, against exact fractions."
    items, relevant = np.array([[10**6, 40, 7, 10**5]]), np.array([[3, 2, 7, 1]])
    N, R, total = 10**6, 3, Fraction(0)
    for n, r in zip(items[0, 1:3].tolist(), relevant[0, 1:3].tolist()):
        a = Fraction(r - 1, n - 1)
        total += Fraction(r, n)*sum((R + 1 + (i - 1)*a)/(N + i) for i in range(1, n + 1))
        N += n
        R += r
    head = average_precision(Counts(items[:, :1], relevant[:, :1]), denominator='total')[0]*3
    three = average_precision(Counts(items[:, :3], relevant[:, :3]), denominator='total')[0]*12
    assert three - head == pytest.approx(float(total), abs=1e-15*12)
    sums = running_sum(1/np.arange(1., 10**6 + 50))
    harmonic = sum(Fraction(1, 10**6 + i) for i in range(1, 50))
    difference = (sums[0, -1] - sums[0, 10**6]) + (sums[1, -1] - sums[1, 10**6])
    assert difference == pytest.approx(float(harmonic), rel=1e-15)
