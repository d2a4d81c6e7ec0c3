"A tiny generator with random weights, images to personalise it on, and a check that it is left as it was."
import pytest
import torch

from lthash.diffusion.base_model import BaseRecipe, build_pipeline
from lthash.diffusion.pipelines import load_pipeline, pipeline_fingerprint, pipeline_networks, prepare


@pytest.fixture(scope='session')
def captions() -> list[str]:
    "Captions from which a tiny tokenizer is made."
    return ['a photo of a red floral silk fabric', 'a photo of a blue lattice']


@pytest.fixture(scope='session')
def tiny_recipe() -> BaseRecipe:
    "A generator of 32 px images that runs in milliseconds."
    return BaseRecipe(size=32, latent_channels=4, vae_width=8, widths=(16, 16, 32, 32), heads=2, text_width=32,
                      text_layers=1)


@pytest.fixture(scope='module')
def one_thread():
    "On one thread the same numbers always come out."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def new_pipe(captions, tiny_recipe):
    "A function that makes the tiny generator: random weights, and a U-Net whose output is not nearly 0."
    def make():
        pipe = prepare(build_pipeline(tiny_recipe, captions), 'cpu')
        torch.manual_seed(0)
        for p in pipe.unet.parameters():
            p.data.add_(.02*torch.randn_like(p))
        return pipe
    return make


@pytest.fixture(scope='module')
def pipe(new_pipe, tmp_path_factory):
    "The tiny generator, once for a module."
    new_pipe().save_pretrained(folder := tmp_path_factory.mktemp('generator'))
    return load_pipeline(str(folder), 'cpu')


@pytest.fixture(scope='session')
def class_images() -> torch.Tensor:
    "Three random images of 'one class', uint8 (3, 3, 32, 32)."
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 3, 32, 32), generator=generator, dtype=torch.uint8)


@pytest.fixture
def unharmed(pipe):
    "Whatever a test does, the generator has its old bits, words, processors and flags afterwards."
    def state():
        parameters = [p for n in pipeline_networks(pipe) for p in n.parameters()]
        return (pipeline_fingerprint(pipe), len(pipe.tokenizer), pipe.text_encoder.config.vocab_size,
                [type(p) for p in pipe.unet.attn_processors.values()], sum(p.requires_grad for p in parameters),
                sum(p.grad is not None for p in parameters), torch.get_rng_state().sum().item())
    before = state()
    yield pipe
    assert state() == before
