"Contrastive losses against independent formulations, the queue and the momentum encoder."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Bernoulli, kl_divergence

from lthash.unsupervised.base import Batch, make_method
from lthash.unsupervised.bscdh import BSCDH
from lthash.unsupervised.contrastive import InfoNCE, bernoulli_kl, debiased, info_nce, nt_xent, straight_through


@given(b=st.integers(1, 6), m=st.integers(1, 30), temperature=st.floats(.1, 2), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_info_nce_and_debiased_by_hand(b, m, temperature, seed):
    rng = np.random.default_rng(seed)
    pos, neg, prior = rng.uniform(-1, 1, b), rng.uniform(-1, 1, (b, m)), rng.uniform(0, .3)
    plain = corrected = 0
    for i in range(b):
        p, n = math.exp(pos[i]/temperature), [math.exp(x/temperature) for x in neg[i]]
        plain -= math.log(p/(p + sum(n)))/b
        corrected -= math.log(p/(p + max((sum(n) - m*prior*p)/(1 - prior), m*math.exp(-1/temperature))))/b
    pos, neg = torch.from_numpy(pos), torch.from_numpy(neg)
    assert info_nce(pos, neg, temperature).item() == pytest.approx(plain, rel=1e-9)
    assert debiased(pos, neg, temperature, prior).item() == pytest.approx(corrected, rel=1e-9)
    assert debiased(pos, neg, temperature, 0.).item() == pytest.approx(plain, rel=1e-9)


@given(n=st.integers(1, 6), k=st.integers(2, 12), temperature=st.floats(.1, 2), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_nt_xent_and_kl_by_hand(n, k, temperature, seed):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(2*n, k))

    def weight(i, j):
        return math.exp(z[i] @ z[j]/np.linalg.norm(z[i])/np.linalg.norm(z[j])/temperature)

    total = -sum(math.log(weight(i, (i + n) % (2*n))/sum(weight(i, j) for j in range(2*n) if j != i))
                 for i in range(2*n))
    found = nt_xent(torch.from_numpy(z[:n]), torch.from_numpy(z[n:]), temperature)
    assert found.item() == pytest.approx(total/(2*n), rel=1e-9, abs=1e-12)
    p, q = torch.from_numpy(rng.uniform(.01, .99, (2, n, k)))
    other = kl_divergence(Bernoulli(p), Bernoulli(q)).sum(1).mean()
    assert bernoulli_kl(p, q).item() == pytest.approx(other.item(), rel=1e-5)


def test_straight_through():
    p = torch.tensor([.2, .5, .8], requires_grad=True)
    (straight_through(p)*torch.tensor([1., 2., 3.])).sum().backward()
    assert p.grad.tolist() == [1, 2, 3] and straight_through(p).tolist() == [-1, -1, 1]


@pytest.mark.parametrize('batch', [8, 10, 24])
def test_queue_is_first_in_first_out(batch):
    net = make_method(InfoNCE, 12, 8, hidden=16, queue=24, momentum=.5)
    seen = []
    for step in range(7):
        f = torch.randn(batch, 12)
        b = Batch(torch.arange(step*batch, (step + 1)*batch), f, f, f, step, 0.)
        net.loss(b)
        seen += list(zip(b.index.tolist(), net.latest.clone()))
        net.after_step(b)
    kept = dict(seen[-24:])
    assert sorted(net.queue_index.tolist()) == sorted(kept)
    for i, key in zip(net.queue_index.tolist(), net.queue):
        assert torch.equal(key, kept[i])


def test_key_encoder_follows_slowly():
    net = make_method(InfoNCE, 12, 8, hidden=16, queue=24, momentum=.75)
    before = [p.clone() for p in net.key_head.parameters()]
    with torch.no_grad():
        for p in net.head.parameters():
            p.add_(1)
    f = torch.randn(8, 12)
    b = Batch(torch.arange(8), f, f, f, 0, 0.)
    net.loss(b)
    net.after_step(b)
    for p, q in zip(net.key_head.parameters(), before):
        torch.testing.assert_close(p, q + .25)
    assert not any(p.requires_grad for p in net.key_head.parameters())


def test_all_processes_have_one_queue():
    "Two processes of half a batch, with a `gather` that joins them, end with the queue of one process."
    whole, *halves = (make_method(InfoNCE, 12, 8, hidden=16, queue=24, dropout=0.) for _ in range(3))
    for step in range(5):
        f, g = torch.randn(2, 8, 12)
        batches = [Batch(torch.arange(8)[r::w] + 8*step, f[r::w], f[r::w], g[r::w], step, 0.)
                   for r, w in ((0, 1), (0, 2), (1, 2))]
        for net, b in zip((whole, *halves), batches):
            net.loss(b)
        keys, index = torch.cat([h.latest for h in halves]), torch.cat([b.index for b in batches[1:]])
        for h, b in zip(halves, batches[1:]):
            h.gather = lambda x, keys=keys, index=index: index if x.dtype == torch.int64 else keys
            h.after_step(b)
        whole.after_step(batches[0])
    assert torch.equal(halves[0].queue, halves[1].queue)
    assert sorted(halves[0].queue_index.tolist()) == sorted(whole.queue_index.tolist())
    one, other = (net.queue[net.queue_index.argsort()] for net in (halves[0], whole))
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize('kind', [InfoNCE, BSCDH])
def test_false_negatives_are_counted(kind, small):
    "A queue of half the images, half of them of the query's class: all fractions by hand."
    data = small(classes=2)
    net = make_method(kind, 12, 8, hidden=16, queue=24)
    net.enqueue(torch.nn.functional.normalize(net.key_head(data.clean_train()[:24]), dim=1), torch.arange(24))
    found = net.false_negatives(data, queries=60)
    labels = data.labels[:60]
    same = (labels[:, None] == labels[:24]).float()
    own = torch.arange(60)[:, None] == torch.arange(24)
    assert found['base rate'] == pytest.approx((same[~own].mean()).item(), abs=1e-6)
    assert 0 <= found['false negatives'] <= 1
    assert ('lambda false' in found) == (kind is BSCDH) and net.training
