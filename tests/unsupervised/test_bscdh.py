"Bias suppression: the coefficients, equality with InfoNCE where nothing is suppressed, preset centres."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.unsupervised.base import Batch, make_method
from lthash.unsupervised.bscdh import BSCDH, LAMBDA_B, coefficients, correction, hardest_first, preset_centres
from lthash.unsupervised.contrastive import InfoNCE, info_nce

READINGS = tuple(LAMBDA_B)


def problem(seed, b=5, m=40, bits=16, centres=16):
    g = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)

    q, n = unit(b, bits), unit(m, bits)
    c = F.normalize(preset_centres(centres, bits).double(), dim=1)
    return q @ n.T, n @ c.T, (q @ c.T).argmax(1)


def lam(similarity, key_centre, query_centre, suppressed, hp_s=.7, lambda_b='bounded'):
    return coefficients(similarity, key_centre, key_centre.amax(1), query_centre, suppressed, hp_s, lambda_b)


def lambda_b_by_hand(own, to_query, lambda_b):
    if lambda_b == 'printed':
        return .1*min(0., 1 - own/to_query) if to_query > 0 else 0.
    if lambda_b == 'sign_corrected':
        return .1*max(0., own/to_query - 1) if to_query > 0 else math.inf
    return .1*(1 - max(0., to_query)/own) if lambda_b == 'bounded' else 0.


def loss_by_hand(positive, similarity, key_centre, query_centre, suppressed, hp_s, lambda_b, temperature):
    "Formulas (5) to (8) of paper B with python's floats, one query and one negative at a time."
    total = 0.
    for i, row in enumerate(similarity.tolist()):
        order, limit = sorted(range(len(row)), key=lambda n: -row[n]), round(suppressed*len(row))
        denominator = math.exp(positive[i]/temperature)
        for j, n in enumerate(order, start=1):
            coefficient = 1.
            if j <= limit:
                b = lambda_b_by_hand(max(key_centre[n].tolist()), key_centre[n][query_centre[i]].item(), lambda_b)
                coefficient = b + (1 - math.exp(-2*j/limit))/10 + hp_s
                if lambda_b == 'sign_corrected':
                    coefficient = min(1., coefficient)
            denominator += math.exp(coefficient*row[n]/temperature)
        total -= math.log(math.exp(positive[i]/temperature)/denominator)
    return total/len(positive)


@given(seed=st.integers(0, 999), lambda_b=st.sampled_from(READINGS), suppressed=st.floats(0, 1),
       hp_s=st.floats(.3, .9), temperature=st.floats(.1, 1))
@settings(max_examples=60, deadline=None)
def test_loss_is_the_papers(seed, lambda_b, suppressed, hp_s, temperature):
    similarity, key_centre, query_centre = problem(seed)
    positive = torch.linspace(-.5, .9, len(similarity), dtype=torch.float64)
    coefficient = lam(similarity, key_centre, query_centre, suppressed, hp_s, lambda_b)
    expected = loss_by_hand(positive.tolist(), similarity, key_centre, query_centre, suppressed, hp_s, lambda_b,
                            temperature)
    assert info_nce(positive, similarity*coefficient, temperature).item() == pytest.approx(expected, rel=1e-6)


@given(b=st.integers(1, 6), m=st.integers(1, 60), seed=st.integers(0, 999), wide=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_hardest_first_is_a_sort(b, m, seed, wide, data):
    top = data.draw(st.integers(1, m))
    distinct = np.tile(np.linspace(-1, 1, m), (b, 1))                                         # no ties
    values = torch.from_numpy(np.random.default_rng(seed).permuted(distinct, axis=1))
    values = values if wide else values.float()
    assert torch.equal(hardest_first(values, top), values.argsort(1, descending=True)[:, :top])
    assert torch.equal(hardest_first(values, top), values.topk(top, dim=1).indices)           # what other devices use


@given(seed=st.integers(0, 999), temperature=st.floats(.1, 1), suppressed=st.sampled_from([0., .01]),
       lambda_b=st.sampled_from(READINGS))
@settings(max_examples=20, deadline=None)
def test_nothing_suppressed_is_infonce(seed, temperature, suppressed, lambda_b):
    "A range below one negative: the loss is InfoNCE's to the last bit."
    similarity, key_centre, query_centre = problem(seed)
    coefficient = lam(similarity, key_centre, query_centre, suppressed, lambda_b=lambda_b)
    positive = similarity[:, 0]
    assert (coefficient == 1).all()
    assert info_nce(positive, similarity*coefficient, temperature) == info_nce(positive, similarity, temperature)


@given(seed=st.integers(0, 999), lambda_b=st.sampled_from(READINGS), suppressed=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_only_the_hardest_are_touched(seed, lambda_b, suppressed):
    similarity, key_centre, query_centre = problem(seed)
    coefficient = lam(similarity, key_centre, query_centre, suppressed, lambda_b=lambda_b)
    rank, top = (-similarity).argsort(1).argsort(1), round(suppressed*similarity.shape[1])
    assert (coefficient[rank >= top] == 1).all()
    if lambda_b in ('bounded', 'none'):
        assert (coefficient[rank < top] < 1).all()
    if lambda_b != 'printed':
        assert (coefficient <= 1).all() and (coefficient >= .7).all()


@given(seed=st.integers(0, 999), lambda_b=st.sampled_from(READINGS))
@settings(max_examples=30, deadline=None)
def test_order_of_the_queue_does_not_matter(seed, lambda_b):
    similarity, key_centre, query_centre = problem(seed)
    order = torch.randperm(similarity.shape[1], generator=torch.Generator().manual_seed(seed))
    a = lam(similarity, key_centre, query_centre, .3, lambda_b=lambda_b)
    b = lam(similarity[:, order], key_centre[order], query_centre, .3, lambda_b=lambda_b)
    assert torch.equal(a[:, order], b)


@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_lambda_grows_with_rank(seed):
    similarity, key_centre, query_centre = problem(seed)
    coefficient = lam(similarity, key_centre, query_centre, .5, lambda_b='none')
    by_rank = coefficient.gather(1, (-similarity).argsort(1))
    assert (by_rank.diff(dim=1) >= 0).all() and (by_rank[:, :20].diff(dim=1) > 0).all()


@given(own=st.floats(.05, 1), ratio=st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_direction_of_the_correction(own, ratio):
    "The explanation in the text: away from the query's centre lambda_b rises from 0. The printed formula falls."
    to_query = torch.tensor([own*ratio, own], dtype=torch.float64)
    own = torch.tensor([own]*2, dtype=torch.float64)
    for lambda_b in ('sign_corrected', 'bounded'):
        away, at = correction(own, to_query, lambda_b)
        assert at == pytest.approx(0, abs=1e-12) and away >= 0
    away, at = correction(own, to_query, 'printed')
    assert at == pytest.approx(0, abs=1e-12) and away <= 0
    assert (correction(own, to_query, 'bounded') <= .1 + 1e-12).all()


def make_batch(n=12, d=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=g)
    first, second = (f + .1*torch.randn(n, d, generator=g) for _ in range(2))
    return Batch(torch.arange(n), f, first, second, 0, 0.)


@pytest.mark.parametrize('options', [dict(suppressed=0.), dict(suppressed=.25, hp_s=.7)])
def test_training_steps_against_infonce(options):
    "Bit for bit InfoNCE without suppression, through steps of optimiser, momentum encoder and queue; else not."
    ends = []
    for kind, more in ((InfoNCE, {}), (BSCDH, options)):
        net = make_method(kind, 20, 16, seed=3, hidden=24, queue=32, momentum=.9, **more)
        optimizer, = net.optimizers(net.recipe)
        for step in range(6):
            torch.manual_seed(step)
            batch = make_batch(seed=step)
            optimizer.zero_grad()
            net.loss(batch).backward()
            optimizer.step()
            net.after_step(batch)
        ends.append(net)
    same = all(torch.equal(p, q) for p, q in zip(ends[0].parameters(), ends[1].parameters()))
    assert (same and torch.equal(ends[0].queue, ends[1].queue)) == (options['suppressed'] == 0)


def test_keys_stay_beside_their_centres():
    net = make_method(BSCDH, 20, 16, hidden=24, queue=32, centres=8)
    for step in range(5):                                   # 60 keys: the queue wraps around, a batch across its end
        batch = make_batch(seed=step)
        net.loss(batch)
        net.after_step(batch)
    torch.testing.assert_close(net.key_centre, net.queue @ net.centres.T)
    torch.testing.assert_close(net.nearest, (net.queue @ net.centres.T).amax(1))
    assert net.next == 60 % 32 and (net.queue_index >= 0).all()
    torch.testing.assert_close(net.queue.norm(dim=1), torch.ones(32))


def test_suppression_gives_no_gradient_but_scales_it():
    positive = torch.zeros(2, dtype=torch.float64)
    similarity, key_centre, query_centre = problem(1, b=2)
    similarity.requires_grad_()
    coefficient = lam(similarity.detach(), key_centre, query_centre, .2)
    info_nce(positive, similarity*coefficient).backward()
    logits = torch.cat([positive[:, None], similarity.detach()*coefficient], 1)/.3
    assert torch.allclose(similarity.grad, coefficient*logits.softmax(1)[:, 1:]/.3/2)


@given(bits=st.sampled_from([8, 16, 24, 32, 64]), count=st.integers(2, 200), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_preset_centres(bits, count, seed):
    centres = preset_centres(count, bits, seed)
    assert centres.shape == (count, bits) and (centres.abs() == 1).all() and len(centres.unique(dim=0)) == count
    inner = (centres.int() @ centres.int().T).fill_diagonal_(0)
    hadamard = bits & (bits - 1) == 0
    if hadamard and count <= bits:                           # all pairs at K/2
        assert (inner == 0).all()
    elif hadamard and count <= 2*bits:                       # and opposites
        assert set(inner.unique().tolist()) == {-bits, 0}


@pytest.mark.parametrize('options,word', [(dict(lambda_b='six'), 'lambda_b'), (dict(suppressed=1.5), 'suppressed'),
                                          (dict(width=3), 'does not take')])
def test_bad_options(options, word):
    with pytest.raises(ValueError, match=word):
        make_method(BSCDH, 20, 16, **options)
