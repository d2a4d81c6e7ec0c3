"Two dozen trials of all kinds give the codes that the first version of the project gave, bit for bit."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lthash.core.runtime import digest
from lthash.diffusion import generate, synthetic
from lthash.experiments import augmented_trials
from lthash.experiments.augmented_trials import AugmentedTrial
from lthash.experiments.baseline_trials import BaselineTrial
from lthash.experiments.trials import Trial, run
from lthash.experiments.unsupervised_trials import UnsupervisedTrial
from lthash.models.training import TrainConfig
from lthash.unsupervised.features import FeatureConfig

GOLDEN = json.loads(Path(__file__).with_name('golden.json').read_text(encoding='utf-8'))
SHORT = TrainConfig(samples=128, batch=32, lr=2e-3, augmentation='none')
BASE = Trial(size=32, imbalance='natural', train_per_class=12, val_per_class=3, bits=16, recipe=SHORT)
PLAN = dict(pretrain=2, balance=4, personalized=('tail',), cas_samples=64)
IMAGES = dict(scale=.003, shots=3, steps=2, batch=4)
FEATURES = FeatureConfig(size=32, train_per_class=16, val_per_class=6, views=2, pretraining=640)
SGD = replace(SHORT, optimizer='sgd', schedule='step-80', backbone_lr_mult=.1)
FEW = dict(hidden=64)


def unsupervised(method, options=FEW, epochs=2):
    return UnsupervisedTrial(method, 16, 0, FEATURES, epochs, options, checks=2)


TRIALS = {
    'orthohash balanced': BASE,
    'orthohash long-tail crop': replace(BASE, train_set='long-tail', seed=1,
                                        recipe=replace(SHORT, augmentation='crop-flip')),
    'csq resnet20': replace(BASE, method='CSQ', backbone='resnet20', train_set='long-tail'),
    'dpn vit-small bf16': replace(BASE, method='DPN', backbone='vit-small',
                                  recipe=replace(SHORT, precision='bfloat16')),
    'orthohash published sgd': replace(BASE, published='orthohash-as-published', imbalance='exponential', recipe=SGD,
                                       imbalance_factor=4., train_set='long-tail'),
    'pretrained on silk': replace(BASE, weights='silk', bits=24),
    'augmented attndreambooth': AugmentedTrial.of(BASE, PLAN, method='attndreambooth', **IMAGES),
    'augmented prompt, filtered': AugmentedTrial.of(BASE, {**PLAN, 'keep_fraction': .5}, method='prompt', **IMAGES),
    **{f'baseline {t}': BaselineTrial.of(BASE, t)
       for t in ('decoupled re-training', 'mixup', 'SMOTE', 'logit adjustment')},
    'InfoNCE': unsupervised('InfoNCE', dict(hidden=64, queue=64)),
    'BSCDH': unsupervised('BSCDH', dict(hidden=64, queue=64, lambda_b='printed', suppressed=.1, hp_s=.6)),
    'CIBH': unsupervised('CIBH'),
    'DSCH': unsupervised('DSCH'),
    'TBH': unsupervised('TBH'),
    'BGAN': unsupervised('BGAN'),
    'ITQ': unsupervised('ITQ', {}, 0.),
    'InfoNCE fresh': UnsupervisedTrial('InfoNCE', 16, 1, replace(FEATURES, views=0, imbalance_factor=3.), 1,
                                       dict(hidden=64, queue=32), checks=2),
}


def same_machine() -> bool:
    "The machine and the libraries that the codes were computed with?"
    lines = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    cpu = next((line.split(':')[1].strip() for line in lines if line.startswith('model name')), '')
    return GOLDEN['machine'] == {'torch': torch.__version__, 'cpu': cpu}


def test_every_golden_trial_is_run():
    assert set(TRIALS) == set(GOLDEN['trials'])


@pytest.mark.parametrize('name', TRIALS)
def test_codes_are_what_they_were(name, monkeypatch):
    # image seeds derive from a concept's identity, which names the code that made it
    for module in (generate, synthetic):
        monkeypatch.setattr(module, 'concept_identity', lambda c: digest(['golden', c.prompt]))
    if name != 'augmented attndreambooth':
        monkeypatch.undo()
    augmented_trials._drawn.cache_clear()          # images of other tests have other seeds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run(TRIALS[name])
        codes = TRIALS[name].codes()
    finally:
        torch.set_num_threads(threads)
    expected = np.frombuffer(bytes.fromhex(GOLDEN['trials'][name]['codes']), np.uint8).reshape(codes.shape)
    if same_machine():
        assert np.array_equal(codes, expected)
    else:              # sums of floats are rounded differently elsewhere, and a bit near zero may flip
        assert np.unpackbits(codes ^ expected).mean() < .1
