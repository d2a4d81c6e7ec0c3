"Losses against float64 formulations written another way, gradients, symmetries, and bad input."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from lthash.models.hashnet import signs
from lthash.supervised.codebooks import bernoulli_codebook, hadamard_codebook
from lthash.supervised.csq import CSQ
from lthash.supervised.dpn import DPN
from lthash.supervised.orthohash import OrthoHash, OrthoHashArc

few = settings(max_examples=25, deadline=None)


# Losses written again: numpy, float64, one image and one bit at a time


def ortho_numpy(v, positive, codes, scale=8., margin=.2, quantisation=0., arc=False):
    total = 0.
    for x, y in zip(v, positive):
        weights = []
        for code, p in zip(codes, y):
            cos = sum(a*b for a, b in zip(x, code))/math.sqrt(sum(a*a for a in x)*len(code))
            shifted = math.cos(math.acos(min(max(cos, -.99999), .99999)) + margin*p) if arc else cos - margin*p
            weights.append(math.exp(scale*shifted))
        right = [w for w, p in zip(weights, y) if p]
        total -= sum(math.log(w/sum(weights)) for w in right)/max(len(right), 1)
        cosine = sum(abs(a) for a in x)/math.sqrt(len(x)*sum(a*a for a in x))   # of x and its own sign
        total += quantisation*(1 - cosine)
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
    hinge = sum(max(0., margin - a*c)
                for x, y in zip(v, positive) for code, p in zip(codes, y) if p for a, c in zip(x, code))
    return hinge/len(v) + regularisation*float(np.mean(np.square(v)))


REFERENCES = {
    'ortho':              (lambda b: OrthoHash(b), lambda loss, *a: ortho_numpy(*a)),
    'ortho, quantised':   (lambda b: OrthoHash(b, 12., .3, .7), lambda loss, *a: ortho_numpy(*a, 12., .3, .7)),
    'ortho, arc':         (lambda b: OrthoHashArc(b), lambda loss, *a: ortho_numpy(*a, arc=True)),
    'csq':                (lambda b: CSQ(b), lambda loss, *a: csq_numpy(*a, loss.tie.numpy())),
    'csq, quantised':     (lambda b: CSQ(b, 1., seed=4), lambda loss, *a: csq_numpy(*a, loss.tie.numpy(), 1.)),
    'dpn':                (lambda b: DPN(b), lambda loss, *a: dpn_numpy(*a)),
    'dpn, regularised':   (lambda b: DPN(b, .5, .1), lambda loss, *a: dpn_numpy(*a, .5, .1)),
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
        assert torch.autograd.gradcheck(loss, (x, label))
    slope, = torch.autograd.grad(loss(x, torch.tensor(y)), x)
    positive, codes, h = np.eye(4)[y], book.numpy().astype(float), 1e-6
    for i, k in ((0, 0), (2, 3), (4, 5)):                                     # and of the formulation written again
        up, down = v.copy(), v.copy()
        up[i, k] += h
        down[i, k] -= h
        rise = reference(loss, up, positive, codes) - reference(loss, down, positive, codes)
        assert slope[i, k].item() == pytest.approx(rise/(2*h), rel=1e-4, abs=1e-7)


# What a loss must not care about, and where it must vanish


@few
@given(st.integers(0, 1000), st.floats(.01, 100))
def test_orthohash_sees_directions_only(seed, factor):
    v, book, y, _ = problem(seed)
    for make in (OrthoHash, OrthoHashArc):
        loss, v, y = make(book).double(), torch.as_tensor(v), torch.as_tensor(y)
        assert loss(v*factor, y).item() == pytest.approx(loss(v, y).item(), rel=1e-9)


@pytest.mark.parametrize('make', [OrthoHash, OrthoHashArc])
def test_orthohash_without_margin_is_cross_entropy(make):
    v, book, y, _ = problem(1)
    v, y = torch.tensor(v), torch.tensor(y)
    logits = 8*F.cosine_similarity(v[:, None], book.double()[None], dim=2)
    expected = F.cross_entropy(logits, y).item()
    assert make(book, margin=0.).double()(v, y).item() == pytest.approx(expected, rel=1e-9)


@few
@given(st.integers(0, 1000))
def test_margin_costs_and_is_paid_by_the_right_class(seed):
    v, book, y, _ = problem(seed)
    v, y = torch.tensor(v), torch.tensor(y)
    values = [OrthoHash(book, margin=m).double()(v, y).item() for m in (0., .1, .3)]
    assert values == sorted(values) and values[0] < values[2]


@pytest.mark.parametrize('name', REFERENCES)
def test_order_of_images_bits_and_classes_does_not_matter(name):
    make, _ = REFERENCES[name]
    v, book, y, many = problem(7)
    rng = np.random.default_rng(0)

    def loss(book, v, y):
        return make(book).double()(torch.tensor(v), torch.tensor(y)).item()
    same = pytest.approx(loss(book, v, y), rel=1e-12)
    rows, bits, classes = (rng.permutation(n) for n in (5, 6, 4))
    assert loss(book, v[rows], y[rows]) == same
    assert loss(book[:, bits], v[:, bits], y) == same
    assert loss(book[classes], v, np.argsort(classes)[y]) == same
    flip = np.array([1, -1, 1, 1, -1, -1])                                    # a negated bit says the same
    assert loss(book*torch.tensor(flip), v*flip, y) == same


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
    assert (centre.abs() == 1).all()                     # ties included: never 0, whose target would be 1/2


def test_csq_tie_is_the_same_for_every_batch_and_depends_on_the_seed():
    book = hadamard_codebook(4, 32)
    two = torch.tensor([[1., 1, 0, 0]])
    one = CSQ(book, seed=1).centre(two)
    assert torch.equal(one, CSQ(book, seed=1).centre(two.repeat(3, 1))[2:])
    assert not torch.equal(one, CSQ(book, seed=2).centre(two))


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
    with torch.autocast('cpu', torch.bfloat16):
        value = loss(v, torch.tensor(y))
    assert value.dtype == torch.float32 and value == loss(v.float(), torch.tensor(y))


# Bad input


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
    with pytest.raises(ValueError, match=message):
        make(bernoulli_codebook(3, 8))(v, y)


@pytest.mark.parametrize('book, message', [
    (torch.zeros(3, 8), '-1 and \\+1'), (torch.ones(8), r'shape \(8,\)'), (torch.ones(1, 8), 'at least 2 classes'),
    (torch.ones(3, 0), 'at least 1 bit')])


def test_bad_codebooks(book, message):
    with pytest.raises(ValueError, match=message):
        OrthoHash(book)


def test_csq_refuses_outputs_beyond_tanh():
    with pytest.raises(ValueError, match='ends in tanh.*found 2'):
        CSQ(bernoulli_codebook(3, 8))(torch.full((2, 8), 2.), torch.tensor([0, 1]))
