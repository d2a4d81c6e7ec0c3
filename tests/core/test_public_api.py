"The package as it is imported: lazy, typed by its own words, open to any network and any loss."
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lthash as lh

FIXED = ('load', 'retrieval_split', 'build', 'fit', 'encode', 'mean_average_precision', 'BinaryIndex', 'personalize',
         'generate', 'Trial', 'run', 'TrainConfig')


def python(code: str) -> str:
    "What a fresh interpreter prints."
    return subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_takes_no_time():
    def seconds(code: str) -> float:
        begin = time.perf_counter()
        python(code)
        return time.perf_counter() - begin
    empty = statistics.median(seconds('pass') for _ in range(3))
    imported = statistics.median(seconds('import lthash') for _ in range(3))
    assert imported - empty < .3                     # 0.02 s at the last look; a busy machine is slower
    heavy = ('torch', 'numpy', 'pandas', 'diffusers')
    assert python(f'import sys, lthash; print([m for m in {heavy} if m in sys.modules])') == '[]'


@pytest.mark.parametrize('name', sorted({*FIXED, *lh.__all__}))
def test_every_public_name_is_there(name):
    assert name in dir(lh) and name in lh.__all__
    assert getattr(lh, name).__doc__


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match='public names are .*BinaryIndex'):
        lh.BinarIndex                                # noqa: B018
    with pytest.raises(ImportError):
        from lthash import train  # noqa: F401


def test_names_are_forgiving():
    "A method by the capitals of its paper."
    _, loss = lh.build('OrthoHash', bits=16, classes=3, size=32)
    assert type(loss).__name__ == 'OrthoHash'
    assert type(lh.build('CSQ', bits=16, classes=3, size=32)[1]).__name__ == 'CSQ'


@pytest.mark.parametrize('arguments, parts', [
    (dict(method='orthohush'), ('orthohush', 'orthohash', 'csq', 'dpn')),
    (dict(method='OrthoHash', bits=33), ('33', 'multiple of 8', '32 or 40')),
    (dict(method='OrthoHash', backbone='resnet18'), ('resnet18', 'resnet20', 'resnet50')),
    (dict(method='OrthoHash', published='paper'), ('orthohash-as-published',)),
    (dict(method='OrthoHash', codebook='random'), ('bernoulli', 'hadamard')),
    (dict(method='OrthoHash', sigma=3.), ('sigma',)),
])
def test_wrong_guesses_are_answered(arguments, parts):
    with pytest.raises(ValueError) as error:
        lh.build(**{'classes': 10, 'size': 32, **arguments})
    for part in parts:
        assert part in str(error.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises((ValueError, OSError), match='nowhere'):
        lh.load(f'folder:{tmp_path}/nowhere')
    with pytest.raises(ValueError, match='silk'):
        lh.load('slik')


class OwnNetwork(nn.Module):
    "A backbone that no list knows."
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())

    def forward(self, x):
        return self.layers(x)


def own_loss(outputs, labels):
    "Pairs of one class towards cosine 1, all others towards 0."
    cosine = F.normalize(outputs) @ F.normalize(outputs).T
    return F.mse_loss(cosine, (labels[:, None] == labels).float())


def test_any_network_is_a_backbone_and_any_callable_a_loss():
    images, labels = torch.rand(48, 3, 16, 16), torch.arange(48) % 3
    images[labels == 1] *= .3
    net, _ = lh.build('orthohash', backbone=OwnNetwork(), bits=16, classes=3, size=16)
    before = [p.clone() for p in net.parameters()]
    lh.fit(net, own_loss, images, labels, lh.TrainConfig(samples=96, batch=24, augmentation='none'))
    assert any(not torch.equal(a, b) for a, b in zip(before, net.parameters()))
    codes = lh.encode(net, images)
    assert codes.shape == (48, 2) and codes.dtype == np.uint8
    found = lh.mean_average_precision(codes, labels, codes, labels)
    assert .3 < found <= 1
    assert len(lh.BinaryIndex(16).add(codes).search(codes[:2], 5)[1]) == 2
