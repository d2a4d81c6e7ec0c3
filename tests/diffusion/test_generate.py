"""Generation: independence of the batch, exact resume after kills, extension, refusal, export; a class's images."""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms.v2.functional import InterpolationMode, resize

from lthash.data.base import TRAIN, retrieval_split
from lthash.data.config import load_data, training_set
from lthash.data.datasets import load
from lthash.diffusion import generate as module
from lthash.diffusion import synthetic
from lthash.diffusion.base_model import BaseRecipe, build_pipeline
from lthash.diffusion.generate import ImageStore, Prompt, export_folder, generate, generate_classes
from lthash.diffusion.pipelines import pipeline_fingerprint, prepare
from lthash.diffusion.synthetic import SyntheticConfig, few_shot_indices, synthetic_class, synthetic_set

CAPTIONS = ['a photo of a floral fabric', 'a photo of a cloud fabric', 'roundel lattice wave stripe']

def small():
    "A generator with random weights that draws something in milliseconds."
    recipe = BaseRecipe(size=32, vae_width=16, widths=(16, 32, 32, 32), text_width=32)
    pipe = prepare(build_pipeline(recipe, CAPTIONS))
    pipe.scheduler.register_to_config(prediction_type='sample')   # random weights would drift into black
    return pipe

@pytest.fixture(scope='module')
def pipe():
    return small()

QUICK = dict(size=32, steps=3, progress=False)

def test_an_image_depends_on_its_number_and_not_on_the_batch(pipe, tmp_path):
    whole = generate(pipe, CAPTIONS[0], 13, tmp_path/'a', batch=13, guidance=2., **QUICK)   # multiplies rounding
    parts = generate(pipe, CAPTIONS[0], 13, tmp_path/'b', batch=4, guidance=2., **QUICK)
    difference = (whole.int() - parts.int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < .01                    # rounding
    assert len({x.numpy().tobytes() for x in whole}) == 13 and whole.float().std() > 5   # they are not all alike
    other = generate(pipe, CAPTIONS[0], 13, tmp_path/'c', batch=13, seed=1, guidance=2., **QUICK)
    assert (other != whole).any()

def test_fresh_images_are_the_later_numbers(pipe, tmp_path):
    whole = generate(pipe, CAPTIONS[0], 11, tmp_path/'a', batch=4, **QUICK)
    later = generate(pipe, CAPTIONS[0], 3, tmp_path/'b', batch=4, first=8, **QUICK)
    assert torch.equal(whole[8:], later)
    assert json.loads((tmp_path/'b'/'manifest.json').read_text())['digests'].keys() == {'2'}
    assert torch.equal(generate(pipe, CAPTIONS[0], 11, tmp_path/'b', batch=4, **QUICK), whole)

def test_more_images_extend_a_folder_and_nothing_is_drawn_twice(pipe, tmp_path, monkeypatch):
    calls, sample = [], module.sample
    def counted(pipe, prompt, seeds, **options):
        calls.append(len(seeds))
        return sample(pipe, prompt, seeds, **options)
    monkeypatch.setattr(module, 'sample', counted)
    five = generate(pipe, CAPTIONS[0], 5, tmp_path, batch=4, **QUICK).clone()
    assert calls == [4, 4]
    assert torch.equal(generate(pipe, CAPTIONS[0], 5, tmp_path, batch=4, **QUICK), five) and calls == [4, 4]
    assert torch.equal(generate(pipe, CAPTIONS[0], 10, tmp_path, batch=4, **QUICK)[:5], five) and calls == [4, 4, 4]
    generate(pipe, CAPTIONS[0], 20, tmp_path, batch=2, **QUICK)         # the folder keeps its batches of 4
    assert json.loads((tmp_path/'manifest.json').read_text())['batch'] == 4

def test_other_settings_are_refused_by_name(pipe, tmp_path):
    generate(pipe, CAPTIONS[0], 2, tmp_path, batch=2, **QUICK)
    changes = [(dict(steps=4), 'steps 3 there, 4 wanted'), (dict(seed=1), 'seed'), (dict(guidance=1.), 'guidance'),
               (dict(sampler='ddim'), 'sampler'), (dict(size=16), 'size')]
    for changed, named in changes:
        with pytest.raises(ValueError, match=f'images of other settings.*{named}.*another folder'):
            generate(pipe, CAPTIONS[0], 2, tmp_path, batch=2, **{**QUICK, **changed})
    with pytest.raises(ValueError, match='concept .*prompt'):
        generate(pipe, CAPTIONS[1], 2, tmp_path, batch=2, **QUICK)
    other = small()
    with torch.no_grad():
        next(other.unet.parameters()).add_(.1)
    with pytest.raises(ValueError, match='generator'):
        generate(other, CAPTIONS[0], 2, tmp_path, batch=2, **QUICK)
    for wrong in (dict(n=-1), dict(first=-1), dict(batch=0)):
        options = {**dict(n=2, folder=tmp_path, batch=2), **wrong, **QUICK}
        with pytest.raises(ValueError, match='at least'):
            generate(pipe, CAPTIONS[0], **options)

def test_a_damaged_or_lost_batch_is_drawn_again(pipe, tmp_path):
    whole = generate(pipe, CAPTIONS[0], 8, tmp_path, batch=4, **QUICK).clone()
    with open(tmp_path/'images.u8', 'r+b') as file:
        file.seek(5000)
        file.write(b'\x00\xff'*50)
    assert torch.equal(generate(pipe, CAPTIONS[0], 8, tmp_path, batch=4, **QUICK), whole)
    with open(tmp_path/'images.u8', 'r+b') as file:
        file.truncate(4*3*32*32 + 17)
    assert torch.equal(generate(pipe, CAPTIONS[0], 8, tmp_path, batch=4, **QUICK), whole)

def test_writing_to_the_result_does_not_reach_the_folder(pipe, tmp_path):
    whole = generate(pipe, CAPTIONS[0], 4, tmp_path, batch=4, **QUICK)
    before = whole.clone()
    whole.zero_()
    assert torch.equal(generate(pipe, CAPTIONS[0], 4, tmp_path, batch=4, **QUICK), before)

def test_images_are_kept_at_the_size_of_the_hashing_network(pipe, tmp_path):
    whole = generate(pipe, CAPTIONS[0], 2, tmp_path/'a', batch=2, **QUICK)
    half = generate(pipe, CAPTIONS[0], 2, tmp_path/'b', batch=2, **{**QUICK, 'size': 16})
    assert torch.equal(half, resize(whole, [16, 16], InterpolationMode.BICUBIC, antialias=True))

REQUESTS = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), min_size=1, max_size=4)


@given(requests=REQUESTS, batch=st.integers(1, 6))
@settings(deadline=None, max_examples=30)
def test_any_order_of_requests_gives_the_same_images(tmp_path_factory, requests, batch):
    "The store alone, with images that name their number."
    folder = tmp_path_factory.mktemp('store')
    for first, n in requests:
        store = ImageStore(folder, {'size': 2}, batch)
        for b in store.missing(first, n):
            numbers = torch.arange(b*batch, (b + 1)*batch, dtype=torch.uint8)
            store.put(b, numbers[:, None, None, None].expand(-1, 3, 2, 2).contiguous())
        assert store.missing(first, n) == []
        assert store.get(first, n)[:, 0, 0, 0].tolist() == list(range(first, first + n))

KILLED = '''
import sys, time
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_generate as t
sample = t.module.sample
def slow(*args, **options):
    time.sleep(.1)
    return sample(*args, **options)
t.module.sample = slow
t.generate(t.small(), t.CAPTIONS[0], 40, {folder!r}, batch=2, **t.QUICK)
'''

def test_a_killed_generation_ends_with_the_same_bytes(pipe, tmp_path, monkeypatch, root):
    threads, straight, folder, calls = torch.get_num_threads(), tmp_path/'straight', tmp_path/'killed', []
    manifest = folder/'manifest.json'
    def count():
        return json.loads(manifest.read_text())['images'] if manifest.exists() else 0
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    process = subprocess.Popen([sys.executable, '-c', code], cwd=root, env={**os.environ, 'PYTHONPATH': str(root)})
    while process.poll() is None and count() < 6:
        time.sleep(.01)
    time.sleep(.13)                                              # somewhere in a batch
    process.send_signal(signal.SIGKILL)
    process.wait()
    there, sample = count(), module.sample
    assert 6 <= there < 40
    with open(folder/'images.u8', 'ab') as file:
        file.write(b'half a batch')                              # what a kill between image and manifest leaves
    torch.set_num_threads(1)
    try:
        expected = generate(pipe, CAPTIONS[0], 40, straight, batch=2, **QUICK)
        monkeypatch.setattr(module, 'sample', lambda *a, **o: calls.append(1) or sample(*a, **o))
        resumed = generate(pipe, CAPTIONS[0], 40, folder, batch=2, **QUICK)
    finally:
        torch.set_num_threads(threads)
    assert len(calls) == (40 - there)//2                         # what the manifest lists is not drawn again
    assert torch.equal(expected, resumed)
    for file in ('images.u8', 'manifest.json'):
        assert (folder/file).read_bytes() == (straight/file).read_bytes()

def test_a_failure_midway_takes_the_concept_off_and_keeps_the_batches(pipe, tmp_path, monkeypatch):
    state = []
    @dataclass(frozen=True)
    class Word(Prompt):
        @contextmanager
        def applied(self, generator):
            state.append('on')
            try:
                yield generator
            finally:
                state.append('off')
    sample, left = module.sample, [3]
    def dies(*a, **o):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return sample(*a, **o)
    monkeypatch.setattr(module, 'sample', dies)
    with pytest.raises(KeyboardInterrupt):
        generate(pipe, Word(CAPTIONS[0]), 10, tmp_path, batch=2, **QUICK)
    assert state == ['on', 'off'] and json.loads((tmp_path/'manifest.json').read_text())['images'] == 6

def test_classes_become_an_image_set_and_survive_the_export(pipe, tmp_path):
    made = generate_classes(pipe, CAPTIONS[:2], [3, 2], tmp_path/'made', classes=['peony spray', 'cloud/crane'],
                            categories=['floral', 'cloud'], first=[0, 4], batch=2, **QUICK)
    assert made.labels.tolist() == [0, 0, 0, 1, 1] and made.categories == ('floral', 'cloud')
    assert len(set(made.ids)) == 5 and (made.parts == TRAIN).all()
    folder = export_folder(made, tmp_path/'out')
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob('*.png')) == [
        'cloud_crane/00000.png', 'cloud_crane/00001.png', *(f'peony spray/0000{i}.png' for i in range(3))]
    back = load(f'folder:{folder}', 32)
    assert {x.numpy().tobytes() for x in back.images} == {x.numpy().tobytes() for x in made.images}
    assert len(list(export_folder(made, tmp_path/'jpg', 'jpg').rglob('*.jpg'))) == 5
    with pytest.raises(ValueError, match="'png' or 'jpg'"):
        export_folder(made, tmp_path/'no', 'gif')
    with pytest.raises(ValueError, match='share a folder'):
        export_folder(replace(made, classes=('a/b', 'a_b')), tmp_path/'no')
    with pytest.raises(ValueError, match='as many concepts'):
        generate_classes(pipe, CAPTIONS[:2], [3], tmp_path/'made', classes=['a', 'b'], **QUICK)

# --- from a long-tailed set to images of its classes

@pytest.fixture()
def home(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv('LTHASH_HOME', str(tmp_path))
    monkeypatch.setattr(synthetic, 'shared_generator', lambda name: (pipe, pipeline_fingerprint(pipe)))
    return tmp_path

TINY = SyntheticConfig(train_per_class=12, val_per_class=2, scale=.01, shots=4, steps=3, batch=2)

def test_a_synthetic_class_is_made_once(home, monkeypatch):
    first = synthetic_class(TINY, 7, 3).clone()
    cached = synthetic.cached
    def stored(stage, config, compute):
        return cached(stage, config, lambda folder: pytest.fail('personalised twice'))
    monkeypatch.setattr(synthetic, 'cached', stored)
    monkeypatch.setattr(module, 'sample', lambda *a, **o: pytest.fail('drawn twice'))
    assert torch.equal(synthetic_class(TINY, 7, 3), first) and first.shape == (3, 3, 32, 32)
    with pytest.raises(pytest.fail.Exception, match='drawn twice'):
        synthetic_class(replace(TINY, guidance=1.), 7, 3)      # the same concept, other images
    for change in (dict(seed=1), dict(shots=3), dict(method='textual inversion'), dict(scale=.02)):
        with pytest.raises(pytest.fail.Exception, match='personalised twice'):
            synthetic_class(replace(TINY, **change), 7, 3)

def test_the_generator_sees_only_long_tailed_training_images_and_few_of_them(home):
    data = load_data(TINY)
    training, counts = training_set(TINY, data)
    seen = few_shot_indices(TINY, data)
    assert {c: len(at) for c, at in seen.items()} == {c: min(4, n) for c, n in enumerate(counts.tolist())}
    split = retrieval_split(data)
    allowed = set(training.tolist()) - set(split.query.tolist()) - set(split.validation.tolist())
    assert all(set(at.tolist()) <= allowed for at in seen.values())
    assert all((data.labels[at] == c).all() for c, at in seen.items())

def test_sets_of_classes_have_the_data_sets_class_numbers(home):
    made = synthetic_set(replace(TINY, method='prompt'), [2, 1], [7, 3], progress=False)
    assert made.labels.tolist() == [7, 7, 3] and len(made.classes) == 20
    assert torch.equal(made.images[:2], synthetic_class(replace(TINY, method='prompt'), 7, 2))

def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="method is 'prompt' or one of"):
        SyntheticConfig(method='magic')
    with pytest.raises(ValueError, match='budget one of'):
        SyntheticConfig(budget='none')
