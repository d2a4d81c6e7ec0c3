"Cross-attention: captured maps against the layers' own products, formula (1) against a reference, words found."
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.diffusion.attention import Positions, captured, moments, positions, probe_attention, regulariser
from lthash.diffusion.concepts import with_tokens
from lthash.diffusion.methods import TRAINS
from lthash.diffusion.pipelines import embed, to_latents

pytestmark = pytest.mark.usefixtures('one_thread')


def reference(maps, v, c, lambda_mu, lambda_sigma, reduction):
    "Formula (1) in float64, loop by loop."
    layers = []
    for m in maps:
        each = []
        for image in m.astype(np.float64):                       # (heads, pixels, tokens)
            stats = lambda token: (np.mean(image[:, :, token].ravel()),   # noqa: B023
                                   np.var(image[:, :, token].ravel(), ddof=1))   # noqa: B023
            mu_c, var_c = np.mean([stats(token) for token in c], axis=0)
            terms = [lambda_mu*(mu - mu_c)**2 + lambda_sigma*(var - var_c)**2 for mu, var in map(stats, v)]
            each.append(np.mean(terms))
        layers.append(np.mean(each) if reduction == 'mean' else np.sum(each))
    return sum(layers)/len(layers)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 16), st.integers(1, 4), st.integers(1, 3), st.integers(1, 2),
       st.integers(1, 3), st.floats(0, 10), st.floats(0, 10), st.sampled_from(('mean', 'sum')))
def test_formula_1(seed, layers, batch, heads, vectors, category, lambda_mu, lambda_sigma, reduction):
    rng = np.random.default_rng(seed)
    draw = lambda: rng.dirichlet(np.full(9, .3), (batch, heads, int(rng.choice([4, 16])))).astype(np.float32)
    maps = {f'layer {i}': torch.from_numpy(draw()) for i in range(layers)}
    v, c = tuple(range(2, 2 + vectors)), tuple(range(2 + vectors, 2 + vectors + category))
    ours = regulariser(maps, Positions(v, c), lambda_mu, lambda_sigma, reduction).item()
    expected = reference([m.numpy() for m in maps.values()], v, c, lambda_mu, lambda_sigma, reduction)
    np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=1e-8)


def test_both_words_get_gradients():
    maps = {'layer': torch.rand(2, 2, 4, 5).softmax(-1).requires_grad_()}
    regulariser(maps, Positions((2,), (3,)), 1., 1.).backward()
    assert [bool(g.any()) for g in maps['layer'].grad.unbind(-1)] == [False, False, True, True, False]


def test_captured_maps_are_the_softmax_of_the_layers_own_products(pipe, captions):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), embed(pipe, captions)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    seen = {}

    def keep(module, args, kwargs):
        seen.update(x=args[0] if args else kwargs['hidden_states'], text=kwargs['encoder_hidden_states'])

    handle = layer.register_forward_pre_hook(keep, with_kwargs=True)
    plain, processors = pipe.unet(x, t, text).sample, dict(pipe.unet.attn_processors)
    with captured(pipe.unet) as maps:
        watched = pipe.unet(x, t, text).sample
    handle.remove()
    assert all(pipe.unet.attn_processors[k] is p for k, p in processors.items()), 'the same objects again'
    torch.testing.assert_close(watched, plain, rtol=0, atol=2e-5)
    weights = {'x': layer.to_q.weight.detach().double().numpy(), 'text': layer.to_k.weight.detach().double().numpy()}
    q, k = (seen[s].double().numpy() @ w.T for s, w in weights.items())
    d = q.shape[-1]//layer.heads
    found = maps['mid_block.attentions.0.transformer_blocks.0.attn2'].detach().numpy()
    for image in range(2):
        for head in range(layer.heads):
            part = slice(head*d, (head + 1)*d)
            scores = q[image][:, part] @ k[image][:, part].T/np.sqrt(d)
            p = np.exp(scores - scores.max(1, keepdims=True))
            np.testing.assert_allclose(found[image, head], p/p.sum(1, keepdims=True), atol=1e-6)
    assert len(maps) == 16 and all(torch.allclose(m.sum(-1), torch.ones(())) for m in maps.values())


def test_processors_come_back_after_an_error(pipe):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(RuntimeError, match='on the way'), captured(pipe.unet):
        raise RuntimeError('on the way')
    assert all(pipe.unet.attn_processors[k] is p for k, p in before.items())


def test_a_probe_has_the_moments_of_every_layer(pipe, class_images):
    where = Positions((5,), (6,))
    found = probe_attention(pipe, to_latents(pipe, class_images), 'a photo of a red floral silk', where)
    assert len(found['layers']) == 16 and all(len(found[k]) == 16 for k in ('mu_v', 'var_v', 'mu_category'))
    with torch.no_grad(), captured(pipe.unet) as maps:
        pipe.unet(torch.randn(2, 4, 8, 8), 10, embed(pipe, ['a photo']*2))
    mean, variance = moments(maps, (1, 2))
    assert mean.shape == variance.shape == (16, 2, 2) and (variance >= 0).all()


def test_positions(pipe):
    one, two = '<cls-001>', '<cls-001>_1'
    with with_tokens(pipe, [one, two], torch.zeros(2, 32)):
        def where(prompt, category, tokens=(one,), which='first'):
            return positions(pipe.tokenizer, prompt, tokens, category, which)
        assert where('a photo of a <cls-001> floral', 'floral') == Positions((5,), (6,))
        for which, at in (('first', (6,)), ('last', (8,)), ('mean', (6, 7, 8))):
            found = where('a photo of a <cls-001> floral silk fabric', 'floral silk fabric', which=which)
            assert found.category == at
        assert where('a photo of a <cls-001> xyz floral', 'floral').category == (9,), 'an unknown word is letters'
        assert where('a photo of a <cls-001> wool', 'wool', which='mean').category == (6, 7, 8, 9)
        assert where('floral <cls-001> <cls-001>_1 floral', 'floral', (one, two)) == Positions((2, 3), (4,))
        for prompt, category, tokens, reason in (
                ('a photo of a floral', 'floral', [one], 'found 0 times'),
                ('<cls-001> <cls-001> floral', 'floral', [one], 'found 2 times'),
                ('<cls-001> floral', 'lattice', [one], "'lattice'.*must follow"),
                ('floral <cls-001>', 'floral', [one], 'must follow'),
                ('<cls-001> ' + 'a '*14 + 'floral', 'floral', [one], 'at most 16'),
                ('<cls-001> floral', '', [one], 'must follow'),
                ('<cls-002> floral', 'floral', ['<cls-002>'], 'not one of its own'),
                ('<cls-001>_1 a <cls-001> floral', 'floral', [one, two], 'follow one another')):
            with pytest.raises(ValueError, match=reason):
                positions(pipe.tokenizer, prompt, tokens, category)


def test_stable_diffusion_2_1_has_16_cross_attentions_of_these_sizes(root):
    with torch.device('meta'):
        config = UNet2DConditionModel.load_config(root/'data'/'stable-diffusion-2-1'/'unet')
        unet = UNet2DConditionModel.from_config(config)
        with captured(unet) as maps:
            unet(torch.empty(2, 4, 64, 64), torch.empty(2, dtype=torch.long), torch.empty(2, 77, 1024))
    layers = ((5, 64, 2), (10, 32, 2), (20, 16, 2), (20, 8, 1), (20, 16, 3), (10, 32, 3), (5, 64, 3))
    assert [tuple(m.shape) for m in maps.values()] == [(2, h, s*s, 77) for h, s, n in layers for _ in range(n)]
    names = {name: p.numel() for name, p in unet.named_parameters()}
    trained = {kind: {n for n in names if TRAINS[kind](n)} for kind in TRAINS}
    assert not trained['vector'] and round(sum(names[n] for n in trained['unet'])/1e6) == 866
    assert trained['cross-attention'] and all('attn2' in n for n in trained['cross-attention'])
