"""The base generator's training: the layout it builds, its tokenizer, and kills at any time."""
import json, os, signal, subprocess, sys
from pathlib import Path

import pytest
import torch

from lthash import loom
from lthash.generators import embed, fingerprint, image_size, load, sample, to_images, to_latents, tokens

CAPTIONS = ['a photo of a red floral fabric', 'a large star cloth on a blue ground']
SMALL = loom.BaseRecipe(size=32, vae_width=8, widths=(16, 16, 16, 16), heads=2, text_width=16, text_layers=1, vae_steps=4, vae_batch=4, steps=5, batch=4, warmup=2, cooldown=2)

def images(n=24): return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
def captions(n=24): return [[CAPTIONS[(i + d) % 2] for i in range(n)] for d in range(2)]

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loom')
    loom.train_base(images(), captions(), SMALL, folder/'work', folder/'out', 'cpu')
    return folder/'out'

def test_the_full_recipe_has_stable_diffusions_layout_and_fits():
    pipe = loom.build(loom.LOOM, CAPTIONS)
    assert sum(name.endswith('attn2') for name, _ in pipe.unet.named_modules()) == 16
    assert sum(p.numel() for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())*2 < 16e6
    assert image_size(pipe) == 64

def test_known_words_are_one_token_and_other_words_letters():
    tokenizer = loom.build_tokenizer(CAPTIONS, 16)
    for word in {w for c in CAPTIONS for w in c.split()}: assert len(tokenizer.tokenize(word)) == 1, word
    pieces = tokenizer.tokenize('xylophone zebra9')
    assert tokenizer.unk_token not in pieces and ''.join(pieces).replace('</w>', ' ').split() == ['xylophone', 'zebra', '9']

def test_loads_offline_and_draws_by_seed(trained):
    pipe = load(str(trained), device='cpu')
    three = sample(pipe, CAPTIONS[0], [1, 2, 3], steps=2)
    assert three.shape == (3, 3, 32, 32) and three.dtype == torch.uint8
    one = sample(pipe, [CAPTIONS[0]], [2], steps=2, batch=1)
    assert (three[1].int() - one[0].int()).abs().max() <= 2
    assert not torch.equal(three[0], three[1])
    assert sample(pipe, 'a star', [], steps=2).shape == (0, 3, 32, 32)
    with pytest.raises(ValueError, match='2 prompts and 3 seeds'): sample(pipe, ['a', 'b'], [1, 2, 3])
    with pytest.raises(ValueError, match='dpm'): sample(pipe, 'a', [1], sampler='euler')

def test_latents_are_scaled_and_prompts_padded(trained):
    pipe = load(str(trained), device='cpu')
    latents = to_latents(pipe, images(8))
    assert latents.shape == (8, 6, 8, 8)
    assert .5 < to_latents(pipe, images()).std() < 2         # scaling_factor = 1/deviation over the training images
    assert to_images(pipe, latents).shape == (8, 3, 32, 32)
    assert tokens(pipe, ['a']).shape == (1, 16) and embed(pipe, ['a', CAPTIONS[0]]).shape == (2, 16, 16)
    assert to_latents(pipe, torch.zeros(1, 3, 50, 50, dtype=torch.uint8)).shape == (1, 6, 8, 8)     # any size

def test_missing_and_wrong_generators_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr('lthash.generators.project_data', lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match='lthash train-loom'): load('loom')
    with pytest.raises(OSError, match='model_index.json'): load(str(tmp_path))

def test_wrong_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r'uint8 \(n, 3, 32, 32\)'): loom.train_base(images().float(), captions(), SMALL, tmp_path, tmp_path/'o')
    with pytest.raises(ValueError, match='one caption an image'): loom.train_base(images(), captions(5), SMALL, tmp_path, tmp_path/'o')

CHILD = '''
import sys, os; sys.path[:0] = [{tests!r}]
import test_loom as t
from lthash import loom
loom.CHECKPOINT = 0.
real, count = loom.atomic_write, [0]
def write(path, content):
    real(path, content); count[0] += 1
    if count[0] == {kill}: os.kill(os.getpid(), 9)
loom.atomic_write = write
loom.train_base(t.images(), t.captions(), t.SMALL, {work!r}, {out!r}, 'cpu')
'''

def test_killed_and_continued_gives_the_same_bits(trained, tmp_path):
    for kill in (2, 4, 3):        # in the auto-encoder, in the U-Net, in the U-Net again
        code = CHILD.format(tests=str(Path(__file__).parent), kill=kill, work=str(tmp_path/'work'), out=str(tmp_path/'out'))
        result = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'OMP_NUM_THREADS': str(torch.get_num_threads())}, capture_output=True, text=True)
        assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (tmp_path/'out').exists()
    loom.train_base(images(), captions(), SMALL, tmp_path/'work', tmp_path/'out', 'cpu')
    for file in sorted(trained.rglob('*.safetensors')): assert file.read_bytes() == (tmp_path/'out'/file.relative_to(trained)).read_bytes(), file
    a, b = (json.loads((f/'training.json').read_text()) for f in (trained, tmp_path/'out'))
    assert a['unet loss'] == b['unet loss'] and a['vae loss'] == b['vae loss']
    assert fingerprint(load(str(trained), device='cpu')) == fingerprint(load(str(tmp_path/'out'), device='cpu'))

def test_a_training_can_be_prolonged(tmp_path):
    from dataclasses import replace
    longer = replace(SMALL, steps=8)
    loom.train_base(images(), captions(), replace(longer, steps=6, cooldown=1), tmp_path/'a', tmp_path/'short', 'cpu')     # the same rate up to step 5
    meta = loom.train_base(images(), captions(), longer, tmp_path/'b', tmp_path/'whole', 'cpu')
    whole = json.loads((tmp_path/'whole'/'training.json').read_text())['unet loss']
    assert json.loads((tmp_path/'short'/'training.json').read_text())['unet loss'][:5] == whole[:5]
    assert len(whole) == 8 and meta is not None
