"Classical, structural and generative unsupervised hashing against formulations written independently, in float64."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy import stats
from torch.nn import functional as F

from lthash import classical, code_trials, generative, unsupervised
from lthash.contrastive import Batch, encode_features, make_method, train_codes
from lthash.datasets import Split
from lthash.retrieval import mean_average_precision, pack
from lthash.training import Recipe
from lthash.views import Features, Setting

TRAINED = (*code_trials.STRUCTURAL, *code_trials.GENERATIVE)


def clustered(n=480, clusters=8, d=48, noise=1.6, seed=0):
    "Features of overlapping clusters and two noisy views of the training images, as a feature store gives them."
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % clusters
    centres = rng.standard_normal((clusters, d))
    clean = centres[labels] + .5*noise*rng.standard_normal((n, d))
    views = clean[:, None] + .25*noise*rng.standard_normal((n, 4, d))
    parts = np.split(np.arange(n), [n - 120, n - 80])
    t = [torch.from_numpy(p) for p in parts]
    scale = clean.std(0)
    return Features(Setting('clusters'), Split('made up', t[0], t[1], t[2], t[0], 'x'), t[0], torch.from_numpy(clean/scale).half(), torch.from_numpy(views[:len(t[0])]/scale).half(),
                    torch.from_numpy(labels), tuple(map(str, range(clusters))))


@pytest.fixture(scope='module')
def store(): return clustered()


def batch_of(store, n=32, progress=0.):
    torch.manual_seed(0)
    index = torch.arange(n)
    return Batch(index, store.clean_train()[index], *store.pair(index), 0, progress)


def score(store, codes):
    split, labels = store.split, store.labels.numpy()
    return mean_average_precision(codes[split.query], labels[split.query], codes[split.database], labels[split.database], k=100)


# classical

def cloud(n=300, d=10, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + 3


def test_pca_directions_are_the_eigenvectors_of_the_covariance():
    x = cloud()
    w, b = classical.pca_sign(x, 6)
    values, vectors = np.linalg.eigh(np.cov(x.T))
    assert np.allclose(np.abs(w.T @ vectors[:, ::-1][:, :6]), np.eye(6), atol=1e-6)
    assert np.allclose((x @ w + b).mean(0), 0, atol=1e-8)


def test_itq_is_alternating_procrustes():
    x = cloud(seed=1)
    w0, b0 = classical.pca_sign(x, 5)
    v = x @ w0 + b0
    r = np.linalg.qr(np.random.default_rng(7).standard_normal((5, 5)))[0]
    for _ in range(12):                                                  # Gong & Lazebnik's own update
        u, _, t = np.linalg.svd(np.sign(v @ r).T @ v)
        r = t.T @ u.T
    w, b = classical.itq(x, 5, seed=7, iterations=12)
    assert np.allclose(x @ w + b, v @ r, atol=1e-8)


def test_spectral_hashing_is_the_authors_mode_table():
    x, bits = cloud(d=6, seed=2), 9
    w0, b0 = classical.pca_sign(x, 6)
    v = x @ w0 + b0
    low, extent = v.min(0), v.max(0) - v.min(0)
    modes = []                                                           # a table with one non-zero mode a row, as in the published Matlab code
    for axis in range(6):
        for k in range(1, math.ceil((bits + 1)*extent[axis]/extent.max()) + 1): modes.append((k*np.pi/extent[axis], axis))
    modes = sorted(modes)[:bits]
    expected = np.stack([np.sin(np.pi/2 + omega*(v[:, axis] - low[axis])) for omega, axis in modes], 1)
    w, b = classical.spectral(x, bits)
    assert np.allclose(np.cos(x @ w + b), expected, atol=1e-8)


@pytest.mark.parametrize('name', code_trials.CLASSICAL)
def test_classical_methods_ignore_shift_and_give_the_same_codes_after_reloading(name, store):
    clean = store.clean_train()
    codes = []
    for shift in (0., 5.):
        net = make_method(name, store.width, 16)
        net.prepare(clean.double() + shift, 3)
        codes.append(np.unpackbits(pack(net.double()(clean.double() + shift))))
    assert (codes[0] != codes[1]).mean() < .01                            # rounding aside
    again = make_method(name, store.width, 16)
    again.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
    assert (np.unpackbits(encode_features(again, clean + 5.)) != codes[1]).mean() < .01


def test_classical_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match='at most 10 principal directions'): classical.itq(cloud(), 16)
    with pytest.raises(ValueError, match='1 of 300 rows'): classical.lsh(np.where(np.arange(3000).reshape(300, 10) == 5, np.nan, cloud()), 4)


# pair similarities and losses

def test_structure_thresholds_are_two_mirrored_gaussians():
    x = np.random.default_rng(0).standard_normal((60, 12)) + .3
    z = x/np.linalg.norm(x, axis=1, keepdims=True)
    d = np.array([1 - z[i] @ z[j] for i in range(60) for j in range(i)])
    edges = np.arange(0, 2.02, .01)
    mode = edges[np.histogram(d, edges)[0].argmax()]
    left, right = d[d <= mode], d[d >= mode]
    expected = [mode - 2*stats.norm.fit(np.r_[left, 2*mode - left])[1], mode + 2*stats.norm.fit(np.r_[right, 2*mode - right])[1]]
    assert np.allclose(unsupervised.structure_thresholds(torch.from_numpy(x)), expected, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 7), st.integers(1, 9), st.integers(0, 10**6))
def test_pair_losses_against_loops(n, bits, seed):
    rng = np.random.default_rng(seed)
    v, f, s = rng.uniform(-1, 1, (n, bits)), rng.standard_normal((n, 5)), rng.integers(-1, 2, (n, n))
    tv, tf, ts = (torch.from_numpy(a).double() for a in (v, f, s))
    pairs = [(i, j) for i in range(n) for j in range(n)]
    assert np.isclose(unsupervised.ssdh_loss(tv, ts), sum(abs(s[i, j])*(v[i] @ v[j]/bits - s[i, j])**2 for i, j in pairs)/n**2)
    assert np.isclose(generative.bgan_pair_loss(tv, ts), sum((v[i] @ v[j] - s[i, j])**2 for i, j in pairs)/n**2 + np.mean((1 - np.abs(v))**2))
    terms = [-math.log(1/(1 + math.exp(-s[i, j]*(v[i] @ v[j])/2))) for i, j in pairs if s[i, j]]
    assert np.isclose(unsupervised.pair_likelihood(tv, ts), np.mean(terms) if terms else 0.)
    p, q = (v + 1)/2, rng.uniform(0, 1, (n, bits))
    expected = np.mean([(round(x) - x)**2 for x in p.ravel()]) + np.mean([(p[:, k].mean() - .5)**2 for k in range(bits)])
    assert np.isclose(unsupervised.deepbit_loss(torch.from_numpy(p)), expected)
    assert np.isclose(unsupervised.deepbit_loss(torch.from_numpy(p), torch.from_numpy(q), .3), expected + .3*np.mean([((p[i] - q[i])**2).sum() for i in range(n)]))


def cosine(a, b): return a @ b/np.linalg.norm(a)/np.linalg.norm(b)


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 8), st.integers(2, 9), st.integers(0, 10**6))
def test_dsch_losses_against_loops(n, bits, seed):
    rng = np.random.default_rng(seed)
    h, s, centres, p = rng.standard_normal((n, bits)), rng.random((n, n)), rng.choice([-1., 1.], (4, bits)), rng.random((n, 4))
    prior, tau, instance, component = rng.dirichlet(np.ones(4)), .4, 0., 0.
    for i in range(n):
        others = [j for j in range(n) if j != i]
        total = sum(math.exp(cosine(h[i], h[j])/tau) for j in others)
        instance -= sum(s[i, j]/sum(s[i, l] for l in others)*math.log(math.exp(cosine(h[i], h[j])/tau)/total) for j in others)/n
        total = sum(prior[k]*math.exp(cosine(h[i], centres[k])/tau) for k in range(4))
        component -= sum(p[i, k]/p[i].sum()*math.log(prior[k]*math.exp(cosine(h[i], centres[k])/tau)/total) for k in range(4))/n
    t = [torch.from_numpy(x) for x in (h, s, centres, p, prior)]
    assert np.isclose(unsupervised.weighted_contrast(t[0], t[1], tau), instance)
    assert np.isclose(unsupervised.component_contrast(t[0], t[2], t[3], t[4], tau), component)


def test_dsch_memberships_are_the_mixtures(store):
    net = make_method('DSCH', store.width, 8, fine=12, coarse=3, refresh=2).double()
    clean = store.clean_train().double()
    net.start_epoch(clean, 0)
    kept = net.means.clone()
    net.start_epoch(clean, 1)
    assert torch.equal(kept, net.means)                                    # not the turn of the mixture
    h = net.head[1:](clean[:5]).tanh().detach().numpy()                     # before a step, the head is the one of the E step
    density = np.stack([w.item()*stats.multivariate_normal(m.numpy(), np.diag(c.numpy())).pdf(h) for m, c, w in zip(net.means, net.spread, net.prior)], 1)
    p = density/density.sum(1, keepdims=True)
    p = p/np.linalg.norm(p, axis=1, keepdims=True)
    fine, coarse = net.memberships(clean[:5])
    assert np.allclose(fine, p, atol=1e-6)
    assert np.allclose(coarse, np.stack([p[:, net.member[:, c].bool().numpy()].sum(1) for c in range(3)], 1), atol=1e-6)
    with torch.no_grad(): net.head[1].weight.mul_(-1)
    assert torch.equal(net.memberships(clean[:5])[0], fine)                 # codes move, memberships stay until the next E step
    few = make_method('DSCH', store.width, 8)                              # 1000 components of 360 images: as many as there is data for
    few.start_epoch(store.clean_train(), 0)
    assert (few.prior > 0).sum() <= 360//5 and torch.isfinite(few.loss(batch_of(store)))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 10**6))
def test_bihalf_forward_and_gradient(n, bits, seed):
    rng = np.random.default_rng(seed)
    u = torch.from_numpy(rng.standard_normal((n, bits))).requires_grad_()
    g = torch.from_numpy(rng.standard_normal((n, bits)))
    b = unsupervised.HalfHalf.apply(u, 6.)
    for k in range(bits):
        order = sorted(range(n), key=lambda i: -u[i, k].item())
        assert all(b[i, k] == (1 if place < n//2 else -1) for place, i in enumerate(order))
    b.backward(g)
    assert torch.allclose(u.grad, g + 6*(u.detach() - b.detach())/(n*bits))


def test_sdc_against_loops():
    rng = np.random.default_rng(0)
    v, f = rng.standard_normal((13, 8)), rng.standard_normal((13, 5))      # an odd batch: the last one is in no pair, but is quantised
    pairs = sorted((cosine(f[i], f[i + 6]), cosine(v[i], v[i + 6])) for i in range(6))
    targets = [max(0, 2*stats.beta.ppf((2*r + 1)/12, 5, 5) - 1) for r in range(6)]
    expected = np.mean([abs(pairs[r][1] - targets[r]) for r in range(6)]) + np.mean([1 - cosine(x, np.sign(x)) for x in v])
    assert np.isclose(unsupervised.sdc_loss(torch.from_numpy(v), torch.from_numpy(f)), expected)


# generative

def test_code_graph_against_loops():
    b = np.random.default_rng(0).integers(0, 2, (7, 9))
    a = np.array([[max(1e-8, 1 - (x != y).sum()/9)**1.4 for y in b] for x in b])
    expected = np.array([[a[i, j]/math.sqrt(a[i].sum()*a[j].sum()) for j in range(7)] for i in range(7)])
    assert np.allclose(generative.code_graph(torch.from_numpy(b).double()), expected)


def test_neighbourhoods_against_sets(store):
    x = store.clean_train()[:40].double()
    cos = F.normalize(x, dim=1) @ F.normalize(x, dim=1).T
    near = [[j for j in sorted(range(40), key=lambda j: -cos[i, j].item()) if j != i][:4] for i in range(40)]
    overlap = [[len(set(near[i]) & set(near[j])) for j in range(40)] for i in range(40)]
    alike = np.zeros((40, 40), bool)
    for i in range(40):
        for j in sorted(range(40), key=lambda j: (-overlap[i][j], j))[:3]:
            if overlap[i][j]: alike[i, near[j]] = True
    assert ((alike | alike.T) == generative.neighbourhoods(x, 4, 3).toarray()).all()


@pytest.mark.parametrize('name', code_trials.GENERATIVE)
def test_players_move_only_their_own_parameters(name, store):
    net = make_method(name, store.width, 8)
    net.prepare(store.clean_train())
    batch = batch_of(store)
    actor, critic = net.optimizers(net.recipe)
    mine = [{id(p) for g in o.param_groups for p in g['params']} for o in (actor, critic)]
    assert not mine[0] & mine[1] and mine[0] | mine[1] == {id(p) for p in net.parameters()}
    for loss, own in zip(net.losses(batch), (actor, critic)):
        grads = torch.autograd.grad(loss, [p for g in own.param_groups for p in g['params']], retain_graph=True, allow_unused=True)
        assert all(g is not None and g.abs().sum() > 0 for g in grads)
    critic_loss = net.losses(batch)[1]
    assert all(g is None for g in torch.autograd.grad(critic_loss, [p for g in actor.param_groups for p in g['params']], allow_unused=True))


# whole methods

@pytest.fixture(scope='module')
def baselines(store):
    net = make_method('LSH', store.width, 16)
    net.prepare(store.clean_train(), 0)
    return score(store, pack(torch.randn(len(store.clean), 16, generator=torch.Generator().manual_seed(0)))), score(store, encode_features(net, store.clean))


@pytest.mark.parametrize('name', TRAINED)
def test_training_beats_random_codes_and_lsh_where_the_paper_says_so(name, store, baselines):
    net = make_method(name, store.width, 16)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    recipe = Recipe(passes=40*360, batch=64, rate=1e-3, optimizer='adam', weight_decay=0., schedule='constant', augmentation='views')
    history = train_codes(net, store, recipe, checks=4)
    assert all(math.isfinite(l) for l in history['losses']) and any((v != before[k]).any() for k, v in net.state_dict().items())
    random, lsh = baselines
    value = score(store, encode_features(net, store.clean))
    print(f'{name}: {value:.3f}, LSH {lsh:.3f}, random {random:.3f}')
    assert value > random + .1
    if name != 'DeepBit': assert value > lsh                               # its authors withdrew their comparison


def test_distillhash_hands_over_to_its_judge(store):
    net = make_method('DistillHash', store.width, 16)
    net.prepare(store.clean_train())
    net.loss(batch_of(store, progress=.1))
    assert not net.judging
    net.loss(batch_of(store, progress=.5))
    assert net.judging and torch.equal(net.judge[1].weight, net.head[1].weight)
    with torch.no_grad(): net.head[1].weight.add_(1.)
    net.loss(batch_of(store, progress=.6))
    assert not torch.equal(net.judge[1].weight, net.head[1].weight)         # the judge stays as it was


@pytest.mark.parametrize('name', ('DistillHash', 'DSCH', 'TBH'))
def test_an_interrupted_training_ends_the_same(name, store, tmp_path, monkeypatch):
    recipe = Recipe(passes=20*360, batch=90, rate=1e-3, optimizer='adam', weight_decay=0., schedule='constant', augmentation='views')
    options = dict(fine=20, coarse=4, refresh=4) if name == 'DSCH' else {}
    def trained(folder=None):
        net = make_method(name, store.width, 8, **options)
        train_codes(net, store, recipe, folder=folder, checks=2, checkpoint_seconds=0)
        return net.state_dict()
    whole = trained()
    class Stop(Exception): pass
    cls, calls = type(make_method(name, store.width, 8, **options)), []
    after = cls.after_step
    def killed(self, batch):
        after(self, batch)
        if batch.step == 50: raise Stop
    with monkeypatch.context() as m, pytest.raises(Stop):
        m.setattr(cls, 'after_step', killed)
        trained(tmp_path)
    assert all(torch.equal(v, whole[k]) for k, v in trained(tmp_path).items())
