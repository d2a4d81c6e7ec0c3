"Quality measures against brute force and torchmetrics, planted copies and leaks, the CAS test and the filters."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.kid import poly_mmd
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from lthash.data.config import DataConfig
from lthash.data.silk import render_many
from lthash.diffusion import cas, filters, quality
from lthash.diffusion.base_model import build_tokenizer
from lthash.models.training import TrainConfig


def clouds(m=30, n=25, d=7, shift=.4, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((m, d)), rng.standard_normal((n, d))*1.3 + shift

# --- measures against independent float64 references, written as loops

def kid_by_loops(x, y):
    def k(a, b):
        return (float(sum(p*q for p, q in zip(a, b)))/len(a) + 1)**3
    def pairs(s):
        return sum(k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j)/(len(s)*(len(s) - 1))
    return pairs(x) + pairs(y) - 2*sum(k(a, b) for a in x for b in y)/(len(x)*len(y))

def prdc_by_loops(x, y, k):
    def dist(a, b):
        return math.sqrt(sum((p - q)**2 for p, q in zip(a, b)))
    def radius(s):
        return [sorted(dist(a, b) for j, b in enumerate(s) if j != i)[k - 1] for i, a in enumerate(s)]
    rx, ry = radius(x), radius(y)
    return {'precision': np.mean([any(dist(b, a) <= r for a, r in zip(x, rx)) for b in y]),
            'recall': np.mean([any(dist(a, b) <= r for b, r in zip(y, ry)) for a in x]),
            'density': np.mean([sum(dist(b, a) <= r for a, r in zip(x, rx)) for b in y])/k,
            'coverage': np.mean([min(dist(a, b) for b in y) <= r for a, r in zip(x, rx)])}

@given(m=st.integers(2, 12), n=st.integers(2, 12), d=st.integers(1, 6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_kid_is_its_formula(m, n, d, seed):
    x, y = clouds(m, n, d, seed=seed)
    assert quality.kid(torch.tensor(x), torch.tensor(y)) == pytest.approx(kid_by_loops(x, y), rel=1e-10, abs=1e-10)

def test_kid_is_torchmetrics_mmd():
    x, y = map(torch.tensor, clouds(40, 40))
    assert quality.kid(x, y) == pytest.approx(poly_mmd(x, y, 3, None, 1.).item(), rel=1e-10)

def test_kid_is_unbiased_where_the_biased_estimate_is_not():
    draws = [clouds(8, 8, 4, 0., s) for s in range(400)]
    same = np.array([quality.kid(torch.tensor(x), torch.tensor(y/1.3)) for x, y in draws])
    def k(a, b):
        return ((a @ b.T)/a.shape[1] + 1)**3
    biased = np.array([k(x, x).mean() + k(y/1.3, y/1.3).mean() - 2*k(x, y/1.3).mean() for x, y in draws])
    error = same.std()/len(draws)**.5
    assert abs(same.mean()) < 4*error < biased.mean()

@given(m=st.integers(4, 20), n=st.integers(4, 20), k=st.integers(1, 3), shift=st.floats(-1, 1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_precision_recall_density_coverage_are_their_formulas(m, n, k, shift, seed):
    x, y = clouds(m, n, 3, shift, seed)
    found = quality.precision_recall_density_coverage(torch.tensor(x), torch.tensor(y), k)
    assert found == pytest.approx(prdc_by_loops(x, y, k), abs=1e-12)

def test_diversity_is_the_mean_distance_of_pairs():
    x = clouds(9)[0]
    expected = np.mean([np.linalg.norm(x[i] - x[j]) for i in range(9) for j in range(i)])
    assert quality.diversity(torch.tensor(x)) == pytest.approx(expected)

@pytest.mark.parametrize('wrong, message', [
    ((torch.zeros(3, 4), torch.zeros(3, 5)), 'the same d'),
    ((torch.zeros(1, 4), torch.zeros(3, 4)), 'at least 2'),
    ((torch.full((3, 4), math.nan), torch.zeros(3, 4)), 'finite'),
])
def test_bad_features_are_refused(wrong, message):
    for measure in (quality.kid, quality.precision_recall_density_coverage):
        with pytest.raises(ValueError, match=message):
            measure(*wrong)

# --- copies and leaks

def weave(n, first=0, classes=(2, 9)):
    labels = torch.arange(n) % len(classes)
    images = render_many([classes[c] for c in labels], range(first, first + n), size=32)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels

@pytest.mark.parametrize('disguise', ['none', 'mirror', 'brightness', 'noise'])
def test_planted_copies_are_found_and_other_images_are_not(disguise):
    (train, y_train), (held, y_held), (fresh, y) = weave(60), weave(120, 1000), weave(60, 5000)
    planted, made = [3, 17, 40], fresh.clone()
    for p in planted:
        x = train[p].float()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(p))
        x = {'none': x, 'mirror': x.flip(-1), 'brightness': .7*x + 20, 'noise': x + 12*noise}[disguise]
        made[p] = x.clamp(0, 255).to(torch.uint8)
    found = quality.suspiciously_near(made, train, held, (y, y_train, y_held))
    assert set(planted) <= set(found['candidates']) and set(found['candidates'][:3]) == set(planted)
    assert dict(zip(found['candidates'], found['targets']))[17] == 17
    clean = quality.suspiciously_near(fresh, train, held, (y, y_train, y_held))
    assert found['share'] <= (3 + 3)/60 and clean['share'] <= 3/60

def test_a_class_without_targets_is_an_error():
    x, y = weave(8)
    with pytest.raises(ValueError, match='class 1 has 0 targets'):
        quality.suspiciously_near(x, x[y == 0], x, (y, y[y == 0], y))

# --- large networks

@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp('clip')
    tokenizer = build_tokenizer(['a photo of a floral fabric', 'a wave'], 16)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    ids = {k: getattr(tokenizer, k) for k in ('bos_token_id', 'eos_token_id', 'pad_token_id')}
    text = dict(small, vocab_size=len(tokenizer), max_position_embeddings=16, **ids)
    vision = dict(small, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    crop = {'height': 32, 'width': 32}
    CLIPImageProcessor(size={'shortest_edge': 32}, crop_size=crop).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder

def test_a_local_clip_gives_image_and_text_vectors(clip):
    network = quality.PretrainedFeatures(clip)
    x, _ = weave(5)
    images, texts = network.images(x, batch=2), network.texts(['a photo of a floral fabric', 'a wave'])
    assert images.shape == (5, 24) and texts.shape == (2, 24)
    assert torch.allclose(images.norm(dim=1), torch.ones(5), atol=1e-5)
    assert torch.allclose(network.images(x[3:4]), images[3:4], atol=1e-5)
    expected = float((images.numpy() @ images.numpy().T).mean())
    assert quality.similarity(images, images) == pytest.approx(expected, abs=1e-6)

def test_a_network_without_text_says_so(tmp_path):
    config = ViTConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32,
                       patch_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    ViTImageProcessor(size={'height': 32, 'width': 32}).save_pretrained(tmp_path)
    network = quality.PretrainedFeatures(tmp_path)
    assert network.images(weave(3)[0]).shape == (3, 32)
    with pytest.raises(ValueError, match='has no text encoder: use a CLIP'):
        network.texts(['a'])

def test_a_missing_network_says_what_to_get(tmp_path):
    with pytest.raises(FileNotFoundError, match='local folder with config.json'):
        quality.PretrainedFeatures(tmp_path)

# --- the CAS test

QUICK = TrainConfig(samples=1600, batch=32, lr=5e-3, augmentation='none')

def coloured(n, classes=5, seed=0, meaning=True):
    "Images that a class's colour gives away, or not."
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    hue = torch.linspace(30, 220, classes)[labels if meaning else torch.randint(0, classes, (n,), generator=rng)]
    noise = 12*torch.randn(n, 3, 16, 16, generator=rng)
    return (hue[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8), labels

def test_informative_images_pass_and_others_are_never_used_silently():
    real, y = coloured(100, seed=9)
    good = cas.cas(*coloured(100), real, y, recipe=QUICK)
    assert good['accuracy'] > .9 and cas.cas_test(good).passed
    bad = cas.cas(*coloured(100, meaning=False), real, y, recipe=QUICK)
    with pytest.raises(cas.CASFailed, match='NOT PASSED.*of 5 classes.*do not mix them in'):
        cas.cas_test(bad)
    with pytest.warns(UserWarning, match='NOT PASSED'):
        result = cas.cas_test(bad, strict=False)
    assert not result.passed and result.accuracy <= result.threshold
    with pytest.raises(cas.CASFailed):
        cas.cas_test(good, threshold=1.)

def test_class_numbers_may_have_gaps_and_other_classes_are_left_out():
    (x, y), (real, z) = coloured(90, 3), coloured(60, 4, seed=9)
    found = cas.cas(x, torch.tensor([2, 5, 7])[y], real, torch.tensor([2, 5, 7, 8])[z], recipe=QUICK)
    assert found['classes'] == [2, 5, 7] and set(found['class accuracy']) == {2, 5, 7} and found['tested'] == 45
    assert np.allclose(np.sum(found['confusion'], 1), 1)
    with pytest.raises(ValueError, match=r'no real image to test classes \[1\]'):
        cas.cas(x, y, real[z != 1], z[z != 1], recipe=QUICK)
    with pytest.raises(ValueError, match='at least two classes'):
        cas.cas(x, torch.zeros_like(y), real, z, recipe=QUICK)

@given(classes=st.integers(5, 20), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_informative_labels_exceed_the_threshold(classes, seed):
    rng = np.random.default_rng(seed)
    knowing = .6*np.eye(classes) + .4*rng.dirichlet(np.ones(classes), classes)
    assert 1/classes <= cas.permutation_threshold({'confusion': knowing}, draws=2000) < np.trace(knowing)/classes

@pytest.mark.parametrize('classes', [6, 12])
def test_uninformative_sets_pass_about_once_in_a_hundred(classes):
    rng, passed = np.random.default_rng(0), []
    for _ in range(600):
        favourites = rng.dirichlet(np.full(classes, .3))             # an uninformed network has some
        confusion = np.stack([rng.dirichlet(5*favourites + .01) for _ in range(classes)])
        passed.append(np.trace(confusion)/classes > cas.permutation_threshold({'confusion': confusion}, draws=1000))
    assert sum(passed) <= 14                                         # of 600 at 1 %: more than 14 has a chance of 0.1 %

# --- the filters

def noisy_set():
    rng = torch.Generator().manual_seed(1)
    labels = torch.arange(120) % 3
    centre = torch.eye(3, 8)*4
    features = centre[labels] + .3*torch.randn(120, 8, generator=rng)
    bad = torch.arange(0, 120, 4)
    features[bad] += 5*torch.randn(len(bad), 8, generator=rng)
    real_labels = torch.arange(30) % 3
    return features, labels, centre[real_labels] + .3*torch.randn(30, 8, generator=rng), real_labels, bad

def test_the_filter_drops_strays_and_its_control_is_as_large_class_by_class():
    features, labels, real, real_labels, bad = noisy_set()
    done = filters.filter_nearest(features, labels, real, real_labels, keep=.75)
    assert not set(done.kept.tolist()) & set(bad.tolist())
    assert torch.equal(labels[done.kept].bincount(), labels[done.control].bincount())
    assert len(set(done.control.tolist())) == len(done.control)
    assert set(done.control.tolist()) & set(bad.tolist()), 'the control is blind'
    assert done.log.rejected.tolist() == pytest.approx([.25]*3) and done.log.kept.sum() == len(done.kept)

def test_recognition_rejects_unequally_and_says_so():
    logits, labels = torch.full((60, 3), -1.), torch.arange(60) % 3
    logits[torch.arange(60), labels] = 2.
    wrong = (labels == 1).nonzero()[:15, 0]
    logits[wrong, 0] = 5.
    done = filters.filter_recognised(logits, labels)
    assert done.log.set_index('class').rejected.to_dict() == pytest.approx({0: 0., 1: .75, 2: 0.})
    assert torch.equal(labels[done.kept].bincount(), labels[done.control].bincount())
    assert not set(done.kept.tolist()) & set(wrong.tolist())
    none_right = -logits.abs()*torch.nn.functional.one_hot(labels, 3)
    few = filters.filter_recognised(none_right, labels, least=.1)
    assert (few.log.kept == 2).all()                     # a tenth of each class stays, or the class would be lost

def test_an_empty_share_is_refused():
    with pytest.raises(ValueError, match='share in'):
        filters.filter_nearest(*noisy_set()[:4], keep=0.)

# --- the report

def test_every_real_image_has_one_role_and_the_report_has_every_class(monkeypatch, tmp_path):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    config, recipe = DataConfig(imbalance='natural', train_per_class=24, val_per_class=6), replace(QUICK, samples=640)
    real = cas.eval_set(config, recipe=recipe, per_class=8)
    data, split = real.data, real.split
    roles = [set(x.tolist()) for x in (real.reference, real.spare, split.validation, split.query)]
    assert sum(map(len, roles)) == len(set.union(*roles)) and roles[0] | roles[1] == set(split.train.tolist())
    assert set(real.training.tolist()) <= set(split.train.tolist())
    again = cas.eval_set(config, recipe=recipe, per_class=8)
    weights = (s.reference_classifier.state_dict().values() for s in (real, again))
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    x, y = data.images[real.spare], data.labels[real.spare]
    frame = cas.quality_report(x, y, real, k=3)
    assert set(frame.group) == {'all', 'head', 'mid', 'tail', *data.classes} and frame.value.notna().all()
    value = frame.set_index(['measure', 'group']).value
    assert value['diversity', 'all'] == pytest.approx(np.mean([value['diversity', c] for c in data.classes]))
    leaked, queries, z = x.clone(), data.images[split.query], data.labels[split.query]
    for c in range(20):
        leaked[(y == c).nonzero()[0, 0]] = queries[(z == c).nonzero()[0, 0]]
    found = cas.quality_report(leaked, y, real, k=3).set_index(['measure', 'group']).value['near a query']
    assert all(found[c] >= 1/11 - 1e-9 for c in data.classes) and value['near a query', 'all'] < .05
