"Measures of codes against brute force and other libraries; forms of codes; bad input."
import numpy as np
import pytest
import torch
from sklearn.metrics import ndcg_score

from lthash.evaluation.hamming import Counts, distance_counts, pack, unpack
from lthash.evaluation.metrics import (
    CONVENTIONS,
    mean_average_precision,
    ndcg,
    precision_at,
    precision_recall,
    precision_within,
    recall_at,
    retrieval_report,
    shared_ndcg,
)

DENOMINATORS = ('retrieved', 'min', 'total')


# ---- mean average precision ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('k', [None, 1, 17, 100])
@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('denominator', DENOMINATORS)
def test_database_order_is_a_stable_sort(ref, k, multi, denominator):
    q, y, d, z = ref.problem(3, multi=multi)
    order = np.argsort(ref.distances(q, d), axis=1, kind='stable')
    g = np.take_along_axis(ref.relevance(y, z), order, 1).astype(int)
    values = [ref.ap(list(map(int, row)), k or len(d), denominator) for row in g]
    zero, skip = [float(v or 0) for v in values], [float(v) for v in values if v is not None]
    found = mean_average_precision(q, y, d, z, k, 'index', denominator)
    assert found == pytest.approx(np.mean(zero), abs=1e-13)
    found = mean_average_precision(q, y, d, z, k, 'index', denominator, 'skip')
    assert found == pytest.approx(np.mean(skip), abs=1e-13)


@pytest.mark.parametrize('k', [1, 20, 149, None])
def test_expectation_is_the_mean_over_shuffles(ref, k):
    q, y, d, z = ref.problem(5)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        order = rng.permutation(len(d))
        values.append(mean_average_precision(q, y, d[order], z[order], k, 'index'))
    low, expected, high = (mean_average_precision(q, y, d, z, k, t) for t in ('worst', 'expected', 'best'))
    assert low - 1e-12 <= min(values) and max(values) <= high + 1e-12
    assert abs(np.mean(values) - expected) < 4.5*np.std(values)/300**.5


def test_denominators_agree_at_all_ranks_and_k_is_clipped(ref):
    arrays = ref.problem(1)
    values = [mean_average_precision(*arrays, k, denominator=D) for D in DENOMINATORS for k in (None, -1, 150, 10**6)]
    assert np.ptp(values) < 1e-14
    retrieved, least, total = (mean_average_precision(*arrays, 10, denominator=D) for D in DENOMINATORS)
    assert total < least < retrieved


def test_equal_codes_have_the_class_frequency_as_precision():
    "Codes that are all equal: one level; expected precision is the class's frequency at every rank."
    z = np.repeat([0, 1], [300, 700])
    codes = np.zeros((1000, 4), np.uint8)
    counts = distance_counts(codes[:2], np.array([0, 1]), codes, z)
    assert precision_at(counts, 17) == pytest.approx([.3, .7]) and recall_at(counts, 100) == pytest.approx([.1, .1])
    assert mean_average_precision(codes[:2], np.array([0, 1]), codes, z, ties='best') == 1


def test_empty_queries(ref):
    q, y, d, z = ref.problem(0)
    y = np.where(np.arange(12) < 3, 99, y)                        # three queries of a class the database does not have
    whole = mean_average_precision(q, y, d, z)
    assert mean_average_precision(q, y, d, z, empty='skip') == pytest.approx(whole*12/9)
    for ties in ('expected', 'index', 'best'):
        with pytest.raises(ValueError, match='3 of 12 queries'):
            mean_average_precision(q, y, d, z, ties=ties, empty='error')
    assert mean_average_precision(q, np.full(12, 99), d, z, empty='skip') == 0


# ---- codes packed or not ---------------------------------------------------------------------------------------------

FORMS = {
    'packed': lambda s: pack(s),
    'packed torch': lambda s: torch.from_numpy(pack(s)),
    '+-1 int8': lambda s: s,
    '+-1 int64 torch': lambda s: torch.from_numpy(s).long(),
    '+-1 float32': lambda s: s.astype(np.float32),
    'bool': lambda s: s > 0,
    'bool torch': lambda s: torch.from_numpy(s) > 0,
    '0/1 int': lambda s: (s > 0).astype(int),
    'real values': lambda s: s*np.random.default_rng(1).uniform(.1, 3, s.shape),
    'bfloat16': lambda s: torch.from_numpy(s).bfloat16().requires_grad_(),
}

@pytest.mark.parametrize('bits', [16, 21])
@pytest.mark.parametrize('form', FORMS)
def test_every_form_of_the_codes_gives_the_same_value(ref, form, bits):
    q, y, d, z = ref.problem(3, bits=bits, multi=True)
    other, back = FORMS[form](unpack(q, bits)), FORMS[form](unpack(d, bits))
    conventions = [{'convention': name} for name in CONVENTIONS]
    for options in ({}, {'k': 20, 'ties': 'index'}, {'k': 9, 'ties': 'worst'}, *conventions):
        expected = mean_average_precision(q, y, d, z, **options)
        assert mean_average_precision(other, y, back, z, **options) == expected
        assert mean_average_precision(other, y, d, z, **options) == expected        # one packed, one not
    assert (shared_ndcg(other, y, back, z) == shared_ndcg(q, y, d, z)).all()
    expected, found = retrieval_report(q, y, d, z), retrieval_report(other, y, back, z)
    assert found['mAP'] == expected['mAP'] and found['nDCG'] == expected['nDCG']
    assert (found['AP'] == expected['AP']).all()


def test_codes_on_the_gpu_in_every_form(ref):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    q, y, d, z = ref.problem(3)
    on_gpu = [torch.as_tensor(a).cuda() for a in (unpack(q, 16), y, unpack(d, 16), z)]
    assert mean_average_precision(*on_gpu) == mean_average_precision(q, y, d, z)


# ---- other measures and the report -----------------------------------------------------------------------------------

@pytest.mark.parametrize('k', [1, 10, None])
def test_ndcg_is_scikit_learns(ref, k):
    q, y, d, z = ref.problem(2)
    near = -ref.distances(q, d).astype(float)
    expected = ndcg_score(ref.relevance(y, z).astype(int), near, k=k)
    assert ndcg(distance_counts(q, y, d, z), k).mean() == pytest.approx(expected, abs=1e-12)
    q, y, d, z = ref.problem(2, multi=True)
    near, gains = -ref.distances(q, d).astype(float), y.astype(int) @ z.T.astype(int)
    expected = ndcg_score(gains[2:], near[2:], k=k)
    assert shared_ndcg(q, y, d, z, k)[2:].mean() == pytest.approx(expected, abs=1e-12)


def test_precision_recall_and_radius(ref):
    q, y, d, z = ref.problem(6, multi=True)
    counts, g, distance = distance_counts(q, y, d, z), ref.relevance(y, z), ref.distances(q, d)
    rng = np.random.default_rng(0)
    precision = np.zeros(len(q))
    for _ in range(400):
        nearest = [np.lexsort((rng.random(len(d)), far))[:25] for far in distance]
        precision += np.array([row[top].mean() for row, top in zip(g, nearest)])/400
    assert precision_at(counts, 25) == pytest.approx(precision, abs=.02)
    within = [row[far <= 4].mean() if (far <= 4).any() else 0 for row, far in zip(g, distance)]
    assert precision_within(counts, 4) == pytest.approx(within)
    ranks, precision, recall = precision_recall(counts)
    assert ranks[0] == 1 and ranks[-1] == 150 and recall[-1] == pytest.approx(1) and (np.diff(recall) > -1e-15).all()
    assert precision[-1] == pytest.approx(g[2:].mean()) and np.isnan(recall_at(counts, 5)[:2]).all()
    with pytest.raises(ValueError, match='no query'):
        precision_recall(Counts(counts.items, counts.relevant*0))


@pytest.mark.parametrize('multi', [False, True])
def test_report(ref, multi):
    q, y, d, z = ref.problem(9, queries=60, classes=6, multi=multi)
    groups = {'head': [0, 1], 'tail': [4, 5], 'none': []}
    report = retrieval_report(q, y, d, z, groups, k=20, at=10)
    member = y[:, None] == np.arange(6) if not multi else y > 0
    each = np.array([mean_average_precision(q[i:i + 1], y[i:i + 1], d, z, 20) for i in range(60)])
    assert report['AP'] == pytest.approx(each) and report['mAP'] == pytest.approx(each.mean())
    by_class = np.array([each[m].mean() for m in member.T])
    assert report['class AP'] == pytest.approx(by_class) and report['macro mAP'] == pytest.approx(by_class.mean())
    assert report['group mAP']['tail'] == pytest.approx(by_class[4:].mean()) and np.isnan(report['group mAP']['none'])
    assert report['P@10'] == pytest.approx(precision_at(distance_counts(q, y, d, z), 10).mean())


# ---- bad input -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, message', [
    (dict(query_codes=np.zeros((12, 2))), 'codes of 1 and 2 bytes'),
    (dict(query_codes=np.zeros(12)), r'found shape \(12,\) of float64'),
    (dict(query_codes=np.zeros(12, np.uint8)), r'query codes are packed bytes.*found \(12,\) uint8'),
    (dict(query_codes=np.ones((12, 16), np.uint8)), 'codes of 16 and 2 bytes.*as bool'),
    (dict(query_codes=np.full((12, 16), np.nan)), '12 of 12 rows hold NaN'),
    (dict(db_codes=np.zeros((150, 3), np.uint8)), '2 and 3 bytes'),
    (dict(query_labels=np.zeros(11, int)), '12 codes and 11 labels'),
    (dict(query_labels=np.zeros(12)), 'integers'),
    (dict(query_labels=np.zeros((12, 5), np.uint8)), 'differ'),
    (dict(query_labels=np.full((12, 1), 7)), '0 and 1 only'),
    (dict(db_codes=np.zeros((0, 2), np.uint8), db_labels=np.zeros(0, int)), 'at least one'),
    (dict(k=0), 'k is'),
    (dict(k=2.5), 'k is'),
    (dict(ties='random'), 'ties is one of'),
    (dict(denominator='all'), 'denominator is one of'),
    (dict(denominator='all', ties='index'), 'denominator is one of'),
    (dict(empty='drop'), 'empty is one of'),
    (dict(convention='nobody'), 'convention is one of orthohash'),
])
def test_bad_input_says_what_to_do(ref, change, message):
    arrays = dict(zip(('query_codes', 'query_labels', 'db_codes', 'db_labels'), ref.problem(0)))
    with pytest.raises(ValueError, match=message):
        mean_average_precision(**{**arrays, **change})
