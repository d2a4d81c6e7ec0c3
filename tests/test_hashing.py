"Codebooks, losses against float64 formulations written another way, gradients, symmetries, and bad input."
import contextlib, itertools, math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

from lthash.backbones import BACKBONES
from lthash.hashing import (CODEBOOKS, CSQ, DPN, METHODS, PRESETS, OrthoHash, OrthoHashArc, bernoulli_codebook, build, gaussian_codebook,
                            hadamard_codebook, max_distance_codebook, param_groups, signs)

few = settings(max_examples=25, deadline=None)


# ---- codebooks

def closest(book): return min(int((a != b).sum()) for a, b in itertools.combinations(book, 2))

@pytest.mark.parametrize('name', CODEBOOKS)
@pytest.mark.parametrize('classes, bits', [(2, 1), (2, 2), (10, 16), (7, 12), (30, 48), (40, 16)])
def test_codebook_form(name, classes, bits):
    book = CODEBOOKS[name](classes, bits, 3)
    assert book.shape == (classes, bits) and book.dtype == torch.int8 and set(book.unique().tolist()) == {-1, 1}
    assert len(book.unique(dim=0)) == classes
    assert torch.equal(book, CODEBOOKS[name](classes, bits, 3))

@pytest.mark.parametrize('name', ['bernoulli', 'gaussian', 'max-distance'])
def test_codebook_seed_and_global_state(name):
    np.random.seed(0); torch.manual_seed(0)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert not torch.equal(CODEBOOKS[name](10, 32, 0), CODEBOOKS[name](10, 32, 1))
    assert np.array_equal(np.random.get_state()[1], states[0]) and torch.equal(torch.get_rng_state(), states[1])

@few
@given(st.integers(0, 7), st.data())
def test_hadamard_distances(power, data):
    bits = 2**power
    classes = data.draw(st.integers(2, max(2, 2*bits)))
    book = hadamard_codebook(classes, bits).int()
    products = book @ book.T
    assert (products.diagonal() == bits).all()
    off = products[~torch.eye(classes, dtype=torch.bool)]
    assert set(off.tolist()) <= ({0} if classes <= bits else {0, -bits})      # half of the bits differ, or all

@pytest.mark.parametrize('classes, bits', [(10, 12), (5, 17), (150, 64)])
def test_hadamard_fallback_is_balanced_and_spread(classes, bits):
    book = hadamard_codebook(classes, bits, 1)
    assert (book.sum(1).abs() == bits % 2).all()
    assert closest(book) >= .3*bits
    assert not torch.equal(book, hadamard_codebook(classes, bits, 2))

def test_coin_tosses_are_fair():
    for make in (bernoulli_codebook, gaussian_codebook):
        assert abs(make(100, 400, 5).double().mean()) < 5/200                 # five standard deviations

def test_repeated_codes_are_drawn_again():
    for make in (bernoulli_codebook, gaussian_codebook): assert len(make(64, 6, 0).unique(dim=0)) == 64

def test_search_keeps_its_distance():
    for seed in range(3): assert closest(max_distance_codebook(10, 32, seed)) > max(closest(bernoulli_codebook(10, 32, seed)), .4*32)

def test_search_gives_up_with_advice():
    with pytest.raises(ValueError, match='differ in a fifth of their bits, not 200: use more bits'): max_distance_codebook(200, 8)

@pytest.mark.parametrize('name', CODEBOOKS)
@pytest.mark.parametrize('classes, bits, message', [(10, 0, 'at least 1 bit'), (1, 8, 'at least 2 classes'), (9, 3, 'there are 8')])
def test_impossible_codebooks(name, classes, bits, message):
    with pytest.raises(ValueError, match=message): CODEBOOKS[name](classes, bits)


# ---- losses, written again: numpy, float64, one image and one bit at a time

def ortho_numpy(v, positive, codes, scale=8., margin=.2, quantisation=0., arc=False):
    total = 0.
    for x, y in zip(v, positive):
        weights = []
        for code, p in zip(codes, y):
            cos = sum(a*b for a, b in zip(x, code))/math.sqrt(sum(a*a for a in x)*len(code))
            weights.append(math.exp(scale*(math.cos(math.acos(min(max(cos, -.99999), .99999)) + margin*p) if arc else cos - margin*p)))
        right = [w for w, p in zip(weights, y) if p]
        total -= sum(math.log(w/sum(weights)) for w in right)/max(len(right), 1)
        total += quantisation*(1 - sum(abs(a) for a in x)/math.sqrt(len(x)*sum(a*a for a in x)))   # cosine with one's own sign
    return total/len(v)

def csq_numpy(v, positive, codes, tie, quantisation=.05):
    cells = []
    for x, y in zip(v, positive):
        chosen = [code for code, p in zip(codes, y) if p]
        for k, a in enumerate(x):
            votes = sum(code[k] for code in chosen)
            target = tie[k] if votes == 0 else math.copysign(1, votes)
            question = 0. if not chosen else -math.log((1 + a)/2 if target > 0 else (1 - a)/2)
            cells.append(question + quantisation*(1 - abs(a))**2)
    return sum(cells)/len(cells)

def dpn_numpy(v, positive, codes, margin=1., regularisation=0.):
    hinge = sum(max(0., margin - a*c) for x, y in zip(v, positive) for code, p in zip(codes, y) if p for a, c in zip(x, code))
    return hinge/len(v) + regularisation*float(np.mean(np.square(v)))

REFERENCES = {
    'ortho':              (lambda b: OrthoHash(b), lambda l, *a: ortho_numpy(*a)),
    'ortho, quantised':   (lambda b: OrthoHash(b, 12., .3, .7), lambda l, *a: ortho_numpy(*a, 12., .3, .7)),
    'ortho, arc':         (lambda b: OrthoHashArc(b), lambda l, *a: ortho_numpy(*a, arc=True)),
    'csq':                (lambda b: CSQ(b), lambda l, *a: csq_numpy(*a, l.tie.numpy())),
    'csq, quantised':     (lambda b: CSQ(b, 1., seed=4), lambda l, *a: csq_numpy(*a, l.tie.numpy(), 1.)),
    'dpn':                (lambda b: DPN(b), lambda l, *a: dpn_numpy(*a)),
    'dpn, regularised':   (lambda b: DPN(b, .5, .1), lambda l, *a: dpn_numpy(*a, .5, .1)),
}

def problem(seed, n=5, classes=4, bits=6):
    "Outputs in (-1, 1), a codebook, labels, multi-hot labels with one row of none and one of two classes."
    rng = np.random.default_rng(seed)
    v = rng.uniform(-.97, .97, (n, bits))
    y, many = rng.integers(0, classes, n), rng.integers(0, 2, (n, classes))
    many[0], many[1] = 0, [1, 1] + [0]*(classes - 2)
    return v, bernoulli_codebook(classes, bits, seed), y, many

@pytest.mark.parametrize('name', REFERENCES)
@few
@given(seed=st.integers(0, 10_000))
def test_losses_against_numpy(name, seed):
    make, reference = REFERENCES[name]
    v, book, y, many = problem(seed)
    loss = make(book).double()
    single = loss(torch.tensor(v), torch.tensor(y)).item()
    assert single == pytest.approx(reference(loss, v, np.eye(4)[y], book.numpy().astype(float)), rel=1e-10)
    assert single == loss(torch.tensor(v), F.one_hot(torch.tensor(y), 4)).item()
    several = loss(torch.tensor(v), torch.tensor(many, dtype=torch.uint8)).item()
    assert several == pytest.approx(reference(loss, v, many, book.numpy().astype(float)), rel=1e-10)

@pytest.mark.parametrize('name', REFERENCES)
@pytest.mark.parametrize('seed', range(3))
def test_gradients(name, seed):
    make, reference = REFERENCES[name]
    v, book, y, many = problem(seed)
    loss, x = make(book).double(), torch.tensor(v, requires_grad=True)
    for label in (torch.tensor(y), torch.tensor(many)):
        label = label if label.ndim == 1 else label.to(torch.uint8)
        assert torch.autograd.gradcheck(lambda x: loss(x, label), x)
    slope, = torch.autograd.grad(loss(x, torch.tensor(y)), x)
    positive, codes, h = np.eye(4)[y], book.numpy().astype(float), 1e-6
    for i, k in ((0, 0), (2, 3), (4, 5)):                                     # and of the formulation written again
        up, down = v.copy(), v.copy()
        up[i, k] += h; down[i, k] -= h
        assert slope[i, k].item() == pytest.approx((reference(loss, up, positive, codes) - reference(loss, down, positive, codes))/(2*h), rel=1e-4, abs=1e-7)


# ---- what a loss must not care about, and where it must vanish

@few
@given(st.integers(0, 1000), st.floats(.01, 100))
def test_orthohash_sees_directions_only(seed, factor):
    v, book, y, _ = problem(seed)
    for make in (OrthoHash, OrthoHashArc):
        loss = make(book).double()
        assert loss(torch.tensor(v)*factor, torch.tensor(y)).item() == pytest.approx(loss(torch.tensor(v), torch.tensor(y)).item(), rel=1e-9)

@pytest.mark.parametrize('make', [OrthoHash, OrthoHashArc])
def test_orthohash_without_margin_is_cross_entropy(make):
    v, book, y, _ = problem(1)
    logits = 8*F.cosine_similarity(torch.tensor(v)[:, None], book.double()[None], dim=2)
    assert make(book, margin=0.).double()(torch.tensor(v), torch.tensor(y)).item() == pytest.approx(F.cross_entropy(logits, torch.tensor(y)).item(), rel=1e-9)

@few
@given(st.integers(0, 1000))
def test_margin_costs_and_is_paid_by_the_right_class(seed):
    v, book, y, _ = problem(seed)
    values = [OrthoHash(book, margin=m).double()(torch.tensor(v), torch.tensor(y)).item() for m in (0., .1, .3)]
    assert values == sorted(values) and values[0] < values[2]

@pytest.mark.parametrize('name', REFERENCES)
def test_order_of_images_bits_and_classes_does_not_matter(name):
    make, _ = REFERENCES[name]
    v, book, y, many = problem(7)
    rng = np.random.default_rng(0)
    loss = make(book).double()
    value = loss(torch.tensor(v), torch.tensor(y)).item()
    rows, bits, classes = (rng.permutation(n) for n in (5, 6, 4))
    assert loss(torch.tensor(v[rows]), torch.tensor(y[rows])).item() == pytest.approx(value, rel=1e-12)
    assert make(book[:, bits]).double()(torch.tensor(v[:, bits]), torch.tensor(y)).item() == pytest.approx(value, rel=1e-12)
    assert make(book[classes]).double()(torch.tensor(v), torch.tensor(np.argsort(classes)[y])).item() == pytest.approx(value, rel=1e-12)
    flip = np.array([1, -1, 1, 1, -1, -1])                                    # a bit and its negation carry the same information
    assert make(book*torch.tensor(flip)).double()(torch.tensor(v*flip), torch.tensor(y)).item() == pytest.approx(value, rel=1e-12)

@few
@given(st.integers(0, 1000), st.floats(1.01, 5))
def test_dpn_is_flat_beyond_the_margin(seed, reach):
    _, book, y, _ = problem(seed)
    v = (reach*book[torch.tensor(y)].double()).requires_grad_()
    value = DPN(book).double()(v, torch.tensor(y))
    assert value == 0 and not torch.autograd.grad(value, v)[0].any()

@few
@given(st.integers(0, 1000))
def test_csq_is_least_at_the_centres(seed):
    v, book, y, many = problem(seed)
    loss = CSQ(book).double()
    assert loss(book[torch.tensor(y)].double(), torch.tensor(y)) == 0
    assert loss(torch.tensor(v), torch.tensor(y)) > 0
    centre = loss.centre(torch.tensor(many).double())
    assert (centre.abs() == 1).all()                                          # ties included: never 0, whose target would be 1/2

def test_csq_tie_is_the_same_for_every_batch_and_depends_on_the_seed():
    book = hadamard_codebook(4, 32)
    two = torch.tensor([[1., 1, 0, 0]])
    assert torch.equal(CSQ(book, seed=1).centre(two), CSQ(book, seed=1).centre(two.repeat(3, 1))[2:])
    assert not torch.equal(CSQ(book, seed=1).centre(two), CSQ(book, seed=2).centre(two))

def test_signs_are_never_zero():
    assert signs(torch.tensor([-2., -0., 0., 1e-30, 3.])).tolist() == [-1, -1, -1, 1, 1]

@pytest.mark.parametrize('make', [OrthoHash, OrthoHashArc, CSQ, DPN])
def test_images_without_a_class_cost_nothing_but_quantisation(make):
    loss = make(bernoulli_codebook(3, 8), **({'quantisation': 0.} if make is CSQ else {}))
    v = torch.linspace(-.9, .9, 16).reshape(2, 8).requires_grad_()
    value = loss(v, torch.zeros(2, 3, dtype=torch.uint8))
    assert value == 0 and torch.autograd.grad(value, v)[0].isfinite().all()

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('make', [OrthoHash, CSQ, DPN])
def test_low_precision_outputs_are_computed_in_float32(make, kind):
    v, book, y, _ = problem(2)
    v = torch.tensor(v).to(kind)
    loss = make(book)
    with torch.autocast('cpu', torch.bfloat16): value = loss(v, torch.tensor(y))
    assert value.dtype == torch.float32 and value == loss(v.float(), torch.tensor(y))


# ---- bad input, and no reading of values at every step

@pytest.mark.parametrize('make', [OrthoHash, CSQ, DPN])
@pytest.mark.parametrize('v, y, message', [
    (torch.zeros(2, 7), torch.zeros(2, dtype=torch.int64), r'shape \(n, 8\); found torch.float32 \(2, 7\)'),
    (torch.zeros(2, 8, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), 'outputs are floats'),
    (torch.zeros(8), torch.zeros(8, dtype=torch.int64), 'outputs are floats'),
    (torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64), r'labels are int64 of shape \(2,\)'),
    (torch.zeros(2, 8), torch.zeros(2), r'found torch.float32 \(2,\)'),
    (torch.zeros(2, 8), torch.zeros(2, 4), r'multi-hot of shape \(2, 3\); found torch.float32 \(2, 4\)'),
    (torch.zeros(2, 8), torch.tensor([0, 3]), r'labels lie in 0..2; found 0..3'),
    (torch.zeros(2, 8), torch.tensor([-1, 2]), r'found -1..2'),
    (torch.zeros(2, 8), torch.full((2, 3), 2), 'multi-hot labels are 0 or 1'),
    (torch.zeros(0, 8), torch.zeros(0, dtype=torch.int64), 'empty batch'),
])
def test_bad_batches(make, v, y, message):
    with pytest.raises(ValueError, match=message): make(bernoulli_codebook(3, 8))(v, y)

@pytest.mark.parametrize('book, message', [(torch.zeros(3, 8), '-1 and \\+1'), (torch.ones(8), r'shape \(8,\)'), (torch.ones(1, 8), 'at least 2 classes'), (torch.ones(3, 0), 'at least 1 bit')])
def test_bad_codebooks(book, message):
    with pytest.raises(ValueError, match=message): OrthoHash(book)

def test_csq_refuses_outputs_beyond_tanh():
    with pytest.raises(ValueError, match='ends in tanh.*found 2'): CSQ(bernoulli_codebook(3, 8))(torch.full((2, 8), 2.), torch.tensor([0, 1]))

@pytest.mark.parametrize('method', METHODS)
def test_later_steps_read_no_value(method, monkeypatch):
    "Tensors on the meta device have no values, so reading one (which would stall a GPU) is an error there."
    net, loss = build(method, 'resnet20', 'random', 16, 10, 32)
    net, loss = net.to('meta'), loss.to('meta')
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: contextlib.nullcontext())   # which does not know that device
    x, y = torch.empty(4, 3, 32, 32, device='meta'), torch.empty(4, dtype=torch.int64, device='meta')
    with pytest.raises((RuntimeError, NotImplementedError)): net(x)           # the first step looks
    net.values_checked = loss.values_checked = True
    loss(net(x), y).backward()                                                # the others do not
    loss(net(x), torch.empty(4, 10, device='meta')).backward()


# ---- networks

@pytest.mark.parametrize('method', METHODS)
def test_build_is_deterministic_and_leaves_the_global_state_alone(method):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    (a, la), (b, lb), (c, lc) = (build(method, 'alexnet-small', 'random', 16, 10, 32, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, y) for m, n in ((a, b), (la, lb)) for x, y in zip(m.state_dict().values(), n.state_dict().values()))
    head = next(p for p in a.head.parameters())
    assert not torch.equal(head, next(p for p in c.head.parameters()))
    assert method == 'csq' or not torch.equal(la.codebook, lc.codebook)       # Hadamard rows have no seed

@pytest.mark.parametrize('method', METHODS)
def test_a_step_trains_backbone_and_head(method):
    net, loss = build(method, 'resnet20', 'random', 16, 10, 32)
    optimizer = torch.optim.Adam(param_groups(net, 1e-2, .1))
    before = {k: p.clone() for k, p in net.named_parameters()}
    loss(net(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(before)
    assert not list(loss.parameters())                                        # the codes are fixed

def test_normalisation_happens_inside_and_is_not_saved():
    net, _ = build('orthohash', 'resnet20', 'random', 16, 10, 32)
    x = torch.rand(2, 3, 32, 32)
    by_hand = net.head.eval()(net.backbone.eval()((x - torch.tensor([.485, .456, .406])[:, None, None])/torch.tensor([.229, .224, .225])[:, None, None]))
    torch.testing.assert_close(net(x), by_hand)
    assert not {'mean', 'std'} & set(net.state_dict())

def test_outputs_are_float32_under_autocast():
    for method in METHODS:
        net, _ = build(method, 'alexnet-small', 'random', 16, 10, 32)
        with torch.autocast('cpu', torch.bfloat16): v = net(torch.rand(4, 3, 32, 32))
        assert v.dtype == torch.float32 and len(v.unique()) > 40              # bfloat16 would leave few different values

@pytest.mark.parametrize('x, message', [(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'found torch.uint8'), (torch.zeros(3, 32, 32), r'\(3, 32, 32\)'), (torch.zeros(1, 1, 32, 32), 'found'),
                                        (torch.full((1, 3, 32, 32), 200.), 'divide bytes by 255'), (torch.full((1, 3, 32, 32), -2.), 'leave the normalisation'),
                                        (torch.full((1, 3, 32, 32), float('nan')), 'lie in')])
def test_bad_images(x, message):
    with pytest.raises(ValueError, match=message): build('dpn', 'resnet20', 'random', 16, 10, 32)[0](x)

def test_heads_are_the_published_ones():
    kinds = lambda *a, **k: [type(m).__name__ for m in (lambda h: h if isinstance(h, torch.nn.Sequential) else [h])(build(*a, **k)[0].head)]
    assert kinds('orthohash', 'resnet20', 'random', 16, 10, 32) == ['Linear', 'BatchNorm1d']
    assert kinds('dpn', 'resnet20', 'random', 16, 10, 32) == ['Linear']
    assert kinds('csq', 'resnet20', 'random', 16, 10, 32) == ['Linear', 'ReLU', 'Dropout', 'Linear', 'ReLU', 'Linear', 'Tanh']
    dropout = lambda backbone, size=32, **k: build('csq', backbone, 'random', 16, 10, size, **k)[0].head[2].p
    assert (dropout('resnet20'), dropout('alexnet', 64), dropout('vit-small'), dropout('resnet20', dropout=.1)) == (.5, 0., .5, .1)    # AlexNet has dropout of its own

@pytest.mark.parametrize('name', PRESETS)
def test_presets_build(name):
    preset = PRESETS[name]
    _, loss = build(preset.method, 'resnet20', 'random', 32, 10, 32, preset=name)
    assert all(getattr(loss, k) == v for k, v in preset.loss.items())
    assert torch.equal(loss.codebook, CODEBOOKS[preset.codebook](10, 32, 0).float())
    assert not preset.backbone or preset.backbone in BACKBONES

def test_overrides():
    _, loss = build('orthohash', 'resnet20', 'random', 16, 10, 32, margin=.3, codebook='max-distance')
    assert loss.margin == .3 and loss.scale == 8 and torch.equal(loss.codebook, max_distance_codebook(10, 16, 0).float())
    mine = gaussian_codebook(10, 16, 99)
    assert torch.equal(build('dpn', 'resnet20', 'random', 16, 10, 32, codebook=mine)[1].codebook, mine.float())

@pytest.mark.parametrize('arguments, options, message', [
    (('ortho', 'resnet20', 'random', 16, 10, 32), {}, 'method is one of orthohash'),
    (('dpn', 'resnet20', 'random', 16, 10, 32), {'preset': 'csq'}, 'presets of dpn are dpn, dpn-as-published; found .csq.'),
    (('dpn', 'resnet20', 'random', 16, 10, 32), {'codebook': 'hadamrd'}, 'codebook is one of'),
    (('dpn', 'resnet20', 'random', 16, 10, 32), {'codebook': bernoulli_codebook(9, 16)}, r'a \(10, 16\) table; found \(9, 16\)'),
    (('dpn', 'resnet20', 'random', 16, 10, 32), {'scale': 3.}, "dpn does not take all of .'scale'."),
    (('dpn', 'resnet20', 'random', 0, 10, 32), {}, 'at least 1 bit'),
    (('dpn', 'resnet20', 'random', 16, 1, 32), {}, 'at least 2 classes'),
])
def test_bad_trials(arguments, options, message):
    with pytest.raises(ValueError, match=message): build(*arguments, **options)
