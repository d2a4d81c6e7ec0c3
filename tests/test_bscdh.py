"""Bias suppression: properties of the coefficients, the method's equality with InfoNCE where nothing is suppressed, preset centres."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from lthash.bscdh import LAMBDA_B, coefficients, correction, hardest_first, preset_centres
from lthash.contrastive import Batch, info_nce, make_method

def problem(seed, b=5, m=40, bits=16, centres=16):
    g = torch.Generator().manual_seed(seed)
    unit = lambda *shape: F.normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)
    q, n = unit(b, bits), unit(m, bits)
    c = F.normalize(preset_centres(centres, bits).double(), dim=1)
    return q @ n.T, n @ c.T, (q @ c.T).argmax(1)

def lam(similarity, key_centre, query_centre, share, floor=.7, variant='bounded'):
    return coefficients(similarity, key_centre, key_centre.amax(1), query_centre, share, floor, variant)

def loss_by_hand(positive, similarity, key_centre, query_centre, share, floor, variant, temperature):
    "Formulas (5) to (8) of paper B with python's floats, one query and one negative at a time."
    total = 0.
    for i, row in enumerate(similarity.tolist()):
        order, limit = sorted(range(len(row)), key=lambda n: -row[n]), round(share*len(row))
        denominator = math.exp(positive[i]/temperature)
        for j, n in enumerate(order, start=1):
            l = 1.
            if j <= limit:
                own, to_query = max(key_centre[n].tolist()), key_centre[n][query_centre[i]].item()
                if variant == 'printed': b = min(0., 1 - own/to_query) if to_query > 0 else 0.
                elif variant == 'sign_corrected': b = max(0., own/to_query - 1) if to_query > 0 else math.inf
                elif variant == 'bounded': b = 1 - max(0., to_query)/own
                else: b = 0.
                l = .1*b + (1 - math.exp(-2*j/limit))/10 + floor
                if variant == 'sign_corrected': l = min(1., l)
            denominator += math.exp(l*row[n]/temperature)
        total -= math.log(math.exp(positive[i]/temperature)/denominator)
    return total/len(positive)

@given(seed=st.integers(0, 999), variant=st.sampled_from(LAMBDA_B), share=st.floats(0, 1), floor=st.floats(.3, .9), temperature=st.floats(.1, 1))
@settings(max_examples=60, deadline=None)
def test_loss_is_the_papers(seed, variant, share, floor, temperature):
    similarity, key_centre, query_centre = problem(seed)
    positive = torch.linspace(-.5, .9, len(similarity), dtype=torch.float64)
    found = info_nce(positive, similarity*lam(similarity, key_centre, query_centre, share, floor, variant), temperature)
    assert found.item() == pytest.approx(loss_by_hand(positive.tolist(), similarity, key_centre, query_centre, share, floor, variant, temperature), rel=1e-6)

@given(b=st.integers(1, 6), m=st.integers(1, 60), seed=st.integers(0, 999), wide=st.booleans(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_hardest_first_is_a_sort(b, m, seed, wide, data):
    top = data.draw(st.integers(1, m))
    values = torch.from_numpy(np.random.default_rng(seed).permuted(np.tile(np.linspace(-1, 1, m), (b, 1)), axis=1))     # no ties
    if not wide: values = values.float()
    assert torch.equal(hardest_first(values, top), values.argsort(1, descending=True)[:, :top])
    assert torch.equal(hardest_first(values, top), values.topk(top, dim=1).indices)                                      # what other devices use

@given(seed=st.integers(0, 999), temperature=st.floats(.1, 1), share=st.sampled_from([0., .01]), variant=st.sampled_from(LAMBDA_B))
@settings(max_examples=20, deadline=None)
def test_nothing_suppressed_is_infonce(seed, temperature, share, variant):
    "A range below one negative, or coefficients of 1: the loss is InfoNCE's to the last bit."
    similarity, key_centre, query_centre = problem(seed)
    l = lam(similarity, key_centre, query_centre, share, variant=variant)
    positive = similarity[:, 0]
    assert (l == 1).all() and info_nce(positive, similarity*l, temperature) == info_nce(positive, similarity, temperature)

@given(seed=st.integers(0, 999), variant=st.sampled_from(LAMBDA_B), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_only_the_hardest_are_touched(seed, variant, share):
    similarity, key_centre, query_centre = problem(seed)
    l, top = lam(similarity, key_centre, query_centre, share, variant=variant), round(share*similarity.shape[1])
    rank = (-similarity).argsort(1).argsort(1)
    assert (l[rank >= top] == 1).all()
    if variant in ('bounded', 'none'): assert (l[rank < top] < 1).all()
    if variant != 'printed': assert (l <= 1).all() and (l >= .7).all()

@given(seed=st.integers(0, 999), variant=st.sampled_from(LAMBDA_B))
@settings(max_examples=30, deadline=None)
def test_order_of_the_queue_does_not_matter(seed, variant):
    similarity, key_centre, query_centre = problem(seed)
    order = torch.randperm(similarity.shape[1], generator=torch.Generator().manual_seed(seed))
    a, b = lam(similarity, key_centre, query_centre, .3, variant=variant), lam(similarity[:, order], key_centre[order], query_centre, .3, variant=variant)
    assert torch.equal(a[:, order], b)

@given(seed=st.integers(0, 999))
@settings(max_examples=20, deadline=None)
def test_lambda_grows_with_rank(seed):
    similarity, key_centre, query_centre = problem(seed)
    l = lam(similarity, key_centre, query_centre, .5, variant='none')
    by_rank = l.gather(1, (-similarity).argsort(1))
    assert (by_rank.diff(dim=1) >= 0).all() and (by_rank[:, :20].diff(dim=1) > 0).all()

@given(own=st.floats(.05, 1), share=st.floats(-1, 1))
@settings(max_examples=60, deadline=None)
def test_direction_of_the_correction(own, share):
    "The explanation in the text: away from the query's centre lambda_b rises from 0. The printed formula falls."
    own, to_query = torch.tensor([own]*2, dtype=torch.float64), torch.tensor([own*share, own], dtype=torch.float64)
    for variant in ('sign_corrected', 'bounded'):
        away, at = correction(own, to_query, variant)
        assert at == pytest.approx(0, abs=1e-12) and away >= 0
    away, at = correction(own, to_query, 'printed')
    assert at == pytest.approx(0, abs=1e-12) and away <= 0
    assert (correction(own, to_query, 'bounded') <= .1 + 1e-12).all()

def make_batch(n=12, d=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.randn(n, d, generator=g)
    return Batch(torch.arange(n), f, f + .1*torch.randn(n, d, generator=g), f + .1*torch.randn(n, d, generator=g), 0, 0.)

@pytest.mark.parametrize('options', [dict(share=0.), dict(share=.25, floor=.7)])
def test_training_steps_against_infonce(options):
    "Bit for bit InfoNCE without suppression, through several steps of optimiser, momentum encoder and queue; something else with it."
    ends = []
    for name, more in (('InfoNCE', {}), ('BSCDH', options)):
        net = make_method(name, 20, 16, seed=3, hidden=24, queue=32, momentum=.9, **more)
        optimizer, = net.optimizers(net.recipe)
        for step in range(6):
            torch.manual_seed(step)
            batch = make_batch(seed=step)
            optimizer.zero_grad(); net.loss(batch).backward(); optimizer.step(); net.after_step(batch)
        ends.append(net)
    same = all(torch.equal(p, q) for p, q in zip(ends[0].parameters(), ends[1].parameters())) and torch.equal(ends[0].queue, ends[1].queue)
    assert same == (options['share'] == 0)

def test_keys_stay_beside_their_centres():
    net = make_method('BSCDH', 20, 16, hidden=24, queue=32, centres=8)
    for step in range(5):                                   # 60 keys: the queue wraps around, a batch across its end
        batch = make_batch(seed=step)
        net.loss(batch); net.after_step(batch)
    torch.testing.assert_close(net.key_centre, net.queue @ net.centres.T)
    torch.testing.assert_close(net.nearest, (net.queue @ net.centres.T).amax(1))
    assert net.next == 60 % 32 and (net.queue_index >= 0).all()
    torch.testing.assert_close(net.queue.norm(dim=1), torch.ones(32))

def test_suppression_gives_no_gradient_but_scales_it():
    positive = torch.zeros(2, dtype=torch.float64)
    similarity, key_centre, query_centre = problem(1, b=2)
    similarity.requires_grad_()
    l = lam(similarity.detach(), key_centre, query_centre, .2)
    info_nce(positive, similarity*l).backward()
    logits = torch.cat([positive[:, None], similarity.detach()*l], 1)/.3
    assert torch.allclose(similarity.grad, l*logits.softmax(1)[:, 1:]/.3/2)

@given(bits=st.sampled_from([8, 16, 24, 32, 64]), count=st.integers(2, 200), seed=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_preset_centres(bits, count, seed):
    centres = preset_centres(count, bits, seed)
    assert centres.shape == (count, bits) and (centres.abs() == 1).all() and len(centres.unique(dim=0)) == count
    inner = (centres.int() @ centres.int().T).fill_diagonal_(0)
    if bits & (bits - 1) == 0 and count <= bits: assert (inner == 0).all()                            # all pairs at K/2
    elif bits & (bits - 1) == 0 and count <= 2*bits: assert set(inner.unique().tolist()) == {-bits, 0}   # and opposites

def test_bad_options():
    for options, word in ((dict(variant='six'), 'lambda_b'), (dict(share=1.5), 'share'), (dict(width=3), 'does not take')):
        with pytest.raises(ValueError, match=word): make_method('BSCDH', 20, 16, **options)
