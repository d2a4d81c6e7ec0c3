"Personalisation: what each stage changes, an independent loop, interruption, and what identifies a concept."
import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from lthash.core.runtime import derive_seed
from lthash.diffusion.attention import cross_attentions, noise_schedule, observe
from lthash.diffusion.base_model import build_tokenizer
from lthash.diffusion.concepts import with_tokens
from lthash.diffusion.methods import (
    AUGMENTATIONS,
    METHODS,
    TRAINS,
    PersonalizationMethod,
    Stage,
    initial_vectors,
    views,
)
from lthash.diffusion.personalize import identity, personalize
from lthash.diffusion.pipelines import load_pipeline, pipeline_fingerprint, prepare, sample, to_latents, tokens

pytestmark = pytest.mark.usefixtures('one_thread')
ATTNDREAMBOOTH, STAGES = METHODS['matched']['attndreambooth'], ('vector', 'cross-attention', 'unet')


def quick(*stages: Stage, **other) -> PersonalizationMethod:
    "A method of a few steps."
    return PersonalizationMethod('test', stages, views=2, **other)


THREE = quick(Stage('vector', 2, 1e-2, 2, .1), Stage('cross-attention', 2, 1e-3, 2, 2., 5.),
              Stage('unet', 2, 1e-3, 2, 2., 5.))


def weights(pipe) -> dict:
    "A copy of all weights."
    networks = {'text_encoder': pipe.text_encoder, 'vae': pipe.vae, 'unet': pipe.unet}
    return {f'{name}.{k}': v.detach().clone() for name, n in networks.items() for k, v in n.state_dict().items()}


def changed(a: dict, b: dict) -> set:
    "Names of the tensors that differ."
    assert a.keys() == b.keys()
    return {k for k in a if not a[k].equal(b[k])}


# ---- what each stage changes

def test_each_stage_changes_its_tensors_and_nothing_else(unharmed, class_images):
    seen = []
    personalize(unharmed, class_images, 'floral fabric', THREE, watch=lambda done, pipe: seen.append(weights(pipe)))
    table = [k for k in seen[0] if k.endswith('token_embedding.weight')]
    unet = {k for k in seen[0] if k.startswith('unet.')}
    parts = ('to_q.weight', 'to_k.weight', 'to_v.weight', 'to_out.0.weight', 'to_out.0.bias')
    attn2 = {f'unet.{name}.{part}' for name in cross_attentions(unharmed.unet) for part in parts}
    assert len(seen) == 4 and len(attn2) == 16*5 and attn2 < unet
    assert [changed(a, b) for a, b in zip(seen, seen[1:])] == [set(table), attn2, unet]
    rows = (seen[0][table[0]] != seen[1][table[0]]).any(1)
    assert rows.nonzero().flatten().tolist() == [len(rows) - 1], 'only the row of [V]'


def test_dreambooth_trains_the_unet_and_no_vector(unharmed, class_images):
    method = quick(Stage('unet', 2, 1e-3, 2, prior_weight=1.), initial='sks', prior_images=3, prior_steps=2)
    concept = personalize(unharmed, class_images, 'floral fabric', method)
    assert concept.vectors.equal(initial_vectors(unharmed, method, 'floral fabric'))
    assert set(concept.unet) == {n for n, _ in unharmed.unet.named_parameters()}


def test_textual_inversion_leaves_the_unet(unharmed, class_images):
    method = quick(Stage('vector', 2, 1e-2, 2), vectors=2, prompts=('a photo of {V}', 'a red {V}'))
    concept = personalize(unharmed, class_images, 'floral fabric', method)
    assert not concept.unet and concept.tokens == ['<cls-000>', '<cls-000>_1']
    assert concept.prompt == 'a photo of <cls-000> <cls-000>_1'
    assert not (concept.vectors == initial_vectors(unharmed, method, 'floral fabric')).any()


def test_plain_stage_is_a_plain_loop_bitwise(pipe, new_pipe, class_images):
    "Without formula (1) the loop is DreamBooth's, written here once more without anything of the module's."
    steps, seed, lr = 3, 5, 1e-3
    method = quick(Stage('cross-attention', steps, lr, 2, 0., 0.), augmentation='none')
    concept = personalize(pipe, class_images, 'floral', method, seed=seed)
    other, schedule = new_pipe(), noise_schedule(pipe)
    latents = to_latents(other, class_images.repeat_interleave(2, 0))
    with with_tokens(other, ['<cls-000>'], initial_vectors(other, method, 'floral')):
        text = other.text_encoder(tokens(other, ['a photo of a <cls-000> floral']))[0]
    trained = [p.requires_grad_() for n, p in other.unet.named_parameters() if '.attn2.' in n]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=1e-2, fused=True)
    for step in range(steps):
        at = np.random.default_rng(derive_seed('personalize', seed, 0, step)).integers(len(latents), size=2)
        g = torch.Generator().manual_seed(derive_seed('personalize noise', seed, 0, step))
        noise, t = torch.randn((2, *latents.shape[1:]), generator=g), torch.randint(0, 1000, (2,), generator=g)
        x = latents[torch.from_numpy(at)]
        predicted = other.unet(schedule.add_noise(x, noise, t), t, text.expand(2, -1, -1)).sample
        loss = F.mse_loss(predicted, schedule.get_velocity(x, noise, t))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.)
        optimizer.step()
    assert len(concept.unet) == len(trained)
    assert all(d.equal((p.detach() - b).half()) for d, p, b in zip(concept.unet.values(), trained, before))


def test_prior_images_count_in_the_loss_and_not_in_the_regulariser(pipe, class_images):
    def method(weight, prior_steps):
        return quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5., prior_weight=weight), prior_images=2,
                     prior_steps=prior_steps)
    one, two = (personalize(pipe, class_images, 'floral', method(1., steps)) for steps in (2, 3))   # other prior images
    without = personalize(pipe, class_images, 'floral', quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5.)))
    assert one.log['steps'][0][3] > 0
    np.testing.assert_allclose(one.log['steps'][0][3], two.log['steps'][0][3], rtol=1e-4)
    assert changed(one.unet, two.unet) and changed(one.unet, without.unet)


@pytest.mark.parametrize('trains', STAGES)
def test_gradients_are_clipped_on_what_is_trained(pipe, class_images, trains):
    "Adam does not see the scale of a gradient, except through its epsilon: with a tiny bound nothing moves."
    moved = []
    for clip in (1e-14, 0.):
        method = quick(Stage(trains, 1, 1e-3, 2, clip=clip, weight_decay=0.))
        concept = personalize(pipe, class_images, 'floral', method)
        vectors = (concept.vectors - initial_vectors(pipe, method, 'floral')).flatten()
        deltas = [d.flatten().float() for d in concept.unet.values()]
        moved.append(torch.cat([vectors, *deltas]).abs().max().item())
    assert moved[0] < 1e-7 < 5e-4 < moved[1]


# ---- methods and input

def test_initial_vectors(pipe):
    rows = pipe.text_encoder.get_input_embeddings().weight
    row = lambda word: rows[pipe.tokenizer.convert_tokens_to_ids(word + '</w>')]
    initial = lambda **other: initial_vectors(pipe, quick(Stage('vector', 1, 1, 1), **other), 'floral fabric')
    assert initial()[0].equal(row('floral')) and initial(category_tokens='last')[0].equal(row('fabric'))
    assert initial(category_tokens='mean')[0].equal((row('floral') + row('fabric'))/2)
    assert initial(vectors=3).equal(torch.stack([row('floral'), row('fabric'), row('fabric')]))
    assert initial(initial='lattice')[0].equal(row('lattice'))


def test_published_budgets_and_the_matched_one():
    published = METHODS['as_published']
    assert [m.training_samples for m in published.values()] == [12000, 800, 5280]
    for budget in ('matched', 'loom'):
        shared = {(m.training_samples, m.prompts, m.augmentation, m.views) for m in METHODS[budget].values()}
        assert len(shared) == 1
    assert [s.steps for s in ATTNDREAMBOOTH.scaled(.2).stages] == [12, 20, 100]
    assert [s.steps for s in ATTNDREAMBOOTH.scaled(1e-9).stages] == [1, 1, 1]
    assert [s.trains for s in ATTNDREAMBOOTH.stages] == list(STAGES) == list(TRAINS)
    assert {s.reduction for s in published['attndreambooth'].stages} == {'sum'}


@pytest.mark.parametrize('make, reason', [
    (lambda: Stage('attn', 1, 1.), 'trains vector'),
    (lambda: Stage('unet', 0, 1.), 'at least 1 step'),
    (lambda: Stage('unet', 1, 1., reduction='max'), 'reduction is one of'),
    (lambda: replace(ATTNDREAMBOOTH, prompts=('a photo of {V}',)), 'formula .1. needs one prompt'),
    (lambda: quick(Stage('unet', 1, 1., prior_weight=1.)), 'prior_images is 0'),
    (lambda: quick(), 'at least one stage'),
    (lambda: replace(ATTNDREAMBOOTH, augmentation='blur'), 'augmentation is one of'),
    (lambda: replace(ATTNDREAMBOOTH, category_tokens='all'), 'category_tokens is'),
])
def test_bad_methods(make, reason):
    with pytest.raises(ValueError, match=reason):
        make()


def test_bad_input(pipe, class_images):
    for images, category, token, reason in (
            (class_images.float(), 'floral', '<cls-000>', 'uint8 of shape'),
            (class_images[:0], 'floral', '<cls-000>', 'at least one'),
            (class_images, ' ', '<cls-000>', 'empty'),
            (class_images, 'floral', '<Silk>', 'bracketed, lower case'),
            (class_images, 'a floral silk fabric that is far too long', '<cls-000>', 'text encoder reads')):
        with pytest.raises(ValueError, match=reason):
            personalize(pipe, images, category, THREE, token)


def test_views_are_drawn_once_and_by_seed(class_images):
    state = torch.get_rng_state()
    for name in AUGMENTATIONS:
        a, b, c = (views(class_images, name, 2, 24, seed) for seed in (0, 0, 1))
        assert a.shape == (6, 3, 24, 24) and a.dtype == torch.uint8 and a.equal(b)
        assert (name == 'none') == (a.equal(c) and a[0].equal(a[1]))
    assert torch.get_rng_state().equal(state)


def test_identity_notices_everything_that_matters(pipe, class_images):
    def found(**other):
        given = dict(generator=pipe, images=class_images, category='floral', method=THREE, seed=0)
        return identity(**{**given, **other})
    other = copy.copy(pipe)
    other.vae = copy.deepcopy(pipe.vae)
    next(other.vae.parameters()).data[0] += 1e-3
    variants = [found(), found(images=class_images.flip(-1)), found(images=class_images[:2]), found(category='lattice'),
                found(method=THREE.scaled(2)), found(method=THREE.lora()), found(seed=1), found(generator=other)]
    assert len(set(variants)) == len(variants) and found() == variants[0]


def test_a_new_method_changes_no_other_identity(pipe, class_images, monkeypatch):
    before = identity(pipe, class_images, 'floral', THREE)
    monkeypatch.setitem(METHODS['loom'], 'new', quick(Stage('unet', 7, 1e-3)))
    monkeypatch.setitem(METHODS, 'new budget', {})
    monkeypatch.setitem(TRAINS, 'biases', lambda name: name.endswith('bias'))
    monkeypatch.setitem(AUGMENTATIONS, 'new', lambda side: torch.nn.Identity())
    assert identity(pipe, class_images, 'floral', THREE) == before
    monkeypatch.setitem(AUGMENTATIONS, THREE.augmentation, lambda side: torch.nn.Identity())
    assert identity(pipe, class_images, 'floral', THREE) != before, 'what it uses counts'


# ---- interruption

LONG = quick(Stage('vector', 4, 1e-2, 2, .1), Stage('cross-attention', 40, 1e-4, 2, 2., 5.),
             Stage('unet', 3, 1e-3, 2, 2., 5.))
CHILD = f'''
import sys
import numpy as np
import torch
from lthash.diffusion.methods import PersonalizationMethod, Stage
from lthash.diffusion.personalize import personalize
from lthash.diffusion.pipelines import load_pipeline
torch.set_num_threads(1)
base, images, folder = sys.argv[1:]
images = torch.from_numpy(np.load(images))
personalize(load_pipeline(base, 'cpu'), images, 'floral', {LONG!r}, folder=folder, every=0.)
'''


def test_killed_and_resumed_is_the_same_to_the_bit(new_pipe, class_images, tmp_path):
    new_pipe().save_pretrained(tmp_path/'base')
    np.save(tmp_path/'images.npy', class_images.numpy())
    base, folder = load_pipeline(str(tmp_path/'base'), 'cpu'), tmp_path/'concept'
    path = folder/'checkpoint.safetensors'
    arguments = [tmp_path/'base', tmp_path/'images.npy', folder]
    child = subprocess.Popen([sys.executable, '-c', CHILD, *map(str, arguments)],
                             env={**os.environ, 'OMP_NUM_THREADS': '1'})

    def progress():
        if not path.exists():
            return 0, 0
        with safe_open(path, 'pt') as file:
            return tuple(int(file.metadata()[k]) for k in ('stage', 'step'))

    try:
        deadline = time.time() + 120
        while progress() < (1, 3):
            assert child.poll() is None and time.time() < deadline
            time.sleep(.02)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert (1, 3) <= progress() < (1, 40) and not (folder/'concept.json').exists(), 'killed in the middle of stage 2'
    resumed = personalize(base, class_images, 'floral', LONG, folder=folder)
    straight = personalize(base, class_images, 'floral', LONG)
    assert resumed.vectors.equal(straight.vectors) and not changed(resumed.unet, straight.unet)
    assert resumed.log == straight.log and not path.exists()
    renamed = personalize(base, class_images, 'floral', LONG, token='<cls-007>', folder=folder)
    assert renamed.token == '<cls-007>', 'finished: loaded, under any name'
    with pytest.raises(ValueError, match='holds another concept'):
        personalize(base, class_images.flip(-1), 'floral', LONG, folder=folder)


def test_a_checkpoint_of_something_else_is_refused(unharmed, class_images, tmp_path):
    def interrupt(done, pipe):
        if done == 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        personalize(unharmed, class_images, 'floral', THREE, folder=tmp_path, watch=interrupt, every=0.)
    assert (tmp_path/'checkpoint.safetensors').exists() and not (tmp_path/'concept.json').exists()
    with pytest.raises(ValueError, match='delete it, or choose another folder'):
        personalize(unharmed, class_images, 'lattice', THREE, folder=tmp_path)
    resumed = personalize(unharmed, class_images, 'floral', THREE, folder=tmp_path, probes=1)
    straight = personalize(unharmed, class_images, 'floral', THREE, probes=2)
    steps = lambda concept: [p['step'] for p in concept.log['probes']]
    assert steps(resumed) == steps(straight)[:5] + [2]


# ---- Stable Diffusion's own parts

def stable_diffusion(folder, captions, where: str, small: bool) -> StableDiffusionPipeline:
    "Stable Diffusion 2.1's own kinds of parts with random weights, small or at full size."
    tokenizer = build_tokenizer(captions, 77)
    text = json.loads((folder/'text_encoder'/'config.json').read_text())
    text |= dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                 pad_token_id=tokenizer.pad_token_id)
    unet, vae = UNet2DConditionModel.load_config(folder/'unet'), AutoencoderKL.load_config(folder/'vae')
    if small:
        text |= dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)
        unet |= dict(block_out_channels=[32]*4, attention_head_dim=4, cross_attention_dim=32, sample_size=8,
                     norm_num_groups=8)
        vae |= dict(block_out_channels=[8]*4, norm_num_groups=8)
    scheduler = PNDMScheduler.from_config(PNDMScheduler.load_config(folder/'scheduler'))
    with torch.device(where):
        parts = {'unet': UNet2DConditionModel.from_config(unet), 'vae': AutoencoderKL.from_config(vae),
                 'text_encoder': CLIPTextModel(CLIPTextConfig(**text))}
    return prepare(StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None,
                                           feature_extractor=None, requires_safety_checker=False), where)


def test_stable_diffusions_own_parts(root, captions, class_images):
    "Noise prediction, PNDM, an auto-encoder with a distribution, three of four levels with attention, 77 tokens."
    pipe = stable_diffusion(root/'data'/'stable-diffusion-2-1', captions, 'cpu', small=True)
    maps, error = observe(pipe, to_latents(pipe, class_images), 'a photo of a floral fabric')
    assert [m.shape[2] for m in maps.values()] == [64]*2 + [16]*2 + [4]*2 + [1] + [4]*3 + [16]*3 + [64]*3
    assert .5 < error.mean() < 2
    before = pipeline_fingerprint(pipe)
    concept = personalize(pipe, class_images, 'floral fabric', THREE)
    assert len(concept.log['steps']) == 6 and all(np.isfinite(step[2:]).all() for step in concept.log['steps'])
    assert pipeline_fingerprint(pipe) == before
    with concept.applied(pipe):
        assert sample(pipe, concept.prompt, [1, 2], steps=3).shape == (2, 3, 64, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_stable_diffusion_2_1_trains_on_cuda(root, captions, capsys):
    pipe = stable_diffusion(root/'data'/'stable-diffusion-2-1', captions, 'cuda', small=False)
    images = torch.randint(0, 256, (4, 3, 512, 512), dtype=torch.uint8)
    before = pipeline_fingerprint(pipe)
    for stage in METHODS['as_published']['attndreambooth'].stages:
        torch.cuda.reset_peak_memory_stats()
        few, many = (personalize(pipe, images, 'floral', quick(replace(stage, steps=n)), probes=1) for n in (1, 6))
        seconds = (many.record['seconds'] - few.record['seconds'])/5
        peak = torch.cuda.max_memory_allocated()/2**30
        with capsys.disabled():
            print(f'\n{stage.trains}: {seconds:.2f} s per step of {stage.batch}, peak {peak:.1f} GiB')
        assert all(np.isfinite(step[2]) for step in many.log['steps'])
    assert pipeline_fingerprint(pipe) == before
