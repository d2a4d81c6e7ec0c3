"Networks and losses by name: determinism, training, published settings, bad input."
import contextlib

import pytest
import torch

from lthash.models.backbones import BACKBONES
from lthash.models.hashnet import param_groups
from lthash.supervised.codebooks import CODEBOOKS, bernoulli_codebook, gaussian_codebook, max_distance_codebook
from lthash.supervised.methods import METHODS, build

SMALL = dict(backbone='resnet20', bits=16, classes=10, size=32)


@pytest.mark.parametrize('method', METHODS)
def test_later_steps_read_no_value(method, monkeypatch):
    "Tensors on the meta device have no values, so reading one (which would stall a GPU) is an error there."
    net, loss = build(method, **SMALL)
    net, loss = net.to('meta'), loss.to('meta')
    monkeypatch.setattr(torch, 'autocast', lambda *a, **k: contextlib.nullcontext())   # which does not know that device
    x, y = torch.empty(4, 3, 32, 32, device='meta'), torch.empty(4, dtype=torch.int64, device='meta')
    with pytest.raises((RuntimeError, NotImplementedError)):
        net(x)                                                                # the first step looks
    net.values_checked = loss.values_checked = True
    loss(net(x), y).backward()                                                # the others do not
    loss(net(x), torch.empty(4, 10, device='meta')).backward()


@pytest.mark.parametrize('method', METHODS)
def test_build_is_deterministic_and_leaves_the_global_state_alone(method):
    torch.manual_seed(3)
    state = torch.get_rng_state()
    (a, la), (b, lb), (c, lc) = (build(method, bits=16, classes=10, size=32, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in ((a, b), (la, lb)):
        assert all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values()))
    assert not torch.equal(next(a.head.parameters()), next(c.head.parameters()))
    assert method == 'csq' or not torch.equal(la.codebook, lc.codebook)       # Hadamard rows have no seed


@pytest.mark.parametrize('method', METHODS)
def test_a_step_trains_backbone_and_head(method):
    net, loss = build(method, **SMALL)
    optimizer = torch.optim.Adam(param_groups(net, 1e-2, .1))
    before = {k: p.clone() for k, p in net.named_parameters()}
    loss(net(torch.rand(8, 3, 32, 32)), torch.arange(8)).backward()
    optimizer.step()
    assert all(not torch.equal(p, before[k]) for k, p in net.named_parameters())
    assert sum(len(g['params']) for g in optimizer.param_groups) == len(before)
    assert not list(loss.parameters())                                        # the codes are fixed


def test_normalisation_happens_inside_and_is_not_saved():
    net, _ = build('orthohash', **SMALL)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in ([.485, .456, .406], [.229, .224, .225]))
    torch.testing.assert_close(net.eval()(x), net.head(net.backbone((x - mean)/std)))
    assert not {'mean', 'std'} & set(net.state_dict())


@pytest.mark.parametrize('method', METHODS)
def test_outputs_are_float32_under_autocast(method):
    net, _ = build(method, bits=16, classes=10, size=32)
    with torch.autocast('cpu', torch.bfloat16):
        v = net(torch.rand(4, 3, 32, 32))
    assert v.dtype == torch.float32 and len(v.unique()) > 40   # bfloat16 would leave few


@pytest.mark.parametrize('x, message', [
    (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), 'found torch.uint8'),
    (torch.zeros(3, 32, 32), r'\(3, 32, 32\)'),
    (torch.zeros(1, 1, 32, 32), 'found'),
    (torch.full((1, 3, 32, 32), 200.), 'divide bytes by 255'),
    (torch.full((1, 3, 32, 32), -2.), 'leave the normalisation'),
    (torch.full((1, 3, 32, 32), float('nan')), 'lie in'),
])
def test_bad_images(x, message):
    with pytest.raises(ValueError, match=message):
        build('dpn', **SMALL)[0](x)


def test_heads_are_the_published_ones():
    def kinds(method):
        head = build(method, **SMALL)[0].head
        return [type(m).__name__ for m in (head if isinstance(head, torch.nn.Sequential) else [head])]
    assert kinds('orthohash') == ['Linear', 'BatchNorm1d']
    assert kinds('dpn') == ['Linear']
    assert kinds('csq') == ['Linear', 'ReLU', 'Dropout', 'Linear', 'ReLU', 'Linear', 'Tanh']


@pytest.mark.parametrize('backbone, size, options, expected', [
    ('resnet20', 32, {}, .5), ('alexnet', 64, {}, 0.), ('vit-small', 32, {}, .5), ('resnet20', 32, {'dropout': .1}, .1),
])
def test_dropout_of_csq(backbone, size, options, expected):
    "AlexNet has dropout of its own."
    net, _ = build('csq', backbone, bits=16, classes=10, size=size, **options)
    assert net.head[2].p == expected


@pytest.mark.parametrize('method, name', [(m, p) for m, entry in METHODS.items() for p in entry.published])
def test_published_settings_build(method, name):
    published = METHODS[method].published[name]
    _, loss = build(method, 'resnet20', bits=32, classes=10, size=32, published=name)
    assert all(getattr(loss, k) == v for k, v in published.loss.items())
    assert torch.equal(loss.codebook, CODEBOOKS[published.codebook](10, 32, 0).float())
    assert not published.backbone or published.backbone in BACKBONES


def test_overrides():
    _, loss = build('orthohash', **SMALL, margin=.3, codebook='max-distance')
    assert loss.margin == .3 and loss.scale == 8
    assert torch.equal(loss.codebook, max_distance_codebook(10, 16, 0).float())
    mine = gaussian_codebook(10, 16, 99)
    assert torch.equal(build('dpn', **SMALL, codebook=mine)[1].codebook, mine.float())


@pytest.mark.parametrize('method, options, message', [
    ('ortho', {}, 'method is one of orthohash'),
    ('dpn', {'published': 'csq'}, 'published settings of dpn are dpn, dpn-as-published; found .csq.'),
    ('dpn', {'codebook': 'hadamrd'}, 'codebook is one of'),
    ('dpn', {'codebook': bernoulli_codebook(9, 16)}, r'a \(10, 16\) table; found \(9, 16\)'),
    ('dpn', {'scale': 3.}, "dpn does not take all of .'scale'."),
    ('dpn', {'bits': 0}, 'multiple of 8'),
    ('dpn', {'classes': 1}, 'at least 2 classes'),
])
def test_bad_arguments(method, options, message):
    with pytest.raises(ValueError, match=message):
        build(method, **{**SMALL, **options})
