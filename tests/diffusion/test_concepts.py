"Concepts: tokens of their own, saved and loaded, applied and removed, and read by diffusers."
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lthash.diffusion.base_model import build_pipeline
from lthash.diffusion.concepts import Concept, placeholder, vector_tokens, with_tokens
from lthash.diffusion.methods import PersonalizationMethod, Stage
from lthash.diffusion.personalize import personalize
from lthash.diffusion.pipelines import load_pipeline, pipeline_fingerprint, prepare, sample, tokens

pytestmark = pytest.mark.usefixtures('one_thread')


def quick(*stages: Stage, **other) -> PersonalizationMethod:
    "A method of a few steps."
    return PersonalizationMethod('test', stages, views=2, **other)


THREE = quick(Stage('vector', 2, 1e-2, 2, .1), Stage('cross-attention', 2, 1e-3, 2, 2., 5.),
              Stage('unet', 2, 1e-3, 2, 2., 5.))


def draw(pipe, prompt):
    "Two images of a prompt."
    return sample(pipe, prompt, [1, 2], steps=3)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.integers(0, 999))
def test_no_placeholder_is_the_beginning_of_another(a, b):
    assert len(placeholder(a)) == 9 and (a == b or not placeholder(a).startswith(placeholder(b)))


def test_bad_placeholders():
    with pytest.raises(ValueError, match='three digits'):
        placeholder(1000)
    with pytest.raises(ValueError, match='bracketed, lower case'):
        vector_tokens('<Silk>', 1)


def test_added_tokens_are_single_whatever_else_is_added(unharmed):
    two = ['<cls-011>', '<cls-011>_1']
    with with_tokens(unharmed, ['<cls-001>'], torch.ones(1, 32)), \
            with_tokens(unharmed, two, 2*torch.ones(2, 32)) as table:
        ids = tokens(unharmed, ['<cls-011>_1 <CLS-001> <cls-011>x'])[0]
        assert [round(table.weight[i].mean().item(), 4) for i in ids[1:4]] == [2, 1, 2]
        with pytest.raises(ValueError, match='already a token'):
            with_tokens(unharmed, ['<cls-001>'], torch.ones(1, 32)).__enter__()
    with pytest.raises(ValueError, match='found .1, 31.'):
        with_tokens(unharmed, ['<cls-001>'], torch.ones(1, 31)).__enter__()


@pytest.mark.parametrize('rank', [0, 4])
def test_round_trip(unharmed, class_images, tmp_path, rank):
    pipe, method = unharmed, THREE.lora(rank, 30.) if rank else THREE
    concept = personalize(pipe, class_images, 'floral fabric', replace(method, vectors=2), placeholder(7))
    plain = draw(pipe, 'a photo of a floral fabric')
    with concept.applied(pipe):
        wanted = draw(pipe, concept.prompt)
    loaded = Concept.load(concept.save(tmp_path))
    assert (loaded.token, loaded.prompt, loaded.lora, loaded.log) == (concept.token, concept.prompt, bool(rank),
                                                                      concept.log)
    assert loaded.record == json.loads(json.dumps(concept.record))
    with loaded.applied(pipe):
        assert draw(pipe, loaded.prompt).equal(wanted) and not wanted.equal(plain)
    assert draw(pipe, 'a photo of a floral fabric').equal(plain)
    with pytest.raises(RuntimeError, match='midway'), loaded.applied(pipe):
        raise RuntimeError('midway')
    concept.export(pipe, tmp_path/'whole')
    with torch.random.fork_rng([]):
        other = load_pipeline(str(tmp_path/'whole'), 'cpu')   # diffusers draws random weights before it reads them
    difference = (draw(other, concept.prompt).int() - wanted.int()).abs().max().item()
    assert difference <= (1 if rank else 0), 'a merged LoRA may round'
    kinds = {n.split('.lora_')[0].rsplit('.attn', 1)[1] for n in concept.unet} if rank else set()
    projections = ('to_q', 'to_k', 'to_v', 'to_out.0')
    assert kinds == ({f'{i}.{k}' for i in (1, 2) for k in projections} if rank else set())


def test_a_damaged_or_missing_concept(pipe, class_images, tmp_path):
    with pytest.raises(FileNotFoundError, match='no finished concept'):
        Concept.load(tmp_path)
    folder = personalize(pipe, class_images, 'floral', quick(Stage('unet', 1, 1e-3, 2))).save(tmp_path)
    about = json.loads((folder/'concept.json').read_text())
    (folder/'concept.json').write_text(json.dumps({**about, 'changed': about['changed'] + 1}))
    with pytest.raises(ValueError, match='is damaged'):
        Concept.load(folder)


def test_diffusers_reads_the_files(new_pipe, class_images, tmp_path):
    pipe = new_pipe()
    method = replace(THREE.lora(4, 30.), vectors=2)
    concept = personalize(pipe, class_images, 'floral fabric', method, placeholder(7))
    with concept.applied(pipe):
        wanted = draw(pipe, concept.prompt)
    concept.save(tmp_path)
    pipe.load_textual_inversion(tmp_path/'learned_embeds.safetensors')
    pipe.load_lora_weights(tmp_path, weight_name='pytorch_lora_weights.safetensors')
    prompt = pipe.maybe_convert_prompt('a photo of a <cls-007> floral fabric', pipe.tokenizer)
    assert draw(pipe, prompt).equal(wanted)
    with pytest.raises(ValueError, match='already a token'):
        concept.applied(pipe).__enter__()
    pipe.unload_textual_inversion()
    with pytest.raises(ValueError, match='adapters already'):
        concept.applied(pipe).__enter__()


def test_lora_of_attn2_alone_and_its_size(unharmed, class_images):
    method = quick(Stage('cross-attention', 1, 1e-3, 2, 2., 5.)).lora(2)
    concept = personalize(unharmed, class_images, 'floral', method)
    assert len(concept.unet) == 16*4*2 and all('attn2' in k for k in concept.unet)
    full = personalize(unharmed, class_images, 'floral', quick(Stage('unet', 1, 1e-3, 2)))
    assert concept.size < full.size/10


def test_a_concept_of_another_generator_is_refused(pipe, class_images, tiny_recipe, captions):
    concept = personalize(pipe, class_images, 'floral', quick(Stage('unet', 1, 1e-3, 2)))
    wider = prepare(build_pipeline(replace(tiny_recipe, widths=(32, 32, 32, 32)), captions), 'cpu')
    before = pipeline_fingerprint(wider)
    with pytest.raises(ValueError, match='trained on another generator'):
        concept.applied(wider).__enter__()
    assert pipeline_fingerprint(wider) == before and len(wider.tokenizer) == len(pipe.tokenizer)
