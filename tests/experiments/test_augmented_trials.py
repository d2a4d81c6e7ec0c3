"Augmented trials: every ablation is another trial, no image serves two purposes, no stage is computed twice."
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from lthash.augmentation import plan
from lthash.augmentation.plan import mix
from lthash.core.runtime import digest
from lthash.data.config import load_data, training_set
from lthash.data.longtail import class_groups
from lthash.diffusion import synthetic
from lthash.diffusion.base_model import BaseRecipe, build_pipeline
from lthash.diffusion.cas import CASFailed, SmallCNN
from lthash.diffusion.pipelines import pipeline_fingerprint, prepare
from lthash.experiments import augmented_trials
from lthash.experiments.augmented_trials import AugmentedTrial, fit_stage, synthetic_images
from lthash.experiments.trials import GROUPS, PROTOCOLS, Trial, run, run_trials
from lthash.models.hashnet import HashNet
from lthash.models.training import TrainConfig
from lthash.supervised.methods import build as build_network

SHORT = TrainConfig(samples=64, batch=32, lr=2e-3, augmentation='none')
TINY = Trial(size=32, recipe=SHORT, train_per_class=12, val_per_class=2, imbalance='natural')
QUICK = dict(method='textual inversion', scale=.003, shots=3, steps=2, batch=4, guidance=1.)
SMALL = dict(pretrain=2, balance=4, cas_samples=64, personalized=('tail',))


@pytest.fixture(scope='module')
def pipe():
    "A generator with random weights that draws something in milliseconds."
    tiny = BaseRecipe(size=32, vae_width=16, widths=(16, 32, 32, 32), text_width=32)
    pipe = prepare(build_pipeline(tiny, ['a photo of a floral fabric']))
    pipe.scheduler.register_to_config(prediction_type='sample')
    return pipe


@pytest.fixture(autouse=True)
def generator(pipe, monkeypatch):
    fingerprint = pipeline_fingerprint(pipe)
    augmented_trials._drawn.cache_clear()
    for module in (synthetic, augmented_trials):
        monkeypatch.setattr(module, 'shared_generator', lambda name: (pipe, fingerprint))


def augmented(source: dict | None = None, **config) -> AugmentedTrial:
    "A small augmented trial; options of its images, and of its plan."
    return AugmentedTrial.of(TINY, {**SMALL, **config}, **{**QUICK, **(source or {})})


def long_tail():
    "The data set of the trials, and its long-tailed training set."
    data = load_data(TINY)
    return data, *training_set(TINY, data)


def test_a_plan_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match='another data set .*train_per_class'):
        AugmentedTrial(train_per_class=7)


def test_every_ablation_is_another_identity():
    base, attn = augmented(), dict(method='attndreambooth')
    others = [augmented(pretrain=0), augmented(balance=0), augmented(pretrain=3), augmented(pretrain_fraction=.25),
              augmented(keep_fraction=.5), augmented(personalized=('head', 'tail')),
              *(augmented(s) for s in (attn, {**attn, 'stages': 1}, {**attn, 'stages': 2},
                                       {**attn, 'regulariser': 'off'}, {**attn, 'regulariser': 'sum'}, dict(shots=2),
                                       dict(guidance=3.), dict(seed=1), dict(method='prompt')))]
    identities = [digest(t.config()) for t in (base, *others)]
    assert len(set(identities)) == len(identities)

    def same(trial: AugmentedTrial, other: AugmentedTrial) -> bool:
        return trial.config() == other.config()
    assert same(augmented(require_cas=True), base)                                  # strictness changes no number
    assert same(augmented({**attn, 'stages': 3}), augmented(attn))                  # the same by other words
    assert same(augmented({**attn, 'regulariser': 'mean'}), augmented(attn))
    assert not same(augmented({**attn, 'scale': .1}), augmented(attn))
    assert not same(augmented({**attn, 'lora_rank': 2}), augmented(attn))


def test_another_generator_is_another_trial(monkeypatch):
    before = digest(augmented().config())
    monkeypatch.setattr(augmented_trials, 'shared_generator', lambda name: (None, 'another'))
    assert augmented().config()['fingerprint'] == 'another' and digest(augmented().config()) != before


def test_pretraining_and_balancing_share_no_image_and_classes_fill_up():
    trial = augmented(pretrain=3, balance=6)
    data, chosen, counts = long_tail()
    wanted = trial.plan.wanted(counts)
    early = synthetic_images(trial, trial.plan, data, chosen, counts, wanted['pretrain'])
    late = synthetic_images(trial, trial.plan, data, chosen, counts, wanted['balance'], wanted['pretrain'])
    assert (torch.bincount(early[1]) == 3).all()
    images, labels = mix(data.images[chosen], data.labels[chosen], *late)
    assert (torch.bincount(labels).numpy() == np.maximum(counts, 6)).all()
    assert torch.equal(images[:len(chosen)], data.images[chosen])
    seen = {x.numpy().tobytes() for x in early[0]}
    assert len(seen) > len(early[0])//2 and not any(x.numpy().tobytes() in seen for x in late[0])


def test_only_the_named_groups_are_personalised(monkeypatch):
    taught, original = [], synthetic.class_concept

    def recorded(config, c, *args):
        taught.append((config.method, c))
        return original(config, c, *args)
    monkeypatch.setattr(synthetic, 'class_concept', recorded)
    trial = augmented()
    data, chosen, counts = long_tail()
    synthetic_images(trial, trial.plan, data, chosen, counts, np.ones(20, int))
    tail = set(class_groups(counts)['tail'].tolist())
    assert {c for method, c in taught if method != 'prompt'} == tail
    assert {c for method, c in taught if method == 'prompt'} == set(range(20)) - tail
    taught.clear()
    augmented_trials._drawn.cache_clear()
    synthetic_images(trial, trial.plan, data, chosen, counts, np.arange(20) == 0)
    assert [c for _, c in taught] == [0]                                    # what wants no image is not personalised


def test_classes_that_share_a_word_share_no_image():
    trial = augmented(dict(method='prompt'))
    data, chosen, counts = long_tail()
    wanted = trial.plan.wanted(counts)
    parts = (synthetic_images(trial, trial.plan, data, chosen, counts, wanted['pretrain']),
             synthetic_images(trial, trial.plan, data, chosen, counts, wanted['balance'], wanted['pretrain']))
    images, labels = (torch.cat(p) for p in zip(*parts))
    classes = {}
    for x, c in zip(images, labels.tolist()):
        classes.setdefault(x.numpy().tobytes(), set()).add(c)
    assert len({data.categories[c] for c in range(20)}) < 20 and all(len(c) == 1 for c in classes.values())
    assert len(classes) > len(images)//2


def test_a_filter_keeps_the_count(monkeypatch):
    trial = augmented(keep_fraction=.4)
    network = HashNet(SmallCNN(), nn.Linear(64, 20)).eval()
    monkeypatch.setattr(augmented_trials, 'tail_classifier', lambda *a: network)
    data, chosen, counts = long_tail()
    n = np.arange(20) % 4
    _, labels = synthetic_images(trial, trial.plan, data, chosen, counts, n)
    assert torch.bincount(labels, minlength=20).tolist() == n.tolist()


def test_stages_budget_rows_and_resuming(monkeypatch):
    shown, stop, original = [], True, augmented_trials.fit

    def counting(net, loss, images, labels, config, *args, **options):
        shown.append((config.samples, len(labels)))
        if stop and len(shown) == 2:
            raise KeyboardInterrupt
        return original(net, loss, images, labels, config, *args, **options)
    monkeypatch.setattr(augmented_trials, 'fit', counting)
    trial = replace(augmented(), recipe=replace(SHORT, samples=96))
    with pytest.raises(KeyboardInterrupt):
        run(trial)
    stop = False
    rows = run_trials([trial], 'table1')
    assert [samples for samples, _ in shown] == [48, 48, 48] and shown[0][1] == 40
    assert shown[1] == shown[2]                                              # the pretraining was not done again
    augmented_trials._drawn.cache_clear()
    monkeypatch.setattr(synthetic, 'generate', lambda *a, **k: pytest.fail('drawn again'))
    assert run_trials([trial], 'table1') == rows and len(shown) == 3
    assert {r['setting'] for r in rows} == {'textual-inversion'} and {r['group'] for r in rows} == set(GROUPS)
    assert {r['protocol'] for r in rows} == {*PROTOCOLS, 'validation'}
    first = rows[0]
    assert (first['samples'], first['pretrain_samples'], first['personalized']) == (96, 48, 'tail')
    assert {'cas', 'cas_threshold', 'cas_passed'} <= set(first) and 0 <= first['cas'] <= 1
    assert 'loom for Stable Diffusion' in first['substitutes']
    assert trial.codes().shape == (len(load_data(trial)), 4)


def test_a_strict_plan_refuses_before_training(monkeypatch):
    failed = {'accuracy': 0., 'class accuracy': {}, 'confusion': (np.ones((20, 20))/20).tolist(),
              'classes': list(range(20)), 'tested': 20, 'images': 40}
    monkeypatch.setattr(plan, 'cas', lambda *a, **k: failed)
    monkeypatch.setattr(augmented_trials, 'fit', lambda *a, **k: pytest.fail('trained on images that failed'))
    with pytest.raises(CASFailed):
        run(augmented(dict(seed=5), require_cas=True))


def test_a_stage_trains_on_several_labels_per_image():
    net, loss = build_network('orthohash', 'alexnet-small', bits=32, classes=3, size=32)
    images = torch.randint(0, 256, (9, 3, 32, 32), dtype=torch.uint8)
    labels = (torch.rand(9, 3) < .5).long().index_fill(1, torch.tensor([0]), 1)
    assert fit_stage(TINY, net, loss, images, labels, 64, None, 'several')['losses']
