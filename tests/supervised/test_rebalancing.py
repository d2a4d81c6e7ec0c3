"The rebalancing techniques against independent references, their controls, and trials that use them."
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lthash.models.hashnet import HashNet
from lthash.models.training import TrainConfig, batch_indices
from lthash.supervised import rebalancing
from lthash.supervised.codebooks import bernoulli_codebook, hadamard_codebook
from lthash.supervised.csq import CSQ
from lthash.supervised.methods import build
from lthash.supervised.orthohash import OrthoHash
from lthash.supervised.rebalancing import (
    GENERATOR_FREE,
    TECHNIQUES,
    BatchTransform,
    Blended,
    LogitAdjusted,
    Selection,
    Setup,
    Weighted,
    duplicated,
    effective_weights,
    resampled,
    smote,
)

COUNTS = st.lists(st.integers(1, 12), min_size=2, max_size=6)
LABELS = COUNTS.map(lambda counts: torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)))


@settings(max_examples=30, deadline=None)
@given(LABELS, st.integers(0, 3))
def test_copies_are_even_to_one(y, seed):
    at = duplicated(y, seed)
    assert (torch.bincount(y[at]) == torch.bincount(y).max()).all()
    for c in y.unique():
        times = torch.bincount(at, minlength=len(y))[y == c]
        assert times.max() - times.min() <= 1


def test_resampling_is_even_over_classes_and_within_them():
    y = torch.tensor([0]*9 + [1])
    shown = torch.bincount(resampled(y, 20_000), minlength=10)
    assert abs(int(shown[9]) - 10_000) < 400 and (abs(shown[:9] - 10_000/9) < 200).all()
    assert torch.equal(resampled(y, 50, 1), resampled(y, 50, 1))
    assert not torch.equal(resampled(y, 50, 1), resampled(y, 50, 2))


def test_a_selection_trains_as_the_copied_images_do():
    images, order = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8), torch.tensor([5, 0, 0, 3])
    index, selection = batch_indices(4, 3, 1, 0), Selection(images, order).to('cpu')
    assert torch.equal(selection[index], images[order][index]) and len(selection) == 4


def test_effective_numbers_follow_the_formula():
    counts = np.array([1, 10, 100])
    raw = np.array([.1/(1 - .9**n) for n in counts])
    np.testing.assert_allclose(effective_weights(counts, .9), raw*3/raw.sum(), rtol=1e-5)
    np.testing.assert_allclose(effective_weights(counts, 0.), 1.)
    near_one = effective_weights(counts, .999999)
    np.testing.assert_allclose(near_one/near_one[0], [1, .1, .01], rtol=1e-3)       # beta to 1: the inverse count


@pytest.mark.parametrize('method', ['orthohash', 'csq', 'dpn'])
@pytest.mark.parametrize('multi', [False, True])
def test_weights_are_those_of_single_images_for_every_loss(method, multi):
    torch.manual_seed(0)
    _, loss = build(method, 'alexnet-small', 'random', bits=32, classes=5, size=32)
    v, y = torch.tanh(torch.randn(9, 32)), torch.randint(0, 5, (9,))
    w = effective_weights(np.array([50, 20, 9, 3, 1]), .99)
    if multi:
        y = (torch.rand(9, 5) < .5).long().index_fill(1, torch.tensor([2]), 1)
    own = w[y] if not multi else (y*w).sum(1)/y.sum(1)
    each = torch.stack([loss(v[[i]], y[[i]]) for i in range(9)])
    torch.testing.assert_close(Weighted(loss, w)(v, y), (each*own).mean())
    torch.testing.assert_close(Weighted(loss, torch.ones(5))(v, y), loss(v, y))


def test_logit_adjustment_against_its_equation_and_where_it_does_not_exist():
    loss = OrthoHash(bernoulli_codebook(4, 16), margin=.2)
    v, y, counts = torch.randn(7, 16), torch.randint(0, 4, (7,)), np.array([40, 20, 5, 1])
    logits = loss.scale*(F.normalize(v) @ F.normalize(loss.codebook).T - .2*F.one_hot(y, 4))
    logits = logits + torch.tensor(counts/counts.sum()).log().float()
    torch.testing.assert_close(LogitAdjusted(loss, counts)(v, y), F.cross_entropy(logits, y))
    with pytest.raises(ValueError, match='needs a loss with logits.*CSQ'):
        LogitAdjusted(CSQ(hadamard_codebook(4, 16)), counts)


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_blends_have_the_proportion_they_claim(kind):
    torch.manual_seed(3)
    x = torch.eye(8).reshape(8, 8, 1, 1).expand(8, 8, 16, 16)[:, :3].contiguous()      # image i is white in channel i
    transform = BatchTransform(kind)
    for _ in range(5):
        made = transform(x).reshape(8, 3, 256)
        weight, partner = transform.mix
        wanted = weight*x.mean((2, 3)) + (1 - weight)*x[partner].mean((2, 3))
        torch.testing.assert_close(made.mean(2), wanted, atol=1e-5, rtol=1e-4)

    def loss(v: Tensor, y: Tensor) -> Tensor:
        return (v.mean(1)*y).mean()
    y, v = torch.rand(8), torch.rand(8, 4)
    torch.testing.assert_close(Blended(loss, transform)(v, y), weight*loss(v, y) + (1 - weight)*loss(v, y[partner]))


def test_randaugment_keeps_range_and_differs_by_image():
    torch.manual_seed(0)
    made = BatchTransform('randaugment')(torch.rand(1, 3, 32, 32).expand(12, 3, 32, 32))
    assert 0 <= made.min() and made.max() <= 1 and len({m.numpy().tobytes() for m in made}) > 6


def test_a_bad_transform_is_named():
    with pytest.raises(ValueError, match="found 'cutout'"):
        BatchTransform('cutout')


@settings(max_examples=30, deadline=None)
@given(LABELS, st.integers(0, 3))
def test_smote_stays_on_segments_of_its_class(y, seed):
    x = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(seed))
    grown, grown_y = smote(x, y, seed=seed)
    assert torch.equal(grown[:len(x)], x) and (torch.bincount(grown_y) == torch.bincount(y).max()).all()
    for c in y.unique():
        own, new = x[y == c], grown[len(x):][grown_y[len(x):] == c]
        assert (new >= own.amin(0) - 1e-5).all() and (new <= own.amax(0) + 1e-5).all()
        if len(own) == 2 and len(new):
            assert (torch.cdist(new, own).sum(1) - torch.dist(*own)).abs().max() < 1e-4


# The techniques, on thirty images of three classes and a long-tailed dozen of them

IMAGES = torch.randint(0, 256, (30, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
POOL_LABELS = torch.arange(30) % 3
CHOSEN = torch.cat([(POOL_LABELS == c).nonzero()[:n, 0] for c, n in enumerate((8, 3, 1))])


def setup(folder, home, monkeypatch, samples: int = 64, **changes) -> Setup:
    "A setup with a home of its own."
    monkeypatch.setenv('LTHASH_HOME', str(home))
    config = TrainConfig(samples=samples, batch=32, lr=2e-3, augmentation='none')
    values = dict(build=lambda: build('orthohash', 'resnet20', bits=16, classes=3, size=32), images=IMAGES,
                  labels=POOL_LABELS, pool=torch.arange(30), chosen=CHOSEN, counts=np.array([8, 3, 1]), config=config,
                  bits=16, seed=0, order_seed=0, folder=folder, identity={'samples': samples})
    return Setup(**{**values, **changes})


@pytest.mark.parametrize('technique', TECHNIQUES)
def test_every_technique_trains_within_the_budget(technique, tmp_path, monkeypatch):
    shown, original = [], rebalancing.fit

    def counting(net, loss, images, labels, config, *args, **options):
        shown.append(config.samples)
        return original(net, loss, images, labels, config, *args, **options)
    monkeypatch.setattr(rebalancing, 'fit', counting)
    net, history = TECHNIQUES[technique](setup(tmp_path, tmp_path/'home', monkeypatch))
    assert sum(shown) == 64 and isinstance(net, HashNet)
    assert {'losses', 'seconds', 'stopped_early'} <= set(history) and np.isfinite(history['losses']).all()
    assert net.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 16)


def test_frozen_features_do_not_move_and_are_trained_once(tmp_path, monkeypatch):
    shared = setup(tmp_path, tmp_path/'home', monkeypatch)
    TECHNIQUES['SMOTE'](shared)
    file, = (tmp_path/'home'/'runs'/'features').glob('*/network.safetensors')
    written = file.stat().st_mtime_ns
    before = rebalancing.read_weights(file)
    after, _ = TECHNIQUES['decoupled re-training'](replace(shared, folder=tmp_path/'other'))
    assert file.stat().st_mtime_ns == written
    for name, value in after.state_dict().items():
        if name.startswith('backbone.'):
            assert torch.equal(value, before[name]), name
    heads = [(k, v) for k, v in after.state_dict().items() if k.startswith('head.') and v.is_floating_point()]
    assert any(not torch.equal(v, before[k]) for k, v in heads)


def test_the_upper_bound_contains_the_long_tailed_set(tmp_path, monkeypatch):
    seen = {}

    def record(net, loss, images, labels, *args, **options):
        seen.update(images=images, labels=labels)
        return {'losses': [], 'seconds': 0., 'stopped_early': ''}
    monkeypatch.setattr(rebalancing, 'fit', record)
    shared = setup(tmp_path, tmp_path/'home', monkeypatch, pool=torch.arange(27))        # three images are held out
    chosen = shared.pool[rebalancing.take(POOL_LABELS[:27], np.array([8, 3, 1]), 0)]
    _, history = TECHNIQUES['extra real images'](replace(shared, chosen=chosen))
    assert torch.bincount(seen['labels']).tolist() == [8, 8, 8] and history['images'] == 24
    have = {i.numpy().tobytes() for i in seen['images']}
    assert all(i.numpy().tobytes() in have for i in IMAGES[chosen])
    assert not any(i.numpy().tobytes() in have for i in IMAGES[27:])


def test_control_and_bound_are_no_generator_free_baselines():
    assert set(TECHNIQUES) - set(GENERATOR_FREE) == {'duplicates', 'extra real images'}


def test_joined_stages_add_up():
    first, second = ({'losses': [a], 'seconds': a, 'stopped_early': '', 'best': a} for a in (1., 2.))
    assert rebalancing.joined(first, second) == {'losses': [1., 2.], 'seconds': 3., 'stopped_early': ''}
    assert isinstance(TECHNIQUES, dict) and all(isinstance(f, type(rebalancing.joined)) for f in TECHNIQUES.values())


def test_a_frozen_backbone_stays_in_evaluation_mode():
    net = rebalancing.FrozenBackbone(HashNet(build('orthohash', 'resnet20', bits=16, size=32)[0].backbone,
                                             nn.Linear(64, 16))).train()
    assert net.head.training and not net.backbone.training
    assert {p.requires_grad for p in net.backbone.parameters()} == {False}
