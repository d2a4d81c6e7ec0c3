"""The base generator's training: the layout it builds, its tokenizer, and kills at any time."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lthash.diffusion import pipelines
from lthash.diffusion.base_model import BaseRecipe, build_pipeline, build_tokenizer
from lthash.diffusion.base_training import train_base
from lthash.diffusion.pipelines import (
    embed,
    image_size,
    load_pipeline,
    pipeline_fingerprint,
    pipeline_networks,
    sample,
    to_images,
    to_latents,
    tokens,
)
from lthash.diffusion.textile_model import LOOM

CAPTIONS = ['a photo of a red floral fabric', 'a large star cloth on a blue ground']
SMALL = BaseRecipe(size=32, vae_width=8, widths=(16, 16, 16, 16), heads=2, text_width=16, text_layers=1, vae_steps=4,
                   vae_batch=4, steps=5, batch=4, warmup=2, cooldown=2)

def images(n=24):
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def captions(n=24):
    return [[CAPTIONS[(i + d) % 2] for i in range(n)] for d in range(2)]

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loom')
    train_base(images(), captions(), SMALL, folder/'work', folder/'out', 'cpu')
    return folder/'out'

def test_the_full_recipe_has_stable_diffusions_layout_and_fits():
    pipe = build_pipeline(LOOM, CAPTIONS)
    assert sum(name.endswith('attn2') for name, _ in pipe.unet.named_modules()) == 16
    assert 2*sum(p.numel() for part in pipeline_networks(pipe) for p in part.parameters()) < 16e6
    assert image_size(pipe) == 64

def test_known_words_are_one_token_and_other_words_letters():
    tokenizer = build_tokenizer(CAPTIONS, 16)
    for word in {w for c in CAPTIONS for w in c.split()}:
        assert len(tokenizer.tokenize(word)) == 1, word
    pieces = tokenizer.tokenize('xylophone zebra9')
    assert tokenizer.unk_token not in pieces
    assert ''.join(pieces).replace('</w>', ' ').split() == ['xylophone', 'zebra', '9']

def test_loads_offline_and_draws_by_seed(trained):
    pipe = load_pipeline(str(trained), device='cpu')
    three = sample(pipe, CAPTIONS[0], [1, 2, 3], steps=2)
    assert three.shape == (3, 3, 32, 32) and three.dtype == torch.uint8
    one = sample(pipe, [CAPTIONS[0]], [2], steps=2, batch=1)
    assert (three[1].int() - one[0].int()).abs().max() <= 2
    assert not torch.equal(three[0], three[1])
    assert sample(pipe, 'a star', [], steps=2).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match='2 prompts and 3 seeds'):
        sample(pipe, ['a', 'b'], [1, 2, 3])
    with pytest.raises(ValueError, match='dpm'):
        sample(pipe, 'a', [1], sampler='euler')

def test_latents_are_scaled_and_prompts_padded(trained):
    pipe = load_pipeline(str(trained), device='cpu')
    latents = to_latents(pipe, images(8))
    assert latents.shape == (8, 6, 8, 8)
    assert .5 < to_latents(pipe, images()).std() < 2         # scaling_factor = 1/deviation over training images
    assert to_images(pipe, latents).shape == (8, 3, 32, 32)
    assert tokens(pipe, ['a']).shape == (1, 16) and embed(pipe, ['a', CAPTIONS[0]]).shape == (2, 16, 16)
    assert to_latents(pipe, torch.zeros(1, 3, 50, 50, dtype=torch.uint8)).shape == (1, 6, 8, 8)     # any size

def test_missing_and_wrong_generators_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines, 'project_data', lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match='lthash train-loom'):
        load_pipeline('loom')
    with pytest.raises(OSError, match='model_index.json'):
        load_pipeline(str(tmp_path))

def test_wrong_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'uint8 \(n, 3, 32, 32\)'):
        train_base(images().float(), captions(), SMALL, tmp_path, tmp_path/'o')
    with pytest.raises(ValueError, match='one caption per image'):
        train_base(images(), captions(5), SMALL, tmp_path, tmp_path/'o')

CHILD = '''
import os
import sys
sys.path[:0] = [{tests!r}]
import test_textile_model as t
from lthash.diffusion import base_training
base_training.CHECKPOINT = 0.
real, count = base_training.atomic_write, [0]
def write(path, content):
    real(path, content)
    count[0] += 1
    if count[0] == {kill}:
        os.kill(os.getpid(), 9)
base_training.atomic_write = write
t.train_base(t.images(), t.captions(), t.SMALL, {work!r}, {out!r}, 'cpu')
'''

def test_killed_and_resumed_gives_the_same_bits(trained, tmp_path, root):
    for kill in (2, 4, 3):        # in the auto-encoder, in the U-Net, in the U-Net again
        code = CHILD.format(tests=str(Path(__file__).parent), kill=kill, work=str(tmp_path/'work'),
                            out=str(tmp_path/'out'))
        environment = {**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads()), 'PYTHONPATH': str(root)}
        result = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path/'out').exists()
    train_base(images(), captions(), SMALL, tmp_path/'work', tmp_path/'out', 'cpu')
    for file in sorted(trained.rglob('*.safetensors')):
        assert file.read_bytes() == (tmp_path/'out'/file.relative_to(trained)).read_bytes(), file
    a, b = (json.loads((f/'training.json').read_text()) for f in (trained, tmp_path/'out'))
    assert a['unet loss'] == b['unet loss'] and a['vae loss'] == b['vae loss']
    pipes = [load_pipeline(str(f), device='cpu') for f in (trained, tmp_path/'out')]
    assert len({pipeline_fingerprint(pipe) for pipe in pipes}) == 1

def test_a_training_can_be_extended(tmp_path):
    longer = replace(SMALL, steps=8)
    shorter = replace(longer, steps=6, cooldown=1)                  # the same learning rate up to step 5
    train_base(images(), captions(), shorter, tmp_path/'a', tmp_path/'short', 'cpu')
    meta = train_base(images(), captions(), longer, tmp_path/'b', tmp_path/'whole', 'cpu')
    whole = json.loads((tmp_path/'whole'/'training.json').read_text())['unet loss']
    short = json.loads((tmp_path/'short'/'training.json').read_text())['unet loss']
    assert short[:5] == whole[:5]
    assert len(whole) == 8 and meta is not None
