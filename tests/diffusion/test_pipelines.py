"Generators: what loading leaves, latents of both kinds of auto-encoder, and images that depend on their seed only."
import pytest
import torch
from diffusers import AutoencoderKL

from lthash.diffusion.pipelines import (
    SAMPLERS,
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

pytestmark = pytest.mark.usefixtures('one_thread')


def test_loaded_is_frozen_and_in_evaluation_mode(pipe):
    for network in pipeline_networks(pipe):
        assert not network.training and not any(p.requires_grad for p in network.parameters())
    assert image_size(pipe) == 32


def test_the_fingerprint_notices_one_weight_and_the_schedule(new_pipe):
    one, two = new_pipe(), new_pipe()
    assert pipeline_fingerprint(one) == pipeline_fingerprint(two)
    next(two.vae.parameters()).data.view(-1)[0] += 1e-3
    assert pipeline_fingerprint(one) != pipeline_fingerprint(two)
    before = pipeline_fingerprint(one)
    one.scheduler = type(one.scheduler).from_config(one.scheduler.config, beta_end=.5)
    assert pipeline_fingerprint(one) != before


def test_a_folder_that_is_no_generator(tmp_path):
    with pytest.raises(OSError, match='is no generator'):
        load_pipeline(str(tmp_path))


def test_prompts_are_padded_to_the_context(pipe, captions):
    context = pipe.tokenizer.model_max_length
    assert tokens(pipe, captions).shape == (2, context) and embed(pipe, captions).shape == (2, context, 32)


def test_latents_are_the_mean_of_an_auto_encoder_with_a_distribution(new_pipe, class_images):
    pipe = new_pipe()
    torch.manual_seed(0)
    pipe.vae = AutoencoderKL(block_out_channels=(8, 8, 8), norm_num_groups=8, latent_channels=4,
                             down_block_types=['DownEncoderBlock2D']*3, up_block_types=['UpDecoderBlock2D']*3).eval()
    found = to_latents(pipe, class_images)
    with torch.no_grad():
        mean = pipe.vae.encode(class_images/127.5 - 1).latent_dist.mean
    assert found.equal(mean*pipe.vae.config.scaling_factor)


def test_latents_do_not_depend_on_the_batch(pipe, class_images):
    torch.testing.assert_close(to_latents(pipe, class_images, batch=1), to_latents(pipe, class_images))
    latents = to_latents(pipe, torch.nn.functional.interpolate(class_images.float(), 48).byte())
    assert to_images(pipe, latents).shape == (3, 3, 32, 32)


@pytest.mark.parametrize('sampler', SAMPLERS)
def test_an_image_depends_on_its_prompt_and_seed_only(unharmed, captions, sampler):
    before = type(unharmed.scheduler)
    prompts = [captions[0], captions[1], captions[0]]
    images = sample(unharmed, prompts, [1, 2, 1], steps=3, sampler=sampler)
    assert images[0].equal(images[2]) and not images[0].equal(images[1])
    alone = sample(unharmed, captions[1], [2], steps=3, sampler=sampler, batch=1)[0]
    assert (images[1].int() - alone.int()).abs().max() <= 2, 'rounding only'
    assert type(unharmed.scheduler) is before


def test_bad_requests(pipe, captions):
    with pytest.raises(ValueError, match='sampler is one of'):
        sample(pipe, captions[0], [1], sampler='euler')
    with pytest.raises(ValueError, match='found 2 prompts and 1 seeds'):
        sample(pipe, captions, [1])
    assert sample(pipe, captions[0], []).shape == (0, 3, 32, 32)
