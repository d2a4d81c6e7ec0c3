"The mAP routines of public repositories, re-implemented from their description, against their conventions."
import numpy as np
import pytest
import torch

from lthash.evaluation.conventions import convention_interval
from lthash.evaluation.hamming import unpack
from lthash.evaluation.metrics import CONVENTIONS, mean_average_precision

# Each routine takes +-1 float codes and multi-hot labels, as the originals do.

def overlap(row, labels):
    return (labels @ row) > 0


def sum_of_precisions(hit):
    return np.sum(np.cumsum(hit)/np.arange(1, len(hit) + 1)*hit)


def orthohash(q, y, d, z, k):
    distances = .5*(q.shape[1] - torch.tensor(q) @ torch.tensor(d).T)
    top = torch.topk(distances, k, dim=1, largest=False)[1].numpy()
    values = []
    for i in range(len(q)):
        hit = overlap(y[i], z[top[i]])
        values.append(sum_of_precisions(hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)


def csq(q, y, d, z, k):
    order, values = np.argsort(-np.dot(d, q.T), axis=0), []
    for i in range(len(q)):
        if y[i].sum() == 0:
            continue
        hit = overlap(y[i], z[order[:k, i]])
        values.append(sum_of_precisions(hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)


def hashnet(q, y, d, z, k):
    order, values = np.argsort(-np.dot(d, q.T), axis=0), []
    for i in range(len(q)):
        hit = overlap(y[i], z[order[:k, i]])
        if hit.sum():
            values.append(sum_of_precisions(hit)/hit.sum())
    return np.mean(values)


def deephash(q, y, d, z, k):
    total = 0.
    for i in range(len(q)):
        order = np.argsort(.5*(q.shape[1] - np.dot(q[i], d.T)))
        hit = overlap(y[i], z)[order][0:k]         # k = -1 leaves out the last
        if hit.sum():
            total += np.mean(np.arange(1, hit.sum() + 1)/(np.flatnonzero(hit) + 1.))
    return total/len(q)


def tbh(q, y, d, z, k):
    bits, other = (q + 1)/2, (d + 1)/2
    order, total, used = np.argsort(np.abs(bits @ (other - 1).T + (bits - 1) @ other.T)), 0., 0
    for i in range(len(q)):
        found, precision = 0, 0.
        for rank in range(k):
            if overlap(y[i], z[order[i, rank]][None])[0]:
                found += 1
                precision += found/(rank + 1)
        if found:
            total += precision/found
            used += 1
    return total/used


def ssdh(q, y, d, z, k):
    values = []
    for i in range(len(q)):
        hit = overlap(y[i], z[np.lexsort((np.arange(len(d)), -(d @ q[i])))[:k]])
        values.append(sum_of_precisions(hit)/hit.sum() if hit.sum() else 0.)
    return np.mean(values)


def metric_learning(q, y, d, z, k):
    values = []
    for i in range(len(q)):
        relevant = overlap(y[i], z)
        if relevant.sum():
            values.append(sum_of_precisions(relevant[np.argsort(-(d @ q[i]))[:k]])/relevant.sum())
    return np.mean(values)


ROUTINES = {'orthohash': orthohash, 'csq': csq, 'hashnet': hashnet, 'deephash-pytorch': deephash, 'cibhash': deephash,
            'tbh': tbh, 'ssdh': ssdh, 'pytorch-metric-learning': metric_learning}


def as_originals(q, y, d, z):
    "+-1 in float32 and multi-hot labels."
    def hot(labels):
        return labels.astype(float) if y.ndim == 2 else np.eye(max(y.max(), z.max()) + 1)[labels]
    return unpack(q, 8*q.shape[1]).astype(np.float32), hot(y), unpack(d, 8*d.shape[1]).astype(np.float32), hot(z)


def test_every_convention_is_held_to_a_routine():
    assert set(ROUTINES) | {'torchmetrics'} == set(CONVENTIONS)


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', ROUTINES)
def test_convention_equals_its_routine_without_ties(ref, name, multi):
    arrays = ref.without_ties(multi)
    for k in (3, 5, 41):
        theirs = ROUTINES[name](*as_originals(*arrays), k)
        assert theirs == pytest.approx(mean_average_precision(*arrays, k, convention=name), abs=1e-12), k
    if CONVENTIONS[name].minus_one == 'drop last':
        theirs = deephash(*as_originals(*arrays), -1)
        assert theirs == pytest.approx(mean_average_precision(*arrays, -1, convention=name), abs=1e-12)


@pytest.mark.parametrize('multi', [False, True])
@pytest.mark.parametrize('name', ROUTINES)
def test_convention_interval_holds_its_routine_on_shuffled_databases(ref, name, multi):
    q, y, d, z = ref.problem(7, bits=8, noise=.35, classes=12, items=60, multi=multi)
    rng = np.random.default_rng(0)
    for k in (3, 20, 60) + ((-1,) if CONVENTIONS[name].minus_one == 'drop last' else ()):
        values = []
        for _ in range(25):
            order = rng.permutation(60)
            values.append(ROUTINES[name](*as_originals(q, y, d[order], z[order]), k))
            if name == 'ssdh':
                ours = mean_average_precision(q, y, d[order], z[order], k, convention=name)
                assert values[-1] == pytest.approx(ours, abs=1e-12)
        interval = convention_interval(name, q, y, d, z, k)
        if name == 'ssdh':
            assert interval.worst == interval.expected == interval.best
            continue
        assert interval.worst - 1e-12 <= min(values) and max(values) <= interval.best + 1e-12
        assert interval.worst <= interval.expected <= interval.best
        assert abs(np.mean(values) - interval.expected) < 6*np.std(values)/5 + 1e-12
        assert interval == convention_interval(name, unpack(q, 8), y, unpack(d, 8), z, k)


@pytest.mark.parametrize('k', [3, 40, None])
def test_torchmetrics_is_inside_its_interval_and_equal_without_ties(ref, k):
    from torchmetrics.retrieval import RetrievalMAP
    def theirs(q, y, d, z):
        scores = torch.tensor(8*q.shape[1] + 1 - ref.distances(q, d)).float()
        target, queries = torch.tensor(ref.relevance(y, z)), torch.arange(len(q)).repeat_interleave(len(d))
        return float(RetrievalMAP(top_k=k)(scores.flatten(), target.flatten(), indexes=queries))
    arrays = ref.problem(4)
    interval = convention_interval('torchmetrics', *arrays, k)
    assert interval.worst - 1e-6 < theirs(*arrays) < interval.best + 1e-6
    arrays = ref.without_ties()
    assert theirs(*arrays) == pytest.approx(mean_average_precision(*arrays, k, convention='torchmetrics'), abs=1e-6)


def test_conventions_fail_where_their_routines_fail(ref):
    arrays = ref.problem(0)
    for name in ('orthohash', 'csq', 'hashnet', 'tbh'):
        for k in (151, -1):
            with pytest.raises(ValueError, match='fails'):
                mean_average_precision(*arrays, k, convention=name)
            with pytest.raises(ValueError, match='fails'):
                convention_interval(name, *arrays, k)
    clipped = mean_average_precision(*arrays, 10**6, convention='deephash-pytorch')
    assert clipped == pytest.approx(mean_average_precision(*arrays), abs=1e-15)
