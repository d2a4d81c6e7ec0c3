"""Contrastive hashing: losses against independent formulations, the queue and the momentum encoder, views and their store, training that is killed and resumed."""
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torchvision.transforms.v2 import functional as V

from lthash import contrastive, datasets, views
from lthash.contrastive import (Batch, CodeTrial, Method, bernoulli_kl, code_rows, debiased, encode_features, info_nce, make_method, method_class, nt_xent,
                                run_code_trial, straight_through, train_codes, train_code_trial, trained_method, trial_recipe)
from lthash.training import Recipe
from lthash.views import Features, Setting

def small(m=60, views_each=3, d=12, classes=4, seed=0):
    "A made-up feature store: classes are directions, the last images are validation."
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, classes, m + 20))
    clean = torch.from_numpy(rng.normal(size=(classes, d))[labels] + .5*rng.normal(size=(m + 20, d))).half()
    drawn = (clean[:m, None].float() + .3*torch.from_numpy(rng.normal(size=(m, views_each, d))).float()).half()
    split = datasets.Split('paper', torch.arange(m), torch.arange(m, m + 10), torch.arange(m + 10, m + 20), torch.arange(m), 'made-up')
    return Features(Setting(), split, torch.arange(m), clean, drawn, labels, tuple('abcd'))

OPTIONS = {'CIBH': dict(hidden=16), 'InfoNCE': dict(hidden=16, queue=24), 'DCL': dict(hidden=16, queue=24), 'BSCDH': dict(hidden=16, queue=24, share=.25)}
RECIPE = Recipe(passes=8*40, batch=8, optimizer='sgd', rate=.01, schedule='constant')

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
    cosine = lambda a, b: a @ b/np.linalg.norm(a)/np.linalg.norm(b)
    total = 0
    for i in range(2*n):
        total -= math.log(math.exp(cosine(z[i], z[(i + n) % (2*n)])/temperature)/sum(math.exp(cosine(z[i], z[j])/temperature) for j in range(2*n) if j != i))
    assert nt_xent(torch.from_numpy(z[:n]), torch.from_numpy(z[n:]), temperature).item() == pytest.approx(total/(2*n), rel=1e-9)
    p, q = torch.from_numpy(rng.uniform(.01, .99, (2, n, k)))
    other = torch.distributions.kl_divergence(torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(q)).sum(1).mean()
    assert bernoulli_kl(p, q).item() == pytest.approx(other.item(), rel=1e-5)

def test_straight_through():
    p = torch.tensor([.2, .5, .8], requires_grad=True)
    (straight_through(p)*torch.tensor([1., 2., 3.])).sum().backward()
    assert p.grad.tolist() == [1, 2, 3] and straight_through(p).tolist() == [-1, -1, 1]

@pytest.mark.parametrize('batch', [8, 10, 24])
def test_queue_is_first_in_first_out(batch):
    net = make_method('InfoNCE', 12, 8, hidden=16, queue=24, momentum=.5)
    seen = []
    for step in range(7):
        f = torch.randn(batch, 12)
        b = Batch(torch.arange(step*batch, (step + 1)*batch), f, f, f, step, 0.)
        net.loss(b)
        seen += list(zip(b.index.tolist(), net.latest.clone()))
        net.after_step(b)
    kept = dict(seen[-24:])
    assert sorted(net.queue_index.tolist()) == sorted(kept)
    for i, key in zip(net.queue_index.tolist(), net.queue): assert torch.equal(key, kept[i])

def test_key_encoder_follows_slowly():
    net = make_method('InfoNCE', 12, 8, hidden=16, queue=24, momentum=.75)
    before = [p.clone() for p in net.key_head.parameters()]
    with torch.no_grad(): [p.add_(1) for p in net.head.parameters()]
    f = torch.randn(8, 12)
    b = Batch(torch.arange(8), f, f, f, 0, 0.)
    net.loss(b); net.after_step(b)
    for p, q in zip(net.key_head.parameters(), before): torch.testing.assert_close(p, q + .25)
    assert not any(p.requires_grad for p in net.key_head.parameters())

def test_all_processes_have_one_queue():
    "Two processes of half a batch, with a `gather` that joins them, end with the queue of one process of the whole batch."
    whole, *halves = (make_method('InfoNCE', 12, 8, hidden=16, queue=24, dropout=0.) for _ in range(3))
    for step in range(5):
        f, g = torch.randn(2, 8, 12)
        batches = [Batch(torch.arange(8)[r::w] + 8*step, f[r::w], f[r::w], g[r::w], step, 0.) for r, w in ((0, 1), (0, 2), (1, 2))]
        for net, b in zip((whole, *halves), batches): net.loss(b)
        keys = torch.cat([h.latest for h in halves]); index = torch.cat([b.index for b in batches[1:]])
        for h, b in zip(halves, batches[1:]):
            h.gather = lambda x: index if x.dtype == torch.int64 else keys
            h.after_step(b)
        whole.after_step(batches[0])
    assert torch.equal(halves[0].queue, halves[1].queue)
    assert sorted(halves[0].queue_index.tolist()) == sorted(whole.queue_index.tolist())
    order = lambda net: net.queue[net.queue_index.argsort()]
    torch.testing.assert_close(order(halves[0]), order(whole))

@pytest.mark.parametrize('name', OPTIONS)
def test_learns_and_validates_without_labels(name):
    data = small()
    net = make_method(name, 12, 16, seed=1, **OPTIONS[name])
    recipe = replace(method_class(name).recipe, passes=60*15, batch=8)
    result = train_codes(net, data, recipe, checks=3)
    assert len(result['checks']) == 3 and result['best'] in [c['epoch'] for c in result['checks']]
    rng = np.random.default_rng(0)
    random = np.mean([contrastive.validation_map(make_method(name, 12, 16, seed=s, **OPTIONS[name]), replace(data, clean=torch.from_numpy(rng.normal(size=data.clean.shape)).half())) for s in range(3)])
    assert max(c['validation'] for c in result['checks']) > random + .15
    shuffled = replace(data, labels=data.labels[torch.randperm(len(data.labels))])     # other labels, same training
    again = make_method(name, 12, 16, seed=1, **OPTIONS[name])
    assert train_codes(again, shuffled, recipe, checks=0)['losses'] == result['losses']

class Killed(Exception): pass

@pytest.mark.parametrize('name', OPTIONS)
def test_killed_and_resumed_is_the_same(name, tmp_path):
    data, ends = small(), []
    whole = make_method(name, 12, 16, seed=2, **OPTIONS[name])
    expected = train_codes(whole, data, RECIPE, seed=5, checks=4)
    class Dying(Features):
        def pair(self, index):
            ends.append(1)
            if len(ends) == 27: raise Killed
            return super().pair(index)
    dying = Dying(**{k: getattr(data, k) for k in data.__dataclass_fields__})
    net = make_method(name, 12, 16, seed=2, **OPTIONS[name])
    with pytest.raises(Killed): train_codes(net, dying, RECIPE, seed=5, checks=4, folder=tmp_path, checkpoint_seconds=0)
    net = make_method(name, 12, 16, seed=99, **OPTIONS[name])                           # all state is in the checkpoint
    resumed = train_codes(net, data, RECIPE, seed=5, checks=4, folder=tmp_path, checkpoint_seconds=0)
    assert {k: v for k, v in resumed.items() if k != 'seconds'} == {k: v for k, v in expected.items() if k != 'seconds'}
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), whole.state_dict().values()))

def test_two_players_move_only_their_own_weights():
    class Game(Method):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(12, 8), torch.nn.Linear(8, 1)
        def forward(self, f): return self.a(f)
        def optimizers(self, recipe): return [torch.optim.SGD(self.a.parameters(), .1), torch.optim.SGD(self.b.parameters(), .1)]
        def losses(self, batch):
            value = self.b(self.a(batch.clean)).mean()
            return [value, -value]
    net = Game()
    a, b, bias = net.a.weight.detach().clone(), net.b.weight.detach().clone(), net.a.bias.detach().clone()
    f = small().clean[:60].float()
    train_codes(net, small(), Recipe(passes=60, batch=60, schedule='constant'), checks=0)
    assert torch.allclose(net.a.weight, a - .1*b.T @ f.mean(0, keepdim=True), atol=1e-5)
    assert torch.allclose(net.b.weight, b + .1*(f.mean(0) @ a.T + bias), atol=1e-5)

def test_clear_errors():
    with pytest.raises(ValueError, match='queue=30 or less'): train_codes(make_method('InfoNCE', 12, 8, queue=40), small(), RECIPE)
    with pytest.raises(ValueError, match='method is one of .*BSCDH'): make_method('BSDCH', 12, 8)
    with pytest.raises(ValueError, match='does not take'): make_method('DCL', 12, 8, tau=3)
    with pytest.raises(FloatingPointError, match='lower the rate'): train_codes(make_method('CIBH', 12, 8, hidden=16), small(), replace(RECIPE, rate=1e30))
    with pytest.raises(ValueError, match='two different views'): views.feature_store(Setting(views=1))
    with pytest.raises(ValueError, match='views are drawn by'): views.augment(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), 'moco', 8)

@pytest.mark.parametrize('own,theirs', [(views.brightness, V.adjust_brightness), (views.contrast, V.adjust_contrast), (views.saturation, V.adjust_saturation), (views.hue, V.adjust_hue)])
def test_colour_changes_are_torchvisions(own, theirs):
    x = torch.rand(6, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    x[0] = .5                                                       # grey: no hue
    factor = torch.linspace(-.4, .4, 6) if own is views.hue else torch.linspace(.5, 1.5, 6)
    torch.testing.assert_close(own(x, factor), torch.stack([theirs(a, f) for a, f in zip(x, factor.tolist())]), atol=2e-6, rtol=0)

def test_blur_is_torchvisions():
    x, sigma = torch.rand(4, 3, 9, 7), torch.tensor([.1, .5, 1., 2.])
    torch.testing.assert_close(views.blur(x, sigma), torch.stack([V.gaussian_blur(a, [3, 3], [s, s]) for a, s in zip(x, sigma.tolist())]), atol=1e-5, rtol=0)

@given(seed=st.integers(0, 99), name=st.sampled_from(list(views.VIEWS)))
@settings(max_examples=20, deadline=None)
def test_views_are_images(seed, name):
    torch.manual_seed(seed)
    x = views.augment(torch.randint(0, 256, (5, 3, 20, 20), dtype=torch.uint8), name, 16)
    assert x.shape == (5, 3, 16, 16) and x.min() >= 0 and x.max() <= 1 + 1e-5

TINY = Setting(size=32, train_per_class=5, val_per_class=2, views=3, pretraining=128)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('LTHASH_HOME', str(tmp_path_factory.mktemp('home')))
        yield

def test_store_and_trial_from_images_to_rows(home, monkeypatch):
    data = views.feature_store(TINY)
    assert data.views.shape == (len(data.train), 3, data.width) and data.clean.dtype == data.views.dtype == torch.float16
    known = data.clean_train()
    torch.testing.assert_close(known.mean(0), torch.zeros(data.width), atol=.01, rtol=0)
    a, b = data.pair(torch.arange(len(data.train)))
    assert a.shape == known.shape and not torch.equal(a, b)
    trial = CodeTrial('BSCDH', 16, 1, TINY, epochs=2, options=dict(hidden=16, queue=16, share=.2), checks=2)
    result = run_code_trial(trial)
    rows = code_rows(trial, result, 'table1')
    assert {r['protocol'] for r in rows} == {'paper', 'validation'} and all(0 < r['value'] <= 1 for r in rows) and set(result['checks'][0]) >= {'false negatives', 'base rate'}
    monkeypatch.setattr('lthash.code_trials.train_codes', lambda *a, **k: pytest.fail('trained twice'))
    monkeypatch.setattr('lthash.views._encode', lambda *a: pytest.fail('encoded twice'))
    again = views.feature_store(TINY)
    assert torch.equal(again.views, data.views) and run_code_trial(trial) == result
    codes = encode_features(trained_method(trial, again), again.clean)
    assert np.array_equal(codes, contrastive.code_trial_codes(trial, again))

def test_interrupted_store_is_the_same(home, monkeypatch):
    setting = replace(TINY, seed=1, initialisation='random')
    whole, calls = views.feature_store(setting), []
    inner = views._encode
    def dying(*a):
        calls.append(1)
        if len(calls) == 4: raise Killed
        return inner(*a)
    setting = replace(setting, val_per_class=2, pretraining=129)     # another place on disk, the same features
    monkeypatch.setattr(views, '_encode', dying)
    with pytest.raises(Killed): views.feature_store(setting)
    monkeypatch.setattr(views, '_encode', inner)
    resumed = views.feature_store(setting)
    assert torch.equal(resumed.clean, whole.clean) and torch.equal(resumed.views, whole.views)

def test_fresh_views_come_from_the_same_augmentation(home):
    "Mean and spread of fresh views' features agree with those of many kept ones."
    kept, fresh = views.feature_store(replace(TINY, views=6)), views.feature_store(replace(TINY, views=0))
    index = torch.arange(len(kept.train))
    assert fresh.views is None and not torch.equal(fresh.pair(index)[0], fresh.pair(index)[0])
    drawn = torch.stack([fresh.pair(index)[0] for _ in range(6)], 1)
    torch.testing.assert_close(drawn.mean((0, 1)), kept.views.float().mean((0, 1)), atol=.35, rtol=0)
    assert drawn.std().item() == pytest.approx(kept.views.float().std().item(), rel=.15)
