"""How fast is a step of personalisation: AttnDreamBooth's three stages in lthash, and as its published code does them.

    python benchmarks/personalization.py [--steps 30 --batch 8 --threads 2 --generator loom --lora 0 --device cpu]
    python benchmarks/personalization.py --narrowed 4 --images 2 --batch 4 --steps 6 --warmup 1

The peer is written here after a reading of the published code; no line of it is copied. `HABITS` lists what it does
otherwise than lthash. U-Net, augmented images, noise, timesteps, loss and AdamW's numbers are the same for both; that
the losses agree is asserted at every step. Both sides take their steps in turns; what lthash does once for a class is
measured as well and counts.
"""
import argparse
import io
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel

from lthash.core.runtime import derive_seed, device_name, project_data
from lthash.core.runtime import device as pick_device
from lthash.data import textiles
from lthash.diffusion.attention import noise_schedule
from lthash.diffusion.base_model import build_pipeline, build_tokenizer
from lthash.diffusion.concepts import PROMPT, add_lora, fill, placeholder, with_tokens
from lthash.diffusion.methods import METHODS, PersonalizationMethod, Stage, initial_vectors, views
from lthash.diffusion.personalize import Training
from lthash.diffusion.pipelines import image_size, load_pipeline, to_latents, tokens
from lthash.diffusion.textile_model import LOOM

CATEGORY, TOKEN = 'floral fabric', placeholder(0)
HABITS = {
    'images': 'decoded and augmented by the training process at every step',
    'encoding': 'the auto-encoder runs at every step (without this habit, nothing is decoded and augmented either)',
    'text': 'a prompt for every image is read and encoded at every step',
    'self-attention': 'its probabilities are written out too',
    'regulariser': 'maps put together token by token, moments of all tokens, compared image by image',
    'optimizer': 'AdamW parameter by parameter, gradients set to 0 and not dropped',
}


class WrittenOut:
    "Attention with its probabilities written out, self- and cross-attention alike; those of cross-attention are kept."
    def __init__(self, kept: list[Tensor], by_token: bool):
        self.kept, self.by_token = kept, by_token

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **ignored) -> Tensor:
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = attn.to_q(hidden_states), attn.to_k(seen), attn.to_v(seen)
        q, k, v = map(attn.head_to_batch_dim, projected)
        maps = attn.get_attention_scores(q, k, attention_mask)                         # (images*heads, pixels, tokens)
        if encoder_hidden_states is not None:
            by_token = torch.stack(list(maps.unbind(-1))) if self.by_token else maps.movedim(-1, 0)
            self.kept.append(by_token.unflatten(1, (-1, attn.heads)).transpose(0, 1))  # (images, tokens, heads, pixels)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(maps, v))))


class Pictures:
    "Augmented views of images that lie in files, here in memory. View i is the same whenever it is drawn."
    def __init__(self, images: np.ndarray, views: int):                # uint8 (n, 3, s, s)
        self.files, self.views, side = [], views, images.shape[-1]
        for image in images:
            Image.fromarray(image.transpose(1, 2, 0)).save(file := io.BytesIO(), 'PNG')
            self.files.append(file.getvalue())
        self.augment = transforms.Compose([
            transforms.RandomApply([transforms.RandomRotation(45, expand=True)], .75), transforms.Resize(side),
            transforms.RandomHorizontalFlip(.25), transforms.RandomCrop(side), transforms.ToTensor(),
            transforms.Normalize([.5], [.5])])

    def __len__(self) -> int:
        return len(self.files)*self.views

    def draw(self, chosen: Sequence[int]) -> Tensor:                   # -> (n, 3, s, s) in [-1, 1]
        drawn = []
        for i in chosen:
            torch.default_generator.manual_seed(int(i))
            drawn.append(self.augment(Image.open(io.BytesIO(self.files[int(i)//self.views])).convert('RGB')))
        return torch.stack(drawn)


class Published:
    "One stage, step by step, the published way; without some of its habits if `habits` are fewer."
    def __init__(self,
                 pipe: StableDiffusionPipeline,
                 table: nn.Embedding,
                 stage: Stage,
                 pictures: Pictures,
                 habits: frozenset = frozenset(HABITS),
                 first_release: bool = False,
                ):
        self.pipe, self.stage, self.pictures, self.habits = pipe, stage, pictures, habits
        self.schedule, self.kept = noise_schedule(pipe), []
        self.prompt, number = fill(PROMPT, [TOKEN], CATEGORY), pipe.tokenizer.convert_tokens_to_ids(TOKEN)
        self.ids = tokens(pipe, [self.prompt])
        self.at = self.ids[0].tolist().index(number)
        self.vector = nn.Parameter(table.weight[number].detach().clone(), requires_grad=stage.trains == 'vector')
        replaced = lambda module, args, out: torch.where((args[0] == number)[..., None], self.vector, out)
        table.register_forward_hook(replaced)
        pipe.text_encoder.requires_grad_(first_release)
        for name, p in pipe.unet.named_parameters():
            p.requires_grad_(stage.trained(name))
        for name in pipe.unet.attn_processors:
            if 'attn2' in name or 'self-attention' in habits:
                layer = pipe.unet.get_submodule(name.removesuffix('.processor'))
                layer.set_processor(WrittenOut(self.kept, 'regulariser' in habits))
        self.trained = [p for p in (self.vector, *pipe.unet.parameters()) if p.requires_grad]
        fused = {} if 'optimizer' in habits else {'fused': True}
        self.optimizer = torch.optim.AdamW(self.trained, lr=stage.lr, betas=(.9, .999), eps=1e-8,
                                           weight_decay=stage.weight_decay, **fused)
        every = range(len(pictures))
        with torch.no_grad():
            fixed = 'text' not in habits and not self.vector.requires_grad
            self.text = pipe.text_encoder(self.ids)[0] if fixed else None
            self.pixels = None if 'images' in habits else pictures.draw(every)
            self.latents = None
            if 'encoding' not in habits:
                self.latents = torch.cat([self.encode(part) for part in pictures.draw(every).split(16)])

    def encode(self, pixels: Tensor) -> Tensor:
        "Latents; published: a sample; here the mean, so that the losses can be compared."
        encoded = self.pipe.vae.encode(pixels.to(self.ids.device))
        latents = encoded.latents if isinstance(self.pipe.vae, AutoencoderTiny) else encoded.latent_dist.mean
        return latents*self.pipe.vae.config.scaling_factor

    def embedded(self, n: int) -> Tensor:
        "The prompt's embedding for n images."
        if 'text' in self.habits:
            return self.pipe.text_encoder(torch.cat([tokens(self.pipe, [self.prompt]) for _ in range(n)]))[0]
        return (self.pipe.text_encoder(self.ids)[0] if self.text is None else self.text).expand(n, -1, -1)

    def penalty(self) -> Tensor:
        "The regulariser: [V] and the token after it, over heads and pixels."
        stage, total, v, category = self.stage, 0., self.at, self.at + 1
        for maps in self.kept:
            if 'regulariser' in self.habits:
                for mean, variance in zip(maps.mean((2, 3)), maps.var((2, 3))):
                    total = total + stage.lambda_mu*F.mse_loss(mean[v], mean[category])
                    total = total + stage.lambda_sigma*F.mse_loss(variance[v], variance[category])
            else:
                x, y = maps[:, v].flatten(1), maps[:, category].flatten(1)
                means, variances = (x.mean(1) - y.mean(1))**2, (x.var(1) - y.var(1))**2
                total = total + (stage.lambda_mu*means + stage.lambda_sigma*variances).sum()
        return total/len(self.kept)/(1 if stage.reduction == 'sum' else len(self.kept[0]))

    def step(self, chosen: Tensor, noise: Tensor, timesteps: Tensor) -> float:
        "One step of the optimiser; returns the loss."
        stage, text = self.stage, self.embedded(len(chosen))
        if self.latents is None:
            x = self.encode(self.pictures.draw(chosen) if self.pixels is None else self.pixels[chosen])
        else:
            x = self.latents[chosen]
        self.kept.clear()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == 'cuda'):
            noised = self.schedule.add_noise(x, noise, timesteps)
            predicted = self.pipe.unet(noised, timesteps, text).sample.float()
        epsilon = self.schedule.config.prediction_type == 'epsilon'
        target = noise if epsilon else self.schedule.get_velocity(x, noise, timesteps)
        loss = F.mse_loss(predicted, target) + self.penalty()
        loss.backward()
        if stage.clip:
            nn.utils.clip_grad_norm_(self.trained, stage.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none='optimizer' not in self.habits)   # not the text encoder's: they pile up
        return loss.item()


class Ours(Training):
    "The same stage by lthash, as `personalize` runs it."
    def __init__(self, pipe: StableDiffusionPipeline, table: nn.Embedding, method: PersonalizationMethod, number: int,
                 pictures: Pictures):
        pixels = (127.5*pictures.draw(range(len(pictures))) + 127.5).round().to(torch.uint8)
        super().__init__(pipe, method, CATEGORY, [TOKEN], table, to_latents(pipe, pixels).float(), None)
        self.enter(number)

    def loss(self) -> tuple[Tensor, float, float]:
        "As in `Training`; keeps the value."
        found = super().loss()
        self.value = found[1] + found[2]
        return found


def draw(number: int, step: int, n: int, images: int, shape: tuple[int, ...],
         schedule: DDPMScheduler) -> tuple[Tensor, Tensor, Tensor]:
    "Images, noise and timesteps of a step, as lthash draws them."
    rng = np.random.default_rng(derive_seed('personalize', 0, number, step))
    chosen = torch.from_numpy(rng.integers(images, size=n))
    generator = torch.Generator().manual_seed(derive_seed('personalize noise', 0, number, step))
    noise = torch.randn((n, *shape), generator=generator)
    return chosen, noise, torch.randint(0, schedule.config.num_train_timesteps, (n,), generator=generator)


@contextmanager
def ready(a: argparse.Namespace,
          number: int,                 # of the stage
          habits: frozenset | None,    # None: lthash
         ) -> Iterator[Callable[[int], float]]:
    "A stage about to begin: a function of the step that takes it and returns its loss."
    pipe, method = load_pipeline(a.generator, a.device), chosen_method(a)
    pictures, stage = Pictures(fabrics(a.images, pipe), method.views), method.stages[number]
    shape = (pipe.unet.config.in_channels, pipe.unet.config.sample_size, pipe.unet.config.sample_size)
    with with_tokens(pipe, [TOKEN], initial_vectors(pipe, method, CATEGORY)) as table:
        if habits is None:
            if a.lora:
                method = method.lora(a.lora)
                add_lora(pipe.unet, a.lora, derive_seed('lora', 0), 'attn[12]')
            run = Ours(pipe, table, method, number, pictures)

            def step(k: int) -> float:
                run.advance()
                return run.value
        else:
            peer = Published(pipe, table, stage, pictures, habits, a.first_release)

            def step(k: int) -> float:
                chosen, noise, t = draw(number, k, stage.batch, len(pictures), shape, peer.schedule)
                return peer.step(chosen, noise.to(pipe.unet.device), t.to(pipe.unet.device))
        yield step


def fabrics(n: int, pipe: StableDiffusionPipeline) -> np.ndarray:      # -> uint8 (n, 3, s, s)
    "Generic textiles of the generator's size."
    return textiles.render_many(range(n), seed=1, size=image_size(pipe))[0]


def chosen_method(a: argparse.Namespace) -> PersonalizationMethod:
    "AttnDreamBooth with the requested batch size."
    method = METHODS[a.budget]['attndreambooth']
    return replace(method, stages=tuple(replace(s, batch=a.batch) for s in method.stages))


def captions() -> list[str]:
    "Captions that give a tokenizer its vocabulary."
    return [textiles.caption(textiles.textile(i)) for i in range(2000)]


def untrained(folder: str) -> str:
    "The embedded generator with random weights: a step takes the same time."
    transformers.utils.logging.disable_progress_bar()
    build_pipeline(LOOM, captions()).save_pretrained(folder)
    return folder


def narrowed(folder: str, by: int, pixels: int = 256) -> str:
    "Stable Diffusion 2.1's layout with all widths divided, random weights: its proportions, where a CPU can run them."
    def config(part: str, *divided: str, **others) -> dict:
        found = json.loads((project_data()/'stable-diffusion-2-1'/part/'config.json').read_text())
        narrow = lambda v: [n//by for n in v] if isinstance(v, list) else v//by
        return {**found, **{k: narrow(found[k]) for k in divided}, **others}
    words = build_tokenizer(captions(), 77)
    special = dict(vocab_size=len(words), bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id,
                   pad_token_id=words.pad_token_id)
    text = config('text_encoder', 'hidden_size', 'intermediate_size', 'num_attention_heads', **special)
    vae = config('vae', 'block_out_channels', norm_num_groups=32//by, sample_size=pixels)
    unet = config('unet', 'block_out_channels', 'cross_attention_dim', norm_num_groups=32//by, sample_size=pixels//8)
    schedule = DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False,
                             steps_offset=1)
    pipe = StableDiffusionPipeline(text_encoder=CLIPTextModel(CLIPTextConfig(**text)), tokenizer=words,
                                   vae=AutoencoderKL.from_config(vae), unet=UNet2DConditionModel.from_config(unet),
                                   scheduler=schedule, safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)
    pipe.save_pretrained(folder)
    return folder


def seconds(function: Callable, *arguments) -> tuple[tuple[float, float], float]:
    "Wall clock and processor time, and what it returned: a number that was read, so a CUDA device has finished."
    begin = time.perf_counter(), time.process_time()
    found = function(*arguments)
    return (time.perf_counter() - begin[0], time.process_time() - begin[1]), found


def extra_megabytes(function: Callable, device: torch.device) -> float:
    "Most memory held within, above what was held before: of a CUDA device, or of the process."
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    Path('/proc/self/clear_refs').write_text('5')                      # Linux: forget the peak so far
    before = psutil.Process().memory_info().rss
    function()
    peak = next(x for x in Path('/proc/self/status').read_text().splitlines() if x.startswith('VmHWM'))
    return int(peak.split()[1])/2**10 - before/2**20


def measured(a: argparse.Namespace, side: str, number: int) -> float:
    "Extra memory in megabytes of three steps, in a process of its own."
    given = {k: vars(a)[k] for k in ('batch', 'images', 'threads', 'lora', 'generator', 'budget', 'device')}
    options = [f'--{k}={v}' for k, v in given.items() if v is not None] + ['--first-release']*a.first_release
    command = [sys.executable, __file__, *options, '--measure', side, str(number)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (('steps', 30, 'timed, of each stage'), ('warmup', 3, 'steps before them'),
                                ('batch', 8, ''), ('images', 8, 'of the class'), ('threads', 2, ''),
                                ('lora', 0, 'rank, of lthash only; 0: full weights')):
        parser.add_argument(f'--{name}', type=int, default=default, help=text)
    parser.add_argument('--generator', default='loom', help='a name, a folder or a hub id')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    parser.add_argument('--narrowed', type=int, metavar='N', help="in place of --generator: Stable Diffusion 2.1's "
                        'layout, every width divided by N, 256 px, random weights')
    parser.add_argument('--budget', default='as_published', choices=METHODS, help='numbers of the stages, for both')
    parser.add_argument('--device')
    parser.add_argument('--first-release', action='store_true', help="the peer's text encoder as in its first "
                        'release, not frozen: gradients of all its weights pile up unused')
    parser.add_argument('--habits', action='store_true', help='also time the peer without each of its habits')
    parser.add_argument('--no-memory', action='store_true')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)  # in a child: memory of one side in one stage
    return parser.parse_args()


def main() -> None:
    "Run the comparison, or in a child process measure memory."
    a = arguments()
    torch.set_num_threads(a.threads)
    if a.measure:
        side, number = a.measure
        with ready(a, int(number), None if side == 'lthash' else frozenset(HABITS)) as step:
            print(extra_megabytes(lambda: [step(k) for k in range(3)], pick_device(a.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if a.random:
            a.generator = untrained(folder)
        if a.narrowed:
            a.generator = narrowed(folder, a.narrowed)
        compare(a)


def check_losses(a: argparse.Namespace, number: int, ours: np.ndarray, theirs: np.ndarray,
                 device: torch.device) -> float:
    "Largest relative difference of the losses; an error if it is more than rounding."
    apart = np.abs(theirs/ours - 1)
    compared = apart[:1] if a.lora else apart                          # LoRA trains other weights from then on
    tolerance = 1e-5 if device.type == 'cpu' else 2e-2                 # there in bfloat16
    if compared[0] > tolerance or compared.max() > 100*tolerance:
        raise AssertionError(f'stage {number + 1}: the losses differ by {compared[0]:.1e} in the first step, by up to '
                             f'{compared.max():.1e} later; expected at most {tolerance:.0e} and {100*tolerance:.0e}')
    return compared.max()


def time_stage(a: argparse.Namespace, number: int, sides: dict[str, frozenset | None]) -> tuple[dict, dict]:
    "Seconds (steps, 2) and losses (warm-up and steps,) of every side, step by step in turns."
    took, losses = ({name: [] for name in sides} for _ in range(2))
    with ExitStack() as stack:
        steps = {name: stack.enter_context(ready(a, number, habits)) for name, habits in sides.items()}
        for k in range(a.warmup + a.steps):
            for name, step in steps.items():
                spent, loss = seconds(step, k)
                losses[name].append(loss)
                if k >= a.warmup:
                    took[name].append(spent)
    return {n: np.array(t) for n, t in took.items()}, {n: np.array(x) for n, x in losses.items()}


def compare(a: argparse.Namespace) -> None:
    "Print the comparison as Markdown."
    pipe, method = load_pipeline(a.generator, a.device), chosen_method(a)
    where, size = pipe.unet.device, image_size(pipe)
    weights = sum(p.numel() for p in pipe.unet.parameters())/1e6
    print(f'{platform.processor() or platform.machine()}, {device_name(where)}, torch {torch.__version__}; '
          f'batch {a.batch}, {weights:.1f} million weights in the U-Net, {size} px'
          + (f', LoRA of rank {a.lora} in lthash' if a.lora else '') + '\n')
    some = torch.from_numpy(fabrics(a.images, pipe))
    encode = lambda: to_latents(pipe, views(some, method.augmentation, method.views, size))[0, 0, 0, 0].item()
    once = median(seconds(encode)[0][0] for _ in range(3))
    sides = {'lthash': None, 'published': frozenset(HABITS)}
    if a.habits:
        sides |= {f'published, without: {h}': frozenset(HABITS) - {h} for h in HABITS}
    print('| stage | lthash, ms per step | published, ms | ratio | of the fastest | of processor time | mean loss '
          '| furthest apart | extra memory, lthash and published |\n|---|---|---|---|---|---|---|---|---|')
    typical = []
    for number, stage in enumerate(method.stages):
        took, losses = time_stage(a, number, sides)
        apart = check_losses(a, number, losses['lthash'], losses['published'], where)
        memory = '-'
        if not a.no_memory:
            memory = ' and '.join(f'{measured(a, side, number):.0f} MB' for side in ('lthash', 'published'))
        typical.append({name: median(t[:, 0]) for name, t in took.items()})
        ours, peer = typical[-1]['lthash'], typical[-1]['published']
        fastest = min(took['published'][:, 0])/min(took['lthash'][:, 0])
        processor = median(took['published'][:, 1])/median(took['lthash'][:, 1])
        print(f"| {number + 1}, {stage.trains} | {1e3*ours:.1f} | {1e3*peer:.1f} | **{peer/ours:.2f} x** "
              f"| {fastest:.2f} x | {processor:.2f} x | {losses['lthash'].mean():.6f} | {apart:.0e} | {memory} |",
              flush=True)
    summary(a, method, typical, once, sides)


def summary(a: argparse.Namespace, method: PersonalizationMethod, typical: list[dict], once: float,
            sides: dict) -> None:
    "Print the whole method's time, and which aims were met."
    whole = {name: sum(s.steps*t[name] for s, t in zip(method.stages, typical)) for name in sides}
    whole['lthash'] += once
    ratio = whole['published']/whole['lthash']
    print(f"| all {sum(s.steps for s in method.stages)} steps, seconds | {whole['lthash']:.1f} "
          f"| {whole['published']:.1f} | **{ratio:.2f} x** | | | | | |")
    print(f'\nBefore the first step lthash draws and encodes {method.views} views of each image: {once:.2f} s, '
          'counted in the last row.')
    if a.habits:
        print('\n| the published way without | the whole method takes | saved |\n|---|---|---|')
        for h, text in HABITS.items():
            spent = whole[f'published, without: {h}']
            print(f"| {h} ({text}) | {spent:.1f} s | {100*(1 - spent/whole['published']):.0f} % |")
    slow = [f"stage {i + 1} ({t['published']/t['lthash']:.2f} x)" for i, t in enumerate(typical)
            if t['published'] < 1.5*t['lthash']]
    reached = 'Reached' if ratio >= 1.5 else 'Missed'
    stages = f"missed in {' and '.join(slow)}" if slow else 'reached in every stage'
    print(f'\nAim: at least 1.5 times as fast. {reached} over the whole method ({ratio:.2f} x); {stages}.')


if __name__ == '__main__':
    main()
