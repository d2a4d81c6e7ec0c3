"Adding a loss, an unsupervised method, a personalisation method, a data set or a backbone takes one file, and no more."
import sys
from dataclasses import replace

import pytest

from lthash.core.runtime import digest
from lthash.data.datasets import DATASETS
from lthash.diffusion.methods import METHODS as PERSONALIZATION
from lthash.experiments.augmented_trials import AugmentedTrial
from lthash.experiments.baseline_trials import BaselineTrial
from lthash.experiments.trials import Trial, run
from lthash.experiments.unsupervised_trials import UnsupervisedTrial
from lthash.models.backbones import BACKBONES
from lthash.models.training import TrainConfig
from lthash.supervised.methods import METHODS as SUPERVISED
from lthash.unsupervised.features import FeatureConfig
from lthash.unsupervised.methods import METHODS as UNSUPERVISED

SHORT = TrainConfig(samples=64, batch=32, lr=2e-3, augmentation='none')
BASE = Trial(size=32, imbalance='natural', train_per_class=12, val_per_class=3, bits=16, recipe=SHORT)
FEATURES = FeatureConfig(size=32, train_per_class=16, val_per_class=6, views=2, pretraining=640)
PLAN = dict(pretrain=2, balance=4, personalized=('tail',), cas_samples=64)
IMAGES = dict(scale=.003, shots=3, steps=2, batch=4)

EXISTING = [
    BASE, replace(BASE, method='CSQ', backbone='resnet20'), replace(BASE, method='DPN', backbone='vit-small'),
    replace(BASE, dataset='cifar10'), replace(BASE, weights='silk'),
    BaselineTrial.of(BASE, 'mixup'), BaselineTrial.of(BASE, 'SMOTE'),
    *(AugmentedTrial.of(BASE, PLAN, method=m, **IMAGES) for m in ('attndreambooth', 'prompt')),
    *(UnsupervisedTrial(m, 16, 0, FEATURES, 2) for m in ('InfoNCE', 'BSCDH', 'TBH', 'ITQ')),
]

LOSS = '''
import torch
from lthash.supervised.codebooks import HashLoss
from lthash.supervised.dpn import dpn_head
from lthash.supervised.methods import METHODS, PublishedConfig, SupervisedMethod

class Squared(HashLoss):
    "Squared distance to the class's code."
    def objective(self, v, positive):
        return (v - positive @ self.codebook).square().mean()

METHODS['squared'] = SupervisedMethod(Squared, dpn_head, {'squared': PublishedConfig('a test', 'bernoulli', {})})
'''
UNSUPERVISED_METHOD = '''
from torch import nn
from lthash.unsupervised.base import UnsupervisedMethod
from lthash.unsupervised.methods import METHODS

class Agree(UnsupervisedMethod):
    "Two views have one code."
    def __init__(self, features, bits):
        super().__init__()
        self.head = nn.Linear(features, bits)
    def forward(self, f):
        return self.head(f).tanh()
    def loss(self, batch):
        return (self(batch.first) - self(batch.second)).square().mean()

METHODS['agree'] = Agree
'''
PERSONALISATION = '''
from lthash.diffusion.methods import METHODS, PersonalizationMethod, Stage

STAGES = Stage('cross-attention', 100, 1e-4),
METHODS['loom']['cross-attention only'] = PersonalizationMethod('cross-attention only', STAGES)
'''
DATASET = '''
from dataclasses import replace
import torch
from lthash.data.datasets import DATASETS, load

def upside_down(size, train_per_class=None, val_per_class=None, seed=0):
    "Silk, turned upside down."
    data = load('silk', size, train_per_class or 12, val_per_class or 3, seed)
    return replace(data, name='upside-down', images=torch.from_numpy(data.images.numpy()).flip(2))

DATASETS['upside-down'] = upside_down
'''
BACKBONE = '''
from torch import nn
from lthash.models.backbones import BACKBONES, Backbone

def tiny(size):
    "One convolution."
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

BACKBONES['tiny'] = Backbone(tiny, '4', 8, 32)
'''
ADDITIONS = {
    'my_loss': (LOSS, SUPERVISED, 'squared', lambda: replace(BASE, method='squared')),
    'my_method': (UNSUPERVISED_METHOD, UNSUPERVISED, 'agree',
                  lambda: UnsupervisedTrial('agree', 16, 0, FEATURES, 1, checks=1)),
    'my_personalisation': (PERSONALISATION, PERSONALIZATION['loom'], 'cross-attention only',
                           lambda: AugmentedTrial.of(BASE, PLAN, method='cross-attention only', **IMAGES)),
    'my_dataset': (DATASET, DATASETS, 'upside-down',
                   lambda: replace(BASE, dataset='upside-down', imbalance='exponential', imbalance_factor=4.)),
    'my_backbone': (BACKBONE, BACKBONES, 'tiny', lambda: replace(BASE, backbone='tiny')),
}


@pytest.mark.parametrize('name', ADDITIONS)
def test_an_addition_is_one_file_and_changes_no_identity(name, tmp_path, monkeypatch):
    source, table, key, trial = ADDITIONS[name]
    before = [digest(t.config()) for t in EXISTING]
    assert len(set(before)) == len(before)
    (tmp_path/f'{name}.py').write_text(source, encoding='utf-8')
    monkeypatch.syspath_prepend(tmp_path)
    try:
        __import__(name)
        result = run(trial())
        assert run(trial()) == result and trial().codes().shape[1] == 2
        assert trial().rows('example')
        assert [digest(t.config()) for t in EXISTING] == before
        mine = digest(trial().config())
        assert mine not in before
    finally:
        table.pop(key, None)
        sys.modules.pop(name, None)

