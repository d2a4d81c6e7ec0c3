"A folder becomes class-balanced: what is drawn, what is left alone, what is refused."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from lthash.augmentation import balanced_folder
from lthash.augmentation.balanced_folder import augment, augmented_set, representatives
from lthash.augmentation.plan import mix
from lthash.core.runtime import runs_dir
from lthash.data.base import TRAIN, VAL, ImageSet
from lthash.data.datasets import load
from lthash.diffusion.base_model import BaseRecipe, build_pipeline
from lthash.diffusion.pipelines import pipeline_fingerprint, prepare
from lthash.diffusion.synthetic import SyntheticConfig

QUICK = dict(method='textual inversion', scale=.003, shots=3, steps=2)
OPTIONS = dict(**QUICK, cas_samples=64, category='fabric', progress=False)


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
    monkeypatch.setattr(balanced_folder, 'shared_generator', lambda name: (pipe, fingerprint))


def test_several_labels_per_image():
    torch.manual_seed(0)
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 0, 0], [0, 1, 1]])
    assert representatives(labels, 0, 2).tolist() == [0, 3]                  # those with the fewest other classes first
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    parts = torch.zeros(5, dtype=torch.int8)
    data = ImageSet('several', 32, images, labels, parts, tuple('abcde'), ('x', 'y', 'z'), ('fabric',)*3)
    source = SyntheticConfig(size=32, batch=4, guidance=1., **QUICK)
    made, numbers = augmented_set(data, torch.arange(5), source, progress=False)
    assert torch.bincount(numbers, minlength=3).tolist() == [0, 2, 2]
    x, y = mix(data.images, labels, made, numbers)
    assert y.sum(0).tolist() == [4, 4, 4] and y[5:].sum(1).tolist() == [1]*4 and len(x) == 9
    assert len({i.numpy().tobytes() for i in made}) == len(made)             # three classes share a word, no image


def test_a_class_without_an_image_is_named():
    with pytest.raises(ValueError, match='class 1 has no image'):
        representatives(torch.tensor([0, 0, 2]), 1, 4)


@pytest.fixture
def photos(tmp_path):
    "Three classes of 6, 3 and 1 training images."
    rng = np.random.default_rng(0)
    for part, counts in dict(train=(6, 3, 1), val=(2, 2, 2)).items():
        for name, n in zip(('cloud', 'floral', 'wave'), counts):
            folder = tmp_path/'photos'/part/name
            folder.mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder/f'{i}.png')
    return tmp_path/'photos'


def held_out(data: ImageSet) -> set[bytes]:
    return {x.numpy().tobytes() for x in data.images[data.parts == VAL]}


def test_a_folder_becomes_balanced_and_loads_again(photos, tmp_path):
    made = augment(f'folder:{photos}', str(tmp_path/'out'), **OPTIONS)
    before, after = load(f'folder:{photos}', 32), load(f'folder:{made}', 32)
    assert torch.bincount(after.labels[after.parts == TRAIN]).tolist() == [6, 6, 6]
    assert int((after.parts == VAL).sum()) == 6 and held_out(before) == held_out(after)      # untouched
    record = json.loads((made/'augmentation.json').read_text())
    assert record['classes']['wave'] == {'real': 1, 'synthetic': 5, 'files': 'the first 1 are real'}
    assert {'accuracy', 'threshold', 'passed'} <= set(record['cas'])
    files = {p: p.stat().st_mtime_ns for p in made.glob('**/*.png')}
    next(iter(files)).unlink()
    concepts = {p: p.stat().st_mtime_ns for p in runs_dir().glob('concept/*/result.json')}
    augment(f'folder:{photos}', str(made), **OPTIONS)
    assert concepts == {p: p.stat().st_mtime_ns for p in runs_dir().glob('concept/*/result.json')}
    assert set(made.glob('**/*.png')) == set(files)
    assert sum(p.stat().st_mtime_ns != t for p, t in files.items()) == 1


def test_folders_that_would_mix_are_refused(photos, tmp_path):
    source = f'folder:{photos}'
    with pytest.raises(ValueError, match='lies inside the folder'):
        augment(source, str(photos/'train'), **OPTIONS)
    (tmp_path/'full').mkdir()
    (tmp_path/'full'/'x.txt').write_text('mine')
    with pytest.raises(ValueError, match='holds other files'):
        augment(source, str(tmp_path/'full'), **OPTIONS)
    (tmp_path/'old').mkdir()
    (tmp_path/'old'/'augmentation.json').write_text('{"settings": {"seed": 9}}')
    with pytest.raises(ValueError, match='other settings .*seed'):
        augment(source, str(tmp_path/'old'), **OPTIONS)
    with pytest.raises(ValueError, match='cas_samples'):
        augment(source, str(tmp_path/'new'), **{**OPTIONS, 'cas_samples': -1})
