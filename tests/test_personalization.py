"Personalisation: what each stage changes, formula (1) against an independent reference, interruption, and what diffusers makes of a saved concept."
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
from conftest import ROOT
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel

from lthash import generators, loom
from lthash.attention import Positions, captured, cross_attentions, denoise, moments, noise_schedule, observe, positions, regulariser
from lthash.concepts import Concept, fill, placed, placeholder
from lthash.personalization import initial_vectors, identity, personalize
from lthash.runs import derive_seed
from lthash.stages import METHODS, TRAINS, Method, Stage, views

CAPTIONS = ['a photo of a red floral silk fabric', 'a photo of a blue lattice']
RECIPE = loom.BaseRecipe(size=32, latent_channels=4, vae_width=8, widths=(16, 16, 32, 32), heads=2, text_width=32, text_layers=1)
ADB, STAGES = METHODS['matched']['attndreambooth'], ('vector', 'cross-attention', 'unet')
quick = lambda *stages, **other: Method('test', tuple(stages), views=2, **other)
three = quick(Stage('vector', 2, 1e-2, 2, .1), Stage('cross-attention', 2, 1e-3, 2, 2., 5.), Stage('unet', 2, 1e-3, 2, 2., 5.))


def new_pipe():
    "Random weights, and a U-Net whose output is not nearly 0, on one thread: then the same numbers always come out."
    pipe = generators.prepare(loom.build(RECIPE, CAPTIONS), 'cpu')
    torch.manual_seed(0)
    for p in pipe.unet.parameters(): p.data.add_(.02*torch.randn_like(p))
    return pipe


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='module')
def pipe(tmp_path_factory):
    new_pipe().save_pretrained(folder := tmp_path_factory.mktemp('generator'))
    return generators.load(str(folder), 'cpu')


def new_images(): return torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


@pytest.fixture(scope='module')
def images(): return new_images()


def weights(pipe) -> dict:
    return {f'{name}.{k}': v.detach().clone() for name in ('text_encoder', 'vae', 'unet') for k, v in getattr(pipe, name).state_dict().items()}


def changed(a: dict, b: dict) -> set:
    assert a.keys() == b.keys()
    return {k for k in a if not a[k].equal(b[k])}


@pytest.fixture
def unharmed(pipe):
    "Whatever a test does, the generator has its old bits, words, processors and flags afterwards."
    state = lambda: (generators.fingerprint(pipe), len(pipe.tokenizer), pipe.text_encoder.config.vocab_size, [type(p) for p in pipe.unet.attn_processors.values()],
                     sum(p.requires_grad for n in generators.networks(pipe) for p in n.parameters()), sum(p.grad is not None for n in generators.networks(pipe) for p in n.parameters()), torch.get_rng_state().sum().item())
    before = state()
    yield pipe
    assert state() == before


# ---- what each stage changes

def test_each_stage_changes_its_tensors_and_nothing_else(unharmed, images):
    seen = []
    personalize(unharmed, images, 'floral fabric', three, watch=lambda done, pipe: seen.append(weights(pipe)))
    table = [k for k in seen[0] if k.endswith('token_embedding.weight')]
    unet = {k for k in seen[0] if k.startswith('unet.')}
    attn2 = {f'unet.{name}.{part}' for name in cross_attentions(unharmed.unet) for part in ('to_q.weight', 'to_k.weight', 'to_v.weight', 'to_out.0.weight', 'to_out.0.bias')}
    assert len(seen) == 4 and len(attn2) == 16*5 and attn2 < unet
    assert [changed(a, b) for a, b in zip(seen, seen[1:])] == [set(table), attn2, unet]
    rows = (seen[0][table[0]] != seen[1][table[0]]).any(1)
    assert rows.nonzero().flatten().tolist() == [len(rows) - 1], 'only the row of [V]'


def test_dreambooth_trains_the_unet_and_no_vector(unharmed, images):
    method = quick(Stage('unet', 2, 1e-3, 2, prior_weight=1.), initial='sks', prior_images=3, prior_steps=2)
    concept = personalize(unharmed, images, 'floral fabric', method)
    assert concept.vectors.equal(initial_vectors(unharmed, method, 'floral fabric')) and set(concept.unet) == {n for n, _ in unharmed.unet.named_parameters()}


def test_textual_inversion_leaves_the_unet(unharmed, images):
    concept = personalize(unharmed, images, 'floral fabric', quick(Stage('vector', 2, 1e-2, 2), vectors=2, prompts=('a photo of {V}', 'a red {V}')))
    assert not concept.unet and concept.tokens == ['<cls-000>', '<cls-000>_1'] and concept.prompt == 'a photo of <cls-000> <cls-000>_1'
    assert not (concept.vectors == initial_vectors(unharmed, quick(Stage('vector', 1, 1, 1), vectors=2), 'floral fabric')).any()


def test_plain_stage_is_a_plain_loop_bitwise(pipe, images):
    "Weights 0 in formula (1) leave DreamBooth's loop, written here once more without anything of the module's."
    steps, seed, rate = 3, 5, 1e-3
    method = quick(Stage('cross-attention', steps, rate, 2, 0., 0.), augmentation='none')
    concept = personalize(pipe, images, 'floral', method, seed=seed)
    other, schedule = new_pipe(), noise_schedule(pipe)
    latents = generators.to_latents(other, images.repeat_interleave(2, 0))
    with placed(other, ['<cls-000>'], initial_vectors(other, method, 'floral')):
        text = other.text_encoder(generators.tokens(other, ['a photo of a <cls-000> floral']))[0]
    trained = [p.requires_grad_() for n, p in other.unet.named_parameters() if '.attn2.' in n]
    before = [p.detach().clone() for p in trained]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=1e-2, fused=True)
    for step in range(steps):
        at = np.random.default_rng(derive_seed('personalize', seed, 0, step)).integers(len(latents), size=2)
        g = torch.Generator().manual_seed(derive_seed('personalize noise', seed, 0, step))
        noise, t = torch.randn((2, *latents.shape[1:]), generator=g), torch.randint(0, 1000, (2,), generator=g)
        x = latents[torch.from_numpy(at)]
        loss = F.mse_loss(other.unet(schedule.add_noise(x, noise, t), t, text.expand(2, -1, -1)).sample, schedule.get_velocity(x, noise, t))
        optimizer.zero_grad(); loss.backward(); torch.nn.utils.clip_grad_norm_(trained, 1.); optimizer.step()
    assert len(concept.unet) == len(trained) and all(d.equal((p.detach() - b).half()) for d, p, b in zip(concept.unet.values(), trained, before))


def test_prior_images_count_in_the_loss_and_not_in_the_regulariser(pipe, images):
    method = lambda weight, prior_seed: quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5., prior_weight=weight), prior_images=2, prior_steps=prior_seed)
    one, two = (personalize(pipe, images, 'floral', method(1., steps)) for steps in (2, 3))   # other prior images
    without = personalize(pipe, images, 'floral', quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5.)))
    assert one.log['steps'][0][3] > 0
    np.testing.assert_allclose(one.log['steps'][0][3], two.log['steps'][0][3], rtol=1e-4)
    assert any(not one.unet[k].equal(two.unet[k]) for k in one.unet) and any(not one.unet[k].equal(without.unet[k]) for k in one.unet)


@pytest.mark.parametrize('trains', STAGES)
def test_gradients_are_clipped_on_what_is_trained(pipe, images, trains):
    "Adam does not see the scale of a gradient, except through its epsilon: with a tiny bound nothing moves but by weight decay."
    moved = []
    for clip in (1e-14, 0.):
        method = quick(Stage(trains, 1, 1e-3, 2, clip=clip, weight_decay=0.))
        concept = personalize(pipe, images, 'floral', method)
        moved.append(torch.cat([(concept.vectors - initial_vectors(pipe, method, 'floral')).flatten(), *(d.flatten().float() for d in concept.unet.values())]).abs().max().item())
    assert moved[0] < 1e-7 < 5e-4 < moved[1]


# ---- formula (1)

def reference(maps, v, c, lambda_mu, lambda_sigma, reduction):
    "Formula (1) in float64, loop by loop."
    layers = []
    for m in maps:
        each = []
        for image in m.astype(np.float64):                       # (heads, pixels, tokens)
            stats = lambda token: (np.mean(image[:, :, token].ravel()), np.var(image[:, :, token].ravel(), ddof=1))
            mu_c, var_c = np.mean([stats(token) for token in c], axis=0)
            each.append(np.mean([lambda_mu*(stats(token)[0] - mu_c)**2 + lambda_sigma*(stats(token)[1] - var_c)**2 for token in v]))
        layers.append(np.mean(each) if reduction == 'mean' else np.sum(each))
    return sum(layers)/len(layers)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 3), st.floats(0, 10), st.floats(0, 10), st.sampled_from(('mean', 'sum')))
def test_formula_1(seed, layers, batch, heads, vectors, category, lambda_mu, lambda_sigma, reduction):
    rng = np.random.default_rng(seed)
    maps = {f'layer {i}': torch.from_numpy(rng.dirichlet(np.full(9, .3), (batch, heads, int(rng.choice([4, 16])))).astype(np.float32)) for i in range(layers)}
    v, c = tuple(range(2, 2 + vectors)), tuple(range(2 + vectors, 2 + vectors + category))
    ours = regulariser(maps, Positions(v, c), lambda_mu, lambda_sigma, reduction).item()
    np.testing.assert_allclose(ours, reference([m.numpy() for m in maps.values()], v, c, lambda_mu, lambda_sigma, reduction), rtol=2e-4, atol=1e-8)


def test_both_words_get_gradients():
    maps = {'layer': torch.rand(2, 2, 4, 5).softmax(-1).requires_grad_()}
    regulariser(maps, Positions((2,), (3,)), 1., 1.).backward()
    assert [bool(g.any()) for g in maps['layer'].grad.unbind(-1)] == [False, False, True, True, False]


def test_captured_maps_are_the_softmax_of_the_layers_own_products(pipe):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), generators.embed(pipe, CAPTIONS)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    seen = {}
    handle = layer.register_forward_pre_hook(lambda m, args, kwargs: seen.update(x=args[0] if args else kwargs['hidden_states'], text=kwargs['encoder_hidden_states']), with_kwargs=True)
    plain, processors = pipe.unet(x, t, text).sample, dict(pipe.unet.attn_processors)
    with captured(pipe.unet) as maps: watched = pipe.unet(x, t, text).sample
    handle.remove()
    assert all(pipe.unet.attn_processors[k] is p for k, p in processors.items()), 'the processors are back, the same objects'
    torch.testing.assert_close(watched, plain, rtol=0, atol=2e-5)
    q, k = (seen[s].double().numpy() @ w.weight.detach().double().numpy().T for s, w in (('x', layer.to_q), ('text', layer.to_k)))
    d = q.shape[-1]//layer.heads
    for image in range(2):
        for head in range(layer.heads):
            part = slice(head*d, (head + 1)*d)
            scores = q[image][:, part] @ k[image][:, part].T/np.sqrt(d)
            p = np.exp(scores - scores.max(1, keepdims=True)); p /= p.sum(1, keepdims=True)
            np.testing.assert_allclose(maps['mid_block.attentions.0.transformer_blocks.0.attn2'][image, head].detach().numpy(), p, atol=1e-6)
    assert len(maps) == 16 and all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps.values())


def test_processors_come_back_after_an_error(pipe):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(RuntimeError, match='on the way'), captured(pipe.unet): raise RuntimeError('on the way')
    assert all(pipe.unet.attn_processors[k] is p for k, p in before.items())


# ---- words

def test_positions(pipe):
    with placed(pipe, ['<cls-001>', '<cls-001>_1'], torch.zeros(2, 32)):
        where = lambda prompt, category, tokens=('<cls-001>',), which='first': positions(pipe.tokenizer, prompt, tokens, category, which)
        assert where('a photo of a <cls-001> floral', 'floral') == Positions((5,), (6,))
        for which, at in (('first', (6,)), ('last', (8,)), ('mean', (6, 7, 8))):
            assert where('a photo of a <cls-001> floral silk fabric', 'floral silk fabric', which=which).category == at
        assert where('a photo of a <cls-001> xyz floral', 'floral').category == (9,), 'an unknown word is letters'
        assert where('a photo of a <cls-001> wool', 'wool', which='mean').category == (6, 7, 8, 9)
        assert where('floral <cls-001> <cls-001>_1 floral', 'floral', ('<cls-001>', '<cls-001>_1')) == Positions((2, 3), (4,))
        for prompt, category, tokens, reason in (
                ('a photo of a floral', 'floral', ['<cls-001>'], 'found 0 times'), ('<cls-001> <cls-001> floral', 'floral', ['<cls-001>'], 'found 2 times'),
                ('<cls-001> floral', 'lattice', ['<cls-001>'], "'lattice'.*must follow"), ('floral <cls-001>', 'floral', ['<cls-001>'], 'must follow'),
                ('<cls-001> ' + 'a '*14 + 'floral', 'floral', ['<cls-001>'], 'at most 16'), ('<cls-001> floral', '', ['<cls-001>'], 'must follow'),
                ('<cls-002> floral', 'floral', ['<cls-002>'], 'not one of its own'), ('<cls-001>_1 a <cls-001> floral', 'floral', ['<cls-001>', '<cls-001>_1'], 'follow one another')):
            with pytest.raises(ValueError, match=reason): positions(pipe.tokenizer, prompt, tokens, category)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(0, 999))
def test_no_placeholder_is_the_beginning_of_another(a, b):
    assert len(placeholder(a)) == 9 and (a == b or not placeholder(a).startswith(placeholder(b)))


def test_placed_tokens_are_single_whatever_else_is_placed(unharmed):
    with placed(unharmed, ['<cls-001>'], torch.ones(1, 32)), placed(unharmed, ['<cls-011>', '<cls-011>_1'], 2*torch.ones(2, 32)) as table:
        ids = generators.tokens(unharmed, ['<cls-011>_1 <CLS-001> <cls-011>x'])[0]
        assert [round(table.weight[i].mean().item(), 4) for i in ids[1:4]] == [2, 1, 2]
        with pytest.raises(ValueError, match='already a token'), placed(unharmed, ['<cls-001>'], torch.ones(1, 32)): pass
    with pytest.raises(ValueError, match='found .1, 31.'), placed(unharmed, ['<cls-001>'], torch.ones(1, 31)): pass


def test_start_of_v(pipe):
    rows = pipe.text_encoder.get_input_embeddings().weight
    row = lambda word: rows[pipe.tokenizer.convert_tokens_to_ids(word + '</w>')]
    method = lambda **other: quick(Stage('vector', 1, 1, 1), **other)
    start = lambda **other: initial_vectors(pipe, method(**other), 'floral fabric')
    assert start()[0].equal(row('floral')) and start(category_tokens='last')[0].equal(row('fabric')) and start(category_tokens='mean')[0].equal((row('floral') + row('fabric'))/2)
    assert start(vectors=3).equal(torch.stack([row('floral'), row('fabric'), row('fabric')])) and start(initial='lattice')[0].equal(row('lattice'))


# ---- records and input

def test_published_budgets_and_the_matched_one():
    published, matched = METHODS['as_published'], METHODS['matched']
    assert [m.image_passes for m in published.values()] == [12000, 800, 5280]
    for family in ('matched', 'loom'): assert len({(m.image_passes, m.prompts, m.augmentation, m.views) for m in METHODS[family].values()}) == 1
    assert [s.steps for s in ADB.scaled(.2).stages] == [12, 20, 100] and [s.steps for s in ADB.scaled(1e-9).stages] == [1, 1, 1]
    assert [s.trains for s in ADB.stages] == list(STAGES) == list(TRAINS) and {s.reduction for s in published['attndreambooth'].stages} == {'sum'}


def test_bad_records_and_bad_input(pipe, images):
    for make, reason in ((lambda: Stage('attn', 1, 1.), "trains vector"), (lambda: Stage('unet', 0, 1.), 'at least 1 step'), (lambda: replace(ADB, prompts=('a photo of {V}',)), 'formula .1. needs one prompt'),
                         (lambda: quick(Stage('unet', 1, 1., prior_weight=1.)), 'prior_images is 0'), (lambda: replace(ADB, augmentation='blur'), 'augmentation is one of'), (lambda: replace(ADB, category_tokens='all'), 'category_tokens is'),
                         (lambda: personalize(pipe, images.float(), 'floral', three), 'uint8 of shape'), (lambda: personalize(pipe, images[:0], 'floral', three), 'at least one'),
                         (lambda: personalize(pipe, images, ' ', three), 'empty'), (lambda: personalize(pipe, images, 'floral', three, '<Silk>'), 'bracketed, lower case'),
                         (lambda: personalize(pipe, images, 'a floral silk fabric that is far too long', three), 'text encoder reads')):
        with pytest.raises(ValueError, match=reason): make()


def test_views_are_drawn_once_and_by_seed(images):
    state = torch.get_rng_state()
    for name in ('none', 'flip', 'crop-flip', 'attndreambooth'):
        a, b, c = (views(images, name, 2, 24, seed) for seed in (0, 0, 1))
        assert a.shape == (6, 3, 24, 24) and a.dtype == torch.uint8 and a.equal(b)
        assert (name == 'none') == (a.equal(c) and a[0].equal(a[1]))
    assert torch.get_rng_state().equal(state)


def test_identity_notices_everything_that_matters(pipe, images):
    first = lambda **other: identity(**{**dict(generator=pipe, images=images, category='floral', method=three, seed=0), **other})
    pipe2 = copy.copy(pipe); pipe2.vae = copy.deepcopy(pipe.vae); next(pipe2.vae.parameters()).data[0] += 1e-3
    variants = [first(), first(images=images.flip(-1)), first(images=images[:2]), first(category='lattice'), first(method=three.scaled(2)), first(method=three.lora()), first(seed=1), first(generator=pipe2)]
    assert len(set(variants)) == len(variants) and first() == variants[0]


# ---- interruption

CHILD = '''
import sys; sys.path.insert(0, 'tests')
import torch, test_personalization as t
torch.set_num_threads(1)
t.personalize(t.generators.load(sys.argv[1], 'cpu'), t.new_images(), 'floral', t.LONG, folder=sys.argv[2], every=0.)
'''
LONG = quick(Stage('vector', 4, 1e-2, 2, .1), Stage('cross-attention', 40, 1e-4, 2, 2., 5.), Stage('unet', 3, 1e-3, 2, 2., 5.))


def test_killed_and_resumed_is_the_same_to_the_bit(images, tmp_path):
    new_pipe().save_pretrained(tmp_path/'base')
    base, folder = generators.load(str(tmp_path/'base'), 'cpu'), tmp_path/'concept'
    path = folder/'checkpoint.safetensors'
    child = subprocess.Popen([sys.executable, '-c', CHILD, str(tmp_path/'base'), str(folder)], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    def progress():
        if not path.exists(): return 0, 0
        with safe_open(path, 'pt') as file: return tuple(int(file.metadata()[k]) for k in ('stage', 'step'))
    try:
        deadline = time.time() + 120
        while progress() < (1, 3):
            assert child.poll() is None and time.time() < deadline
            time.sleep(.02)
    finally:
        child.send_signal(signal.SIGKILL); child.wait()
    assert (1, 3) <= progress() < (1, 40) and not (folder/'concept.json').exists(), 'killed in the middle of stage 2'
    resumed, straight = personalize(base, images, 'floral', LONG, folder=folder), personalize(base, images, 'floral', LONG)
    assert resumed.vectors.equal(straight.vectors) and resumed.unet.keys() == straight.unet.keys() and all(d.equal(straight.unet[k]) for k, d in resumed.unet.items())
    assert resumed.log == straight.log and not path.exists()
    assert personalize(base, images, 'floral', LONG, token='<cls-007>', folder=folder).token == '<cls-007>', 'finished: loaded, under any name'
    with pytest.raises(ValueError, match='holds another concept'): personalize(base, images.flip(-1), 'floral', LONG, folder=folder)


def test_a_checkpoint_of_something_else_is_refused(unharmed, images, tmp_path):
    def interrupt(done, pipe):
        if done == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): personalize(unharmed, images, 'floral', three, folder=tmp_path, watch=interrupt, every=0.)
    assert (tmp_path/'checkpoint.safetensors').exists() and not (tmp_path/'concept.json').exists()
    with pytest.raises(FileNotFoundError, match='no finished concept'): Concept.load(tmp_path)
    with pytest.raises(ValueError, match='delete it, or choose another folder'): personalize(unharmed, images, 'lattice', three, folder=tmp_path)
    assert [p['step'] for p in personalize(unharmed, images, 'floral', three, folder=tmp_path, probes=1).log['probes']] == [p['step'] for p in personalize(unharmed, images, 'floral', three, probes=2).log['probes']][:5] + [2]


# ---- kept, applied, and read by diffusers

def draw(pipe, prompt): return generators.sample(pipe, prompt, [1, 2], steps=3)


@pytest.mark.parametrize('rank', [0, 4])
def test_round_trip(unharmed, images, tmp_path, rank):
    pipe, method = unharmed, three if not rank else three.lora(rank, 30.)
    concept = personalize(pipe, images, 'floral fabric', replace(method, vectors=2), placeholder(7))
    plain = draw(pipe, 'a photo of a floral fabric')
    with concept.applied(pipe): wanted = draw(pipe, concept.prompt)
    loaded = Concept.load(concept.save(tmp_path))
    assert (loaded.token, loaded.prompt, loaded.lora, loaded.record, loaded.log) == (concept.token, concept.prompt, bool(rank), json.loads(json.dumps(concept.record)), concept.log)
    with loaded.applied(pipe): assert draw(pipe, loaded.prompt).equal(wanted) and not wanted.equal(plain)
    assert draw(pipe, 'a photo of a floral fabric').equal(plain)
    with pytest.raises(RuntimeError, match='midway'), loaded.applied(pipe): raise RuntimeError('midway')
    concept.export(pipe, tmp_path/'whole')
    with torch.random.fork_rng([]): other = generators.load(str(tmp_path/'whole'), 'cpu')   # diffusers draws random weights before it reads them
    difference = (draw(other, concept.prompt).int() - wanted.int()).abs().max().item()
    assert difference <= (1 if rank else 0), 'a merged LoRA may round'
    kinds = {n.split('.lora_')[0].rsplit('.attn', 1)[1] for n in concept.unet} if rank else set()
    assert kinds == ({f'{i}.{k}' for i in (1, 2) for k in ('to_q', 'to_k', 'to_v', 'to_out.0')} if rank else set())


def test_diffusers_reads_the_files(images, tmp_path):
    pipe = new_pipe()
    concept = personalize(pipe, images, 'floral fabric', replace(three.lora(4, 30.), vectors=2), placeholder(7))
    with concept.applied(pipe): wanted = draw(pipe, concept.prompt)
    concept.save(tmp_path)
    pipe.load_textual_inversion(tmp_path/'learned_embeds.safetensors')
    pipe.load_lora_weights(tmp_path, weight_name='pytorch_lora_weights.safetensors')
    assert draw(pipe, pipe.maybe_convert_prompt('a photo of a <cls-007> floral fabric', pipe.tokenizer)).equal(wanted)
    with pytest.raises(ValueError, match='already a token'), concept.applied(pipe): pass
    pipe.unload_textual_inversion()
    with pytest.raises(ValueError, match='adapters already'), concept.applied(pipe): pass


def test_lora_of_attn2_alone_and_its_size(unharmed, images):
    concept = personalize(unharmed, images, 'floral', quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5.)).lora(2))
    assert len(concept.unet) == 16*4*2 and all('attn2' in k for k in concept.unet)
    full = personalize(unharmed, images, 'floral', quick(Stage('unet', 1, 1e-3, 2)))
    assert concept.size < full.size/10


def test_a_concept_of_another_generator_is_refused(images, pipe):
    concept = personalize(pipe, images, 'floral', quick(Stage('unet', 1, 1e-3, 2)))
    wider = generators.prepare(loom.build(replace(RECIPE, widths=(32, 32, 32, 32)), CAPTIONS), 'cpu')
    before = generators.fingerprint(wider)
    with pytest.raises(ValueError, match='trained on another generator'), concept.applied(wider): pass
    assert generators.fingerprint(wider) == before and len(wider.tokenizer) == len(pipe.tokenizer)


# ---- Stable Diffusion's own size

SD21 = ROOT/'data'/'stable-diffusion-2-1'


def test_stable_diffusion_2_1_has_16_cross_attentions_of_these_sizes():
    with torch.device('meta'):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD21/'unet'))
        with captured(unet) as maps: unet(torch.empty(2, 4, 64, 64), torch.empty(2, dtype=torch.long), torch.empty(2, 77, 1024))
    assert [tuple(m.shape) for m in maps.values()] == [(2, h, s*s, 77) for h, s, n in ((5, 64, 2), (10, 32, 2), (20, 16, 2), (20, 8, 1), (20, 16, 3), (10, 32, 3), (5, 64, 3)) for _ in range(n)]
    trained = {kind: sum(p.numel() for n, p in unet.named_parameters() if TRAINS[kind](n)) for kind in STAGES}
    assert trained['vector'] == 0 and round(trained['unet']/1e6) == 866 and all('attn2' in n for n, _ in unet.named_parameters() if TRAINS['cross-attention'](n))


def stable_diffusion(where, small: bool):
    "Stable Diffusion 2.1's own kinds of parts with random weights, small or at full size."
    config = lambda kind, part: kind.load_config(SD21/part)
    tokenizer = loom.build_tokenizer(CAPTIONS, 77)
    special = dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    thin = [dict(block_out_channels=[32]*4, attention_head_dim=4, cross_attention_dim=32, sample_size=8, norm_num_groups=8), dict(block_out_channels=[8]*4, norm_num_groups=8), dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=2)]
    changes = thin if small else [{}, {}, {}]
    with torch.device(where):
        unet = UNet2DConditionModel.from_config({**config(UNet2DConditionModel, 'unet'), **changes[0]})
        vae = AutoencoderKL.from_config({**config(AutoencoderKL, 'vae'), **changes[1]})
        text = CLIPTextModel(CLIPTextConfig(**{**json.loads((SD21/'text_encoder'/'config.json').read_text()), **special, **changes[2]}))
    return generators.prepare(StableDiffusionPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=PNDMScheduler.from_config(config(PNDMScheduler, 'scheduler')),
                                                      safety_checker=None, feature_extractor=None, requires_safety_checker=False), where)


def test_stable_diffusions_own_parts(images):
    "Noise prediction, PNDM, an auto-encoder with a distribution, three of four levels with attention, 77 tokens."
    pipe = stable_diffusion('cpu', small=True)
    maps, error = observe(pipe, generators.to_latents(pipe, images), 'a photo of a floral fabric')
    assert [m.shape[2] for m in maps.values()] == [64]*2 + [16]*2 + [4]*2 + [1] + [4]*3 + [16]*3 + [64]*3 and .5 < error.mean() < 2
    before = generators.fingerprint(pipe)
    concept = personalize(pipe, images, 'floral fabric', three)
    assert len(concept.log['steps']) == 6 and all(np.isfinite(step[2:]).all() for step in concept.log['steps']) and generators.fingerprint(pipe) == before
    with concept.applied(pipe): assert draw(pipe, concept.prompt).shape == (2, 3, 64, 64)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_stable_diffusion_2_1_trains_on_cuda(capsys):
    pipe, images = stable_diffusion('cuda', small=False), torch.randint(0, 256, (4, 3, 512, 512), dtype=torch.uint8)
    before = generators.fingerprint(pipe)
    for stage in METHODS['as_published']['attndreambooth'].stages:
        torch.cuda.reset_peak_memory_stats()
        first, many = (personalize(pipe, images, 'floral', quick(replace(stage, steps=n)), probes=1) for n in (1, 6))
        with capsys.disabled(): print(f'\n{stage.trains}: {(many.record["seconds"] - first.record["seconds"])/5:.2f} s a step of {stage.batch}, peak {torch.cuda.max_memory_allocated()/2**30:.1f} GiB')
        assert all(np.isfinite(step[2]) for step in many.log['steps'])
    assert generators.fingerprint(pipe) == before
