"Exact evaluation against enumeration, brute force, other libraries, and the routines of public repositories."
import itertools, math, os, subprocess, sys, warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from sklearn.metrics import ndcg_score

from lthash.conventions import CONVENTIONS, apply_convention, convention_interval
from lthash.hamming import _counts_torch
from lthash.retrieval import (BinaryIndex, Counts, _average_precision, _mean, average_precision, distance_counts, mean_average_precision, ndcg, noisy_codes, pack,
                              precision_at, precision_recall, precision_within, recall_at, retrieval_report, running_sum, shared_ndcg, unpack)

TIES, DENOMINATORS = ('expected', 'best', 'worst'), ('retrieved', 'min', 'total')


# ---- references -------------------------------------------------------------------------------------------------------------------------

def ap(g, k, denominator, total=None):
    "Average precision of one ranking as a fraction, by its definition; None when the denominator is 0."
    total, found = sum(g) if total is None else total, sum(g[:k])
    D = {'retrieved': found, 'min': min(total, k), 'total': total}[denominator]
    return sum((Fraction(sum(g[:i + 1]), i + 1) for i in range(min(k, len(g))) if g[i]), Fraction(0))/D if D else None

def rankings(items, relevant):
    "Every ranking the levels allow, each arrangement of relevant items once (all are equally likely)."
    levels = []
    for n, r in zip(items, relevant):
        levels.append([tuple(int(i in chosen) for i in range(n)) for chosen in itertools.combinations(range(n), r)])
    return [sum(order, ()) for order in itertools.product(*levels)]

def problem(seed, bits=16, queries=12, items=150, classes=5, noise=.3, multi=False):
    rng = np.random.default_rng(seed)
    y, z = rng.integers(0, classes, queries), rng.integers(0, classes, items)
    q, d = noisy_codes(np.append(y, classes - 1), bits, noise, seed)[:-1], noisy_codes(np.append(z, classes - 1), bits, noise, seed + 1)[:-1]
    if multi:
        extra = rng.random((queries + items, classes)) < .15
        labels = (np.eye(classes)[np.append(y, z)] + extra > 0).astype(np.uint8)
        labels[:2] = 0                                                               # queries without any label
        y, z = labels[:queries], labels[queries:]
    return q, y, d, z

def relevance(y, z): return (y[:, None] == z[None]) if y.ndim == 1 else y.astype(int) @ z.T.astype(int) > 0
def hamming(q, d): return np.bitwise_count(q[:, None] ^ d[None]).sum(2, dtype=int)
def shuffled(d, z, rng):
    order = rng.permutation(len(d))
    return d[order], z[order]


# ---- average precision ------------------------------------------------------------------------------------------------------------------

@st.composite
def small_levels(draw):
    "Up to four levels of up to five items, as (items, relevant)."
    return draw(st.lists(st.integers(0, 5).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1, max_size=4).filter(lambda l: 0 < sum(n for n, _ in l) <= 12))

@settings(max_examples=150, deadline=None, derandomize=True)
@given(small_levels())
def test_average_precision_is_that_of_all_orders(levels):
    items, relevant = zip(*levels)
    orders, counts = rankings(items, relevant), Counts(np.array([items]), np.array([relevant]))
    for k, denominator in itertools.product(range(1, sum(items) + 1), DENOMINATORS):
        values = [ap(g, k, denominator) for g in orders]
        defined, zero = [v for v in values if v is not None], [v or Fraction(0) for v in values]
        for ties, exact in zip(TIES, (sum(zero)/len(zero), max(zero), min(zero))):
            assert average_precision(counts, k, ties, denominator)[0] == pytest.approx(float(exact), abs=1e-14)
        value, kept = (x[0] for x in _average_precision(counts, k, 'expected', denominator))
        assert kept == pytest.approx(len(defined)/len(values), abs=1e-14)
        for ties, extreme in (('best', max), ('worst', min)):
            value, kept = (x[0] for x in _average_precision(counts, k, ties, denominator))
            assert kept == (0 if not defined else 1 if len(defined) == len(values) else .5)
            if defined: assert value == pytest.approx(float(extreme(defined)), abs=1e-14)

@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(small_levels(), min_size=2, max_size=3), st.integers(1, 4))
def test_mean_over_kept_queries_is_that_of_all_combinations(queries, k):
    size = min(sum(n for n, _ in levels) for levels in queries)
    k = min(k, size)
    distributions = []                                              # per query: AP (None when empty) -> probability
    for levels in queries:
        orders = rankings(*zip(*levels))
        distribution = {}
        for g in orders: distribution[v] = distribution.get(v := ap(g, k, 'retrieved'), 0) + Fraction(1, len(orders))
        distributions.append(distribution)
    expected, means = 0, []
    for combination in itertools.product(*(d.items() for d in distributions)):
        used = [v for v, _ in combination if v is not None]
        means.append(sum(used)/len(used) if used else Fraction(0))
        expected += means[-1]*math.prod(p for _, p in combination)
    for ties, exact in zip(TIES, (expected, max(means), min(means))):
        pairs = [_average_precision(Counts(*np.array(list(zip(*levels)))[:, None]), k, ties, 'retrieved') for levels in queries]
        values, kept = np.concatenate([p[0] for p in pairs]), np.concatenate([p[1] for p in pairs])
        assert _mean(values, kept, ties, 'skip') == pytest.approx(float(exact), abs=1e-13)

@pytest.mark.parametrize('queries', [3, 200, 3000])
def test_quadrature_of_skipped_queries_is_exact(queries):
    "E[sum / number kept] from the exact distribution of the number kept (Poisson binomial, by convolution)."
    rng = np.random.default_rng(queries)
    kept = np.where(rng.random(queries) < .7, 1., rng.random(queries))
    values = rng.random(queries)*kept
    without = np.ones(1)                                            # distribution of the number kept among all
    for p in kept: without = np.convolve(without, [1 - p, p])
    total = 0.
    for p, v in zip(kept[:200], values[:200]):                       # remove one query from it again, stably: p >= .5 from the top, p < .5 from the bottom
        other = np.zeros(queries)
        if p < .5:
            for m in range(queries): other[m] = (without[m] - (p*other[m - 1] if m else 0))/(1 - p)
        else:
            for m in range(queries, 0, -1): other[m - 1] = (without[m] - ((1 - p)*other[m] if m < queries else 0))/p
        total += v*(other/np.arange(1, queries + 1)).sum()
    rest = values.copy(); rest[200:] = 0
    assert _mean(rest, kept, 'expected', 'skip') == pytest.approx(total, rel=1e-11)

@pytest.mark.parametrize('k', [None, 1, 17, 100])
@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('denominator', DENOMINATORS)
def test_database_order_is_a_stable_sort(k, multi, denominator):
    q, y, d, z = problem(3, multi=multi)
    g = np.take_along_axis(relevance(y, z), np.argsort(hamming(q, d), axis=1, kind='stable'), 1).astype(int)
    values = [ap(list(map(int, row)), k or len(d), denominator) for row in g]
    zero, skip = [float(v or 0) for v in values], [float(v) for v in values if v is not None]
    assert mean_average_precision(q, y, d, z, k, 'index', denominator) == pytest.approx(np.mean(zero), abs=1e-13)
    assert mean_average_precision(q, y, d, z, k, 'index', denominator, 'skip') == pytest.approx(np.mean(skip), abs=1e-13)

@pytest.mark.parametrize('k', [1, 20, 149, None])
def test_expectation_is_the_mean_over_shuffles(k):
    q, y, d, z = problem(5)
    rng = np.random.default_rng(0)
    values = [mean_average_precision(q, y, *shuffled(d, z, rng), k, 'index') for _ in range(300)]
    low, expected, high = (mean_average_precision(q, y, d, z, k, t) for t in ('worst', 'expected', 'best'))
    assert low - 1e-12 <= min(values) and max(values) <= high + 1e-12
    assert abs(np.mean(values) - expected) < 4.5*np.std(values)/300**.5

def test_large_database_keeps_its_digits():
    "Levels far out, where harmonic numbers cancel, against exact fractions."
    items, relevant = np.array([[10**6, 40, 7, 10**5]]), np.array([[3, 2, 7, 1]])
    H = lambda N, m: sum(Fraction(1, N + i) for i in range(1, m + 1))
    N, R, total = 0, 0, Fraction(0)
    for n, r in zip(items[0, 1:3].tolist(), relevant[0, 1:3].tolist()):
        N, R = (10**6, 3) if not N else (N, R)
        a = Fraction(r - 1, n - 1)
        total += Fraction(r, n)*sum((R + 1 + (i - 1)*a)/(N + i) for i in range(1, n + 1))
        N += n; R += r
    head = average_precision(Counts(items[:, :1], relevant[:, :1]), denominator='total')[0]*3
    three = average_precision(Counts(items[:, :3], relevant[:, :3]), denominator='total')[0]*12
    assert three - head == pytest.approx(float(total), abs=1e-15*12)
    sums = running_sum(1/np.arange(1., 10**6 + 50))
    assert (sums[0, -1] - sums[0, 10**6]) + (sums[1, -1] - sums[1, 10**6]) == pytest.approx(float(H(10**6, 49)), rel=1e-15)

def test_denominators_agree_at_all_ranks_and_k_is_clipped():
    q, y, d, z = problem(1)
    values = [mean_average_precision(q, y, d, z, k, denominator=D) for D in DENOMINATORS for k in (None, -1, 150, 10**6)]
    assert np.ptp(values) < 1e-14
    assert mean_average_precision(q, y, d, z, 10, denominator='total') < mean_average_precision(q, y, d, z, 10, denominator='min') < mean_average_precision(q, y, d, z, 10)

def test_random_codes_have_the_prior_as_map():
    "Codes that are all equal: one level; expected precision is the class's share at every rank."
    z = np.repeat([0, 1], [300, 700])
    codes = np.zeros((1000, 4), np.uint8)
    counts = distance_counts(codes[:2], np.array([0, 1]), codes, z)
    assert precision_at(counts, 17) == pytest.approx([.3, .7]) and recall_at(counts, 100) == pytest.approx([.1, .1])
    assert mean_average_precision(codes[:2], np.array([0, 1]), codes, z, ties='best') == 1


# ---- counts -----------------------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 80), st.integers(1, 200), st.sampled_from(['single', 'multi', 'negative']))
def test_counts_of_random_codes(seed, queries, items, bits, kind):
    rng = np.random.default_rng(seed)
    q, d = pack(rng.normal(size=(queries, bits))), pack(rng.normal(size=(items, bits)))
    y, z = (rng.random((n, 90)) < .02 for n in (queries, items)) if kind == 'multi' else (rng.integers(-5 if kind == 'negative' else 0, 5, n) for n in (queries, items))
    counts, levels = distance_counts(q, y, d, z), 8*q.shape[1] + 1
    expected = [np.stack([np.bincount(row[keep], minlength=levels) for row, keep in zip(hamming(q, d), which)]) for which in (np.ones((queries, items), bool), relevance(y, z))]
    assert (counts.items == expected[0]).all() and (counts.relevant == expected[1]).all()
    by_torch = _counts_torch(*map(torch.as_tensor, (q, y, d, z)), pairs=64)
    assert (by_torch[:, levels:] == counts.relevant).all() and (by_torch.sum(1) == items).all() and (by_torch[:, :levels] + by_torch[:, levels:] == counts.items).all()

def test_counts_cross_the_pieces_and_the_threads():
    "More items than one piece, more queries than one thread's share, more classes than 16 bits hold."
    rng = np.random.default_rng(0)
    q, d = (rng.integers(0, 256, (n, 3), dtype=np.uint8) for n in (150, 70_001))
    z = np.arange(70_001); y = z[-150:]
    counts = distance_counts(q, y, d, z)
    assert (counts.items.sum(1) == 70_001).all() and (counts.total == 1).all()
    assert (np.argmax(counts.relevant, 1) == np.bitwise_count(q ^ d[-150:]).sum(1)).all()
    assert (counts.items == np.stack([np.bincount(row, minlength=25) for row in hamming(q, d)])).all()
    same = distance_counts(d[:1], y[:1], np.repeat(d[:1], 140_001, 0), np.repeat(y[:1], 140_001))      # one counter takes them all
    assert same.items[0, 0] == same.relevant[0, 0] == 140_001

def test_codes_on_the_gpu_give_the_same_counts():
    if not torch.cuda.is_available(): pytest.skip('no CUDA device')
    for multi in (False, True):
        arrays = problem(0, bits=100, queries=50, items=5000, multi=multi)
        here, there = distance_counts(*arrays), distance_counts(*(torch.as_tensor(a).cuda() for a in arrays))
        assert (here.items == there.items).all() and (here.relevant == there.relevant).all()

def test_read_only_install_without_a_cache(tmp_path):
    "Nowhere to keep compiled code: it is compiled for the process, and works."
    environment = {**os.environ, 'NUMBA_CACHE_DIR': '/proc/nowhere', 'NUMBA_CACHE_LOCATOR_CLASSES': 'UserProvidedCacheLocator'}
    code = 'import numpy as np; from lthash.hamming import distance_counts; c = np.zeros((1, 1), np.uint8); print(distance_counts(c, np.zeros(1, int), c, np.zeros(1, int)).total[0])'
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == '1', done.stderr


# ---- other libraries --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('k', [1, 10, None])
def test_ndcg_is_scikit_learns(k):
    q, y, d, z = problem(2)
    assert ndcg(distance_counts(q, y, d, z), k).mean() == pytest.approx(ndcg_score(relevance(y, z).astype(int), -hamming(q, d).astype(float), k=k), abs=1e-12)
    q, y, d, z = problem(2, multi=True)
    gains = y.astype(int) @ z.T.astype(int)
    assert shared_ndcg(q, y, d, z, k)[2:].mean() == pytest.approx(ndcg_score(gains[2:], -hamming(q, d)[2:].astype(float), k=k), abs=1e-12)

@pytest.mark.parametrize('k', [3, 40, None])
def test_torchmetrics_is_inside_its_interval_and_equal_without_ties(k):
    from torchmetrics.retrieval import RetrievalMAP
    def theirs(q, y, d, z):
        scores, target = torch.tensor(8*q.shape[1] + 1 - hamming(q, d)).float(), torch.tensor(relevance(y, z))
        return float(RetrievalMAP(top_k=k)(scores.flatten(), target.flatten(), indexes=torch.arange(len(q)).repeat_interleave(len(d))))
    arrays = problem(4)
    interval = convention_interval('torchmetrics', *arrays, k)
    assert interval.worst - 1e-6 < theirs(*arrays) < interval.best + 1e-6
    arrays = without_ties()
    assert theirs(*arrays) == pytest.approx(apply_convention('torchmetrics', *arrays, k), abs=1e-6)


# ---- the routines of public repositories, re-implemented from their description -------------------------------------------------------------
# Each takes +-1 float codes and multi-hot labels, as the originals do.

def _overlap(row, labels): return (labels @ row) > 0

def orthohash(q, y, d, z, k):
    distances = .5*(q.shape[1] - torch.tensor(q) @ torch.tensor(d).T)
    top = torch.topk(distances, k, dim=1, largest=False)[1].numpy()
    values = []
    for i in range(len(q)):
        hit = _overlap(y[i], z[top[i]])
        values.append(np.sum(np.cumsum(hit)/np.arange(1, k + 1)*hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)

def csq(q, y, d, z, k):
    order, values = np.argsort(-np.dot(d, q.T), axis=0), []
    for i in range(len(q)):
        if y[i].sum() == 0: continue
        hit = _overlap(y[i], z[order[:k, i]])
        values.append(np.sum(np.cumsum(hit)/np.arange(1, k + 1)*hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)

def hashnet(q, y, d, z, k):
    order, values = np.argsort(-np.dot(d, q.T), axis=0), []
    for i in range(len(q)):
        hit = _overlap(y[i], z[order[:k, i]])
        if hit.sum(): values.append(np.sum(np.cumsum(hit)/np.arange(1, k + 1)*hit)/hit.sum())
    return np.mean(values)

def deephash(q, y, d, z, k):
    total = 0.
    for i in range(len(q)):
        hit = _overlap(y[i], z)[np.argsort(.5*(q.shape[1] - np.dot(q[i], d.T)))][0:k]         # k = -1 leaves out the last
        if hit.sum(): total += np.mean(np.arange(1, hit.sum() + 1)/(np.flatnonzero(hit) + 1.))
    return total/len(q)

def tbh(q, y, d, z, k):
    bits, other = (q + 1)/2, (d + 1)/2
    order, total, used = np.argsort(np.abs(bits @ (other - 1).T + (bits - 1) @ other.T)), 0., 0
    for i in range(len(q)):
        found, precision = 0, 0.
        for rank in range(k):
            if _overlap(y[i], z[order[i, rank]][None])[0]:
                found += 1; precision += found/(rank + 1)
        if found: total += precision/found; used += 1
    return total/used

def ssdh(q, y, d, z, k):
    values = []
    for i in range(len(q)):
        hit = _overlap(y[i], z[np.lexsort((np.arange(len(d)), -(d @ q[i])))[:k]])
        values.append(np.sum(np.cumsum(hit)/np.arange(1, k + 1)*hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)

def metric_learning(q, y, d, z, k):
    values = []
    for i in range(len(q)):
        relevant = _overlap(y[i], z)
        if not relevant.sum(): continue
        hit = relevant[np.argsort(-(d @ q[i]))[:k]]
        values.append(np.sum(np.cumsum(hit)/np.arange(1, k + 1)*hit)/relevant.sum())
    return np.mean(values)

ROUTINES = {'orthohash': orthohash, 'csq': csq, 'hashnet': hashnet, 'deephash-pytorch': deephash, 'cibhash': deephash, 'tbh': tbh, 'ssdh': ssdh, 'pytorch-metric-learning': metric_learning}

def as_originals(q, y, d, z):
    hot = (lambda l: l.astype(float)) if y.ndim == 2 else (lambda l: np.eye(max(y.max(), z.max()) + 1)[l])
    return unpack(q, 8*q.shape[1]).astype(np.float32), hot(y), unpack(d, 8*d.shape[1]).astype(np.float32), hot(z)

def without_ties(multi=False):
    "Queries 0 to whose distances 0, 1, 2, ... all differ, in a shuffled database."
    rng = np.random.default_rng(8)
    d = np.packbits(np.tri(41, 40, -1, dtype=bool), axis=1)[rng.permutation(41)]
    q, y, z = np.zeros((6, 5), np.uint8), rng.integers(0, 6, 6), rng.integers(0, 4, 41)                # classes 4 and 5 are in no database
    if multi: y, z = (rng.random((6, 4)) < .3).astype(np.uint8), (rng.random((41, 4)) < .2).astype(np.uint8); y[1] = 0
    return q, y, d, z

@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', ROUTINES)
def test_convention_equals_its_routine_without_ties(name, multi):
    arrays = without_ties(multi)
    for k in (3, 5, 41):
        assert ROUTINES[name](*as_originals(*arrays), k) == pytest.approx(mean_average_precision(*arrays, k, convention=name), abs=1e-12), k
    if CONVENTIONS[name].minus_one == 'drop last':
        assert deephash(*as_originals(*arrays), -1) == pytest.approx(mean_average_precision(*arrays, -1, convention=name), abs=1e-12)

@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', ROUTINES)
def test_convention_interval_holds_its_routine_on_shuffled_databases(name, multi):
    q, y, d, z = problem(7, bits=8, noise=.35, classes=12, items=60, multi=multi)
    rng = np.random.default_rng(0)
    for k in (3, 20, 60) + ((-1,) if CONVENTIONS[name].minus_one == 'drop last' else ()):
        values = []
        for _ in range(25):
            order = rng.permutation(60)
            values.append(ROUTINES[name](*as_originals(q, y, d[order], z[order]), k))
            if name == 'ssdh': assert values[-1] == pytest.approx(mean_average_precision(q, y, d[order], z[order], k, convention=name), abs=1e-12)
        interval = convention_interval(name, q, y, d, z, k)
        if name == 'ssdh': continue
        assert interval.worst - 1e-12 <= min(values) and max(values) <= interval.best + 1e-12
        assert interval.worst <= interval.expected <= interval.best
        assert abs(np.mean(values) - interval.expected) < 6*np.std(values)/5 + 1e-12

def test_conventions_fail_where_their_routines_fail():
    arrays = problem(0)
    for name in ('orthohash', 'csq', 'hashnet', 'tbh'):
        with pytest.raises(ValueError, match='fails'): mean_average_precision(*arrays, 151, convention=name)
        with pytest.raises(ValueError, match='fails'): mean_average_precision(*arrays, -1, convention=name)
    with pytest.raises(ValueError, match='orthohash'): mean_average_precision(*arrays, convention='nobody')
    assert mean_average_precision(*arrays, 10**6, convention='deephash-pytorch') == pytest.approx(mean_average_precision(*arrays), abs=1e-15)


# ---- other measures and the report -----------------------------------------------------------------------------------------------------------

def test_precision_recall_and_radius():
    q, y, d, z = problem(6, multi=True)
    counts, g, distance = distance_counts(q, y, d, z), relevance(y, z), hamming(q, d)
    rng = np.random.default_rng(0)
    shares = np.zeros(len(q))
    for _ in range(400): shares += np.array([row[np.lexsort((rng.random(len(d)), far))[:25]].mean() for row, far in zip(g, distance)])/400
    assert precision_at(counts, 25) == pytest.approx(shares, abs=.02)
    assert precision_within(counts, 4) == pytest.approx([row[far <= 4].mean() if (far <= 4).any() else 0 for row, far in zip(g, distance)])
    ranks, precision, recall = precision_recall(counts)
    assert ranks[0] == 1 and ranks[-1] == 150 and recall[-1] == pytest.approx(1) and (np.diff(recall) > -1e-15).all()
    assert precision[-1] == pytest.approx(g[2:].mean()) and np.isnan(recall_at(counts, 5)[:2]).all()
    with pytest.raises(ValueError, match='no query'): precision_recall(Counts(counts.items, counts.relevant*0))

@pytest.mark.parametrize('multi', [False, True])
def test_report(multi):
    q, y, d, z = problem(9, queries=60, classes=6, multi=multi)
    groups = {'head': [0, 1], 'tail': [4, 5], 'none': []}
    report = retrieval_report(q, y, d, z, groups, k=20, at=10)
    member = y[:, None] == np.arange(6) if not multi else y > 0
    each = np.array([mean_average_precision(q[i:i + 1], y[i:i + 1], d, z, 20) for i in range(60)])
    assert report['AP'] == pytest.approx(each) and report['mAP'] == pytest.approx(each.mean())
    by_class = np.array([each[m].mean() for m in member.T])
    assert report['class AP'] == pytest.approx(by_class) and report['macro mAP'] == pytest.approx(by_class.mean())
    assert report['group mAP']['tail'] == pytest.approx(by_class[4:].mean()) and np.isnan(report['group mAP']['none'])
    assert report['P@10'] == pytest.approx(precision_at(distance_counts(q, y, d, z), 10).mean())


# ---- bad input -------------------------------------------------------------------------------------------------------------------------------

def test_pack():
    v = np.random.default_rng(0).normal(size=(7, 21))
    for same in (v, v.astype(np.float32), v > 0, torch.tensor(v), torch.tensor(v).bfloat16(), np.sign(v).astype(int), torch.tensor(v, requires_grad=True)):
        assert (pack(same) == np.packbits(v > 0, axis=1)).all()
    assert (unpack(pack(v), 21) == np.sign(v)).all()
    with pytest.warns(UserWarning, match='2 of 4 values are exactly 0'): pack([[0., 0., 1., -1.]])
    with warnings.catch_warnings(): warnings.simplefilter('error'); pack(np.eye(3))          # a 0/1 code is no accident
    with pytest.raises(ValueError, match='row 1'): pack([[1., 2.], [math.nan, 1.]])
    for bad in (np.zeros(3), np.zeros((2, 0)), np.array([['a']]), np.zeros((2, 2), complex)):
        with pytest.raises(ValueError, match='shape'): pack(bad)

@pytest.mark.parametrize('change, message', [
    (dict(query_codes=np.zeros((12, 2))), 'use pack'), (dict(db_codes=np.zeros((150, 3), np.uint8)), '2 and 3 bytes'),
    (dict(query_labels=np.zeros(11, int)), '12 codes and 11 labels'), (dict(query_labels=np.zeros(12)), 'integers'),
    (dict(query_labels=np.zeros((12, 5), np.uint8)), 'differ'), (dict(query_labels=np.full((12, 1), 7)), '0 and 1 only'),
    (dict(db_codes=np.zeros((0, 2), np.uint8), db_labels=np.zeros(0, int)), 'at least one'),
    (dict(k=0), 'k is'), (dict(k=2.5), 'k is'), (dict(ties='random'), 'ties is one of'), (dict(denominator='all'), 'denominator is one of'), (dict(empty='drop'), 'empty is one of')])
def test_bad_input_says_what_to_do(change, message):
    arrays = dict(zip(('query_codes', 'query_labels', 'db_codes', 'db_labels'), problem(0)))
    with pytest.raises(ValueError, match=message): mean_average_precision(**{**arrays, **change})

def test_empty_queries():
    q, y, d, z = problem(0)
    y = np.where(np.arange(12) < 3, 99, y)                                    # three queries of a class the database does not have
    whole = mean_average_precision(q, y, d, z)
    assert mean_average_precision(q, y, d, z, empty='skip') == pytest.approx(whole*12/9)
    for ties in ('expected', 'index', 'best'):
        with pytest.raises(ValueError, match='3 of 12 queries'): mean_average_precision(q, y, d, z, ties=ties, empty='error')
    assert mean_average_precision(q, np.full(12, 99), d, z, empty='skip') == 0


# ---- the index -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('bits', [5, 16, 64, 100])
def test_flat_index_orders_ties_by_id(bits, tmp_path):
    rng = np.random.default_rng(bits)
    d, q = pack(rng.normal(size=(2000, bits))), pack(rng.normal(size=(20, bits)))
    index = BinaryIndex(bits)
    for batch in np.array_split(d, 7): index.add(batch)
    assert len(index) == 2000
    distance = hamming(q, d)
    for k in (1, 10, 333, 5000):
        ids = np.argsort(distance, axis=1, kind='stable')[:, :k]
        found = index.search(q, k)
        assert (found[1] == ids).all() and (found[0] == np.take_along_axis(distance, ids, 1)).all()
    again = BinaryIndex.load(index.save(tmp_path/'x.index'))
    assert (again.search(q, 10)[1] == index.search(q, 10)[1]).all() and len(again.add(d)) == 4000

@pytest.mark.parametrize('kind', ['ivf', 'hnsw'])
def test_approximate_indexes_find_most(kind, tmp_path):
    labels = np.random.default_rng(0).integers(0, 50, 4050)
    codes = noisy_codes(labels, 64, .08)
    index = BinaryIndex(64, kind, lists=32, probes=8).add(codes[:4000])
    index = BinaryIndex.load(index.save(tmp_path/'x.index'))
    distances, ids = index.search(codes[4000:], 5)
    assert (labels[ids] == labels[4000:, None]).mean() > .95 and (np.diff(distances) >= 0).all()

def test_index_refuses_what_it_cannot_use(tmp_path):
    with pytest.raises(ValueError, match='kind'): BinaryIndex(64, 'tree')
    with pytest.raises(ValueError, match='empty'): BinaryIndex(64).search(np.zeros((1, 8), np.uint8), 1)
    with pytest.raises(ValueError, match='use pack'): BinaryIndex(64).add(np.zeros((1, 64)))
    with pytest.raises(ValueError, match='fewer lists'): BinaryIndex(64, 'ivf').add(np.zeros((10, 8), np.uint8))
    (tmp_path/'bad').write_bytes(b'not an index at all')
    with pytest.raises(ValueError, match='not a faiss binary index'): BinaryIndex.load(tmp_path/'bad')
    with pytest.raises(FileNotFoundError): BinaryIndex.load(tmp_path/'absent')
