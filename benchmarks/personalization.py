"""How fast is a step of personalisation? AttnDreamBooth's three stages in lthash, beside the same steps done as its published code does them.

    python benchmarks/personalization.py [--steps 30 --batch 8 --threads 2 --generator loom --lora 0 --device cpu] [--first-release]
    python benchmarks/personalization.py --narrowed 4 --images 2 --batch 4 --steps 6 --warmup 1

The peer is written here after a reading of the published code; no line of it is copied. `HABITS` says what it does otherwise than lthash. U-Net, augmented images, noise, timesteps, loss and AdamW's numbers are the same for both; that the
losses agree is asserted at every step. A step of each, in turns; what lthash does once for a class is measured as well and counts.
"""
import argparse, io, json, platform, subprocess, sys, tempfile, time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms
from transformers import CLIPTextConfig, CLIPTextModel

from lthash import generators, loom, textiles
from lthash.attention import noise_schedule
from lthash.concepts import PROMPT, fill, placed, placeholder
from lthash.personalization import _lora_layers, _Training, initial_vectors
from lthash.runs import derive_seed, device as pick_device, device_name, project_data
from lthash.stages import METHODS, TRAINS, Method, Stage, views

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
    "Attention with its probabilities written out, self-attention and cross-attention alike; those of the cross-attentions are kept."
    def __init__(self, kept: list[Tensor], by_token: bool): self.kept, self.by_token = kept, by_token

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **ignored):
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = (attn.head_to_batch_dim(project(x)) for project, x in ((attn.to_q, hidden_states), (attn.to_k, seen), (attn.to_v, seen)))
        maps = attn.get_attention_scores(q, k, attention_mask)                         # (images*heads, pixels, tokens)
        if encoder_hidden_states is not None:
            tokens = torch.stack(list(maps.unbind(-1))) if self.by_token else maps.movedim(-1, 0)
            self.kept.append(tokens.unflatten(1, (-1, attn.heads)).transpose(0, 1))    # (images, tokens, heads, pixels)
        return attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(torch.bmm(maps, v))))


class Pictures:
    "Augmented views of images that lie in files, here in memory. View i is the same whenever it is drawn."
    def __init__(self, images: np.ndarray, views: int):                # uint8 (n, 3, s, s)
        self.files, self.views, side = [], views, images.shape[-1]
        for image in images:
            Image.fromarray(image.transpose(1, 2, 0)).save(file := io.BytesIO(), 'PNG')
            self.files.append(file.getvalue())
        self.augment = transforms.Compose([
            transforms.RandomApply([transforms.RandomRotation(45, expand=True)], .75), transforms.Resize(side), transforms.RandomHorizontalFlip(.25), transforms.RandomCrop(side), transforms.ToTensor(), transforms.Normalize([.5], [.5])])

    def __len__(self): return len(self.files)*self.views

    def draw(self, chosen) -> Tensor:                                  # -> (n, 3, s, s) in [-1, 1]
        drawn = []
        for i in chosen:
            torch.default_generator.manual_seed(int(i))
            drawn.append(self.augment(Image.open(io.BytesIO(self.files[int(i)//self.views])).convert('RGB')))
        return torch.stack(drawn)


class Published:
    "One stage, step by step, the published way; without some of its habits if `habits` are fewer."
    def __init__(self, pipe, table: nn.Embedding, stage: Stage, pictures: Pictures, habits=frozenset(HABITS), first_release: bool = False):
        self.pipe, self.stage, self.pictures, self.habits, self.schedule, self.kept = pipe, stage, pictures, habits, noise_schedule(pipe), []
        self.prompt, number = fill(PROMPT, [TOKEN], CATEGORY), pipe.tokenizer.convert_tokens_to_ids(TOKEN)
        self.ids = generators.tokens(pipe, [self.prompt])
        self.at = self.ids[0].tolist().index(number)
        self.vector = nn.Parameter(table.weight[number].detach().clone(), requires_grad=stage.trains == 'vector')
        table.register_forward_hook(lambda module, args, out: torch.where((args[0] == number)[..., None], self.vector, out))
        pipe.text_encoder.requires_grad_(first_release)
        for name, p in pipe.unet.named_parameters(): p.requires_grad_(TRAINS[stage.trains](name))
        for name in pipe.unet.attn_processors:
            if 'attn2' in name or 'self-attention' in habits: pipe.unet.get_submodule(name.removesuffix('.processor')).set_processor(WrittenOut(self.kept, 'regulariser' in habits))
        self.trained = [p for p in (self.vector, *pipe.unet.parameters()) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=stage.rate, betas=(.9, .999), eps=1e-8, weight_decay=stage.weight_decay, **({} if 'optimizer' in habits else {'fused': True}))
        with torch.no_grad():
            self.text = None if 'text' in habits or self.vector.requires_grad else pipe.text_encoder(self.ids)[0]
            self.pixels = None if 'images' in habits else pictures.draw(range(len(pictures)))
            self.latents = None if 'encoding' in habits else torch.cat([self.encode(part) for part in pictures.draw(range(len(pictures))).split(16)])

    def encode(self, pixels: Tensor) -> Tensor:
        encoded = self.pipe.vae.encode(pixels.to(self.ids.device))
        return (encoded.latents if hasattr(encoded, 'latents') else encoded.latent_dist.mean)*self.pipe.vae.config.scaling_factor   # published: a sample; the mean, so that the losses can be compared

    def embedded(self, n: int) -> Tensor:
        if 'text' not in self.habits: return (self.pipe.text_encoder(self.ids)[0] if self.text is None else self.text).expand(n, -1, -1)
        return self.pipe.text_encoder(torch.cat([generators.tokens(self.pipe, [self.prompt]) for _ in range(n)]))[0]

    def apart(self) -> Tensor:
        "The regulariser: [V] and the token after it, over heads and pixels."
        stage, total, v, category = self.stage, 0., self.at, self.at + 1
        for maps in self.kept:
            if 'regulariser' in self.habits:
                for mean, variance in zip(maps.mean((2, 3)), maps.var((2, 3))):
                    total = total + stage.lambda_mu*F.mse_loss(mean[v], mean[category]) + stage.lambda_sigma*F.mse_loss(variance[v], variance[category])
            else:
                x, y = maps[:, v].flatten(1), maps[:, category].flatten(1)
                total = total + (stage.lambda_mu*(x.mean(1) - y.mean(1))**2 + stage.lambda_sigma*(x.var(1) - y.var(1))**2).sum()
        return total/len(self.kept)/(1 if stage.reduction == 'sum' else len(self.kept[0]))

    def step(self, chosen: Tensor, noise: Tensor, timesteps: Tensor) -> float:
        stage, text = self.stage, self.embedded(len(chosen))
        if self.latents is None: x = self.encode(self.pictures.draw(chosen) if self.pixels is None else self.pixels[chosen])
        else: x = self.latents[chosen]
        self.kept.clear()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == 'cuda'): predicted = self.pipe.unet(self.schedule.add_noise(x, noise, timesteps), timesteps, text).sample.float()
        loss = F.mse_loss(predicted, noise if self.schedule.config.prediction_type == 'epsilon' else self.schedule.get_velocity(x, noise, timesteps)) + self.apart()
        loss.backward()
        if stage.clip: nn.utils.clip_grad_norm_(self.trained, stage.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none='optimizer' not in self.habits)           # not the text encoder's: where it has any, they pile up
        return loss.item()


class Ours(_Training):
    "The same stage by lthash, as `personalize` runs it."
    def __init__(self, pipe, table: nn.Embedding, method: Method, number: int, pictures: Pictures):
        pixels = (127.5*pictures.draw(range(len(pictures))) + 127.5).round().to(torch.uint8)
        super().__init__(pipe, method, CATEGORY, [TOKEN], table, generators.to_latents(pipe, pixels).float(), None, 0, '', None)
        self.enter(number)

    def loss(self):
        found = super().loss()
        self.value = found[1] + found[2]
        return found


def draw(number: int, step: int, n: int, images: int, shape: tuple[int, ...], schedule) -> tuple[Tensor, Tensor, Tensor]:
    "Images, noise and timesteps of a step, as lthash draws them."
    chosen = torch.from_numpy(np.random.default_rng(derive_seed('personalize', 0, number, step)).integers(images, size=n))
    generator = torch.Generator().manual_seed(derive_seed('personalize noise', 0, number, step))
    return chosen, torch.randn((n, *shape), generator=generator), torch.randint(0, schedule.config.num_train_timesteps, (n,), generator=generator)


@contextmanager
def ready(a, number: int, habits: frozenset | None):
    "Stage `number`, about to begin: a function of the step that takes it and returns its loss. `habits` None: lthash."
    pipe, method = generators.load(a.generator, a.device), recipe(a)
    pictures, stage, side = Pictures(fabrics(a.images, pipe), method.views), method.stages[number], pipe.unet.config.sample_size
    with placed(pipe, [TOKEN], initial_vectors(pipe, method, CATEGORY)) as table:
        if habits is None:
            if a.lora:
                method = method.lora(a.lora)
                _lora_layers(pipe.unet, method, 0)
            run = Ours(pipe, table, method, number, pictures)
            def step(k):
                run.advance()
                return run.value
        else:
            peer = Published(pipe, table, stage, pictures, habits, a.first_release)
            step = lambda k: peer.step(*(x.to(pipe.unet.device) if i else x for i, x in enumerate(draw(number, k, stage.batch, len(pictures), (pipe.unet.config.in_channels, side, side), peer.schedule))))
        yield step


def fabrics(n: int, pipe) -> np.ndarray:                               # -> uint8 (n, 3, s, s)
    return textiles.render_many(range(n), seed=1, size=generators.image_size(pipe))[0]


def recipe(a) -> Method:
    method = METHODS[a.preset]['attndreambooth']
    return replace(method, stages=tuple(replace(s, batch=a.batch) for s in method.stages))


def untrained(folder: str) -> str:
    "The embedded generator with random weights: a step takes the same time."
    transformers.utils.logging.disable_progress_bar()
    loom.build(loom.LOOM, [textiles.caption(textiles.textile(i)) for i in range(2000)]).save_pretrained(folder)
    return folder


def narrowed(folder: str, by: int, pixels: int = 256) -> str:
    "Stable Diffusion 2.1's layout with all widths divided, random weights: its own proportions of U-Net, text encoder and auto-encoder, where a CPU can run them."
    def config(part: str, *divided: str, **others) -> dict:
        found = json.loads((project_data()/'stable-diffusion-2-1'/part/'config.json').read_text())
        return {**found, **{k: [n//by for n in found[k]] if isinstance(found[k], list) else found[k]//by for k in divided}, **others}
    words = loom.build_tokenizer([textiles.caption(textiles.textile(i)) for i in range(2000)], 77)
    special = {f'{k}_token_id': getattr(words, f'{k}_token_id') for k in ('bos', 'eos', 'pad')}
    StableDiffusionPipeline(
        text_encoder=CLIPTextModel(CLIPTextConfig(**config('text_encoder', 'hidden_size', 'intermediate_size', 'num_attention_heads', vocab_size=len(words), **special))), tokenizer=words,
        vae=AutoencoderKL.from_config(config('vae', 'block_out_channels', norm_num_groups=32//by, sample_size=pixels)),
        unet=UNet2DConditionModel.from_config(config('unet', 'block_out_channels', 'cross_attention_dim', norm_num_groups=32//by, sample_size=pixels//8)),
        scheduler=DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule='scaled_linear', clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


def seconds(function, *arguments) -> tuple[tuple[float, float], float]:
    "Wall clock and processor time, and what the function returned: a number that was read, so that a CUDA device has finished."
    begin = time.perf_counter(), time.process_time()
    found = function(*arguments)
    return (time.perf_counter() - begin[0], time.process_time() - begin[1]), found


def extra_megabytes(function, device: torch.device) -> float:
    "Most memory held within, above what was held before: of a CUDA device, or of the process."
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before)/2**20
    Path('/proc/self/clear_refs').write_text('5')                      # Linux: forget the peak so far
    before = psutil.Process().memory_info().rss
    function()
    return int(next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')).split()[1])/2**10 - before/2**20


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, told in (('steps', 30, 'timed, of each stage'), ('warmup', 3, 'steps before them'), ('batch', 8, ''), ('images', 8, 'of the class'), ('threads', 2, ''), ('lora', 0, 'rank, of lthash only; 0: full weights')):
        parser.add_argument(f'--{name}', type=int, default=default, help=told)
    parser.add_argument('--generator', default='loom', help='as for lthash.generators.load')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    parser.add_argument('--narrowed', type=int, metavar='N', help="in place of --generator: Stable Diffusion 2.1's layout, every width divided by N, 256 px, random weights")
    parser.add_argument('--preset', default='as_published', choices=METHODS, help='numbers of the stages, for both')
    parser.add_argument('--device')
    parser.add_argument('--first-release', action='store_true', help="the peer's text encoder as in its first release, not frozen: gradients of all its weights pile up unused")
    parser.add_argument('--habits', action='store_true', help='also time the peer without each of its habits')
    parser.add_argument('--no-memory', action='store_true')
    parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)  # in a child: the memory of one side in one stage
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.measure:
        with ready(a, int(a.measure[1]), None if a.measure[0] == 'lthash' else frozenset(HABITS)) as step: print(extra_megabytes(lambda: [step(k) for k in range(3)], pick_device(a.device)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if a.random: a.generator = untrained(folder)
        if a.narrowed: a.generator = narrowed(folder, a.narrowed)
        compare(a)


def compare(a):
    pipe, method = generators.load(a.generator, a.device), recipe(a)
    where = pipe.unet.device
    print(f'{platform.processor() or platform.machine()}, {device_name(where)}, torch {torch.__version__}; batch {a.batch}, {sum(p.numel() for p in pipe.unet.parameters())/1e6:.1f} million weights in the U-Net, '
          f'{generators.image_size(pipe)} px{f", LoRA of rank {a.lora} in lthash" if a.lora else ""}\n')
    some = torch.from_numpy(fabrics(a.images, pipe))
    prepare = lambda: generators.to_latents(pipe, views(some, method.augmentation, method.views, generators.image_size(pipe)))[0, 0, 0, 0].item()
    once = median(seconds(prepare)[0][0] for _ in range(3))
    sides = {'lthash': None, 'published': frozenset(HABITS), **({f'published, without: {h}': frozenset(HABITS) - {h} for h in HABITS} if a.habits else {})}
    print('| stage | lthash, ms a step | published, ms | ratio | of the fastest | of processor time | mean loss | furthest apart | extra memory, lthash and published |\n|---|---|---|---|---|---|---|---|---|')
    typical = []
    for number, stage in enumerate(method.stages):
        with ExitStack() as stack:
            steps = {name: stack.enter_context(ready(a, number, habits)) for name, habits in sides.items()}
            took, losses = ({name: [] for name in sides} for _ in range(2))
            for k in range(a.warmup + a.steps):
                for name, step in steps.items():
                    spent, loss = seconds(step, k)
                    losses[name].append(loss)
                    if k >= a.warmup: took[name].append(spent)
        loss, theirs = (np.array(losses[name]) for name in ('lthash', 'published'))
        apart = np.abs(theirs/loss - 1)
        compared = apart[:1] if a.lora else apart                      # other weights are trained from then on
        tolerance = 1e-5 if where.type == 'cpu' else 2e-2              # there in bfloat16
        if compared[0] > tolerance or compared.max() > 100*tolerance: raise AssertionError(f'stage {number + 1}: the losses differ by {compared[0]:.1e} in the first step, by up to {compared.max():.1e} later; expected at most {tolerance:.0e} and {100*tolerance:.0e}')
        memory = '-' if a.no_memory else ' and '.join(f'{measured(a, name, number):.0f} MB' for name in ('lthash', 'published'))
        took = {name: np.array(t) for name, t in took.items()}         # (steps, 2)
        typical.append({name: median(t[:, 0]) for name, t in took.items()})
        ours, peer = typical[-1]['lthash'], typical[-1]['published']
        fastest, processor = (statistic(took['published'][:, i])/statistic(took['lthash'][:, i]) for i, statistic in ((0, min), (1, median)))
        print(f"| {number + 1}, {stage.trains} | {1e3*ours:.1f} | {1e3*peer:.1f} | **{peer/ours:.2f} x** | {fastest:.2f} x | {processor:.2f} x | {loss.mean():.6f} | {compared.max():.0e} | {memory} |", flush=True)
    whole = {name: sum(s.steps*t[name] for s, t in zip(method.stages, typical)) for name in sides}
    whole['lthash'] += once
    ratio = whole['published']/whole['lthash']
    print(f"| all {sum(s.steps for s in method.stages)} steps, seconds | {whole['lthash']:.1f} | {whole['published']:.1f} | **{ratio:.2f} x** | | | | | |")
    print(f'\nBefore the first step lthash draws and encodes {method.views} views of each image: {once:.2f} s, counted in the last row.')
    if a.habits:
        print('\n| the published way without | its whole recipe takes | saved |\n|---|---|---|')
        for h, told in HABITS.items(): print(f"| {h} ({told}) | {whole[f'published, without: {h}']:.1f} s | {100*(1 - whole[f'published, without: {h}']/whole['published']):.0f} % |")
    slow = [f"stage {i + 1} ({t['published']/t['lthash']:.2f} x)" for i, t in enumerate(typical) if t['published'] < 1.5*t['lthash']]
    print(f"\nAim: at least 1.5 times as fast. {'Reached' if ratio >= 1.5 else 'Missed'} over the whole recipe ({ratio:.2f} x); " + (f"missed in {' and '.join(slow)}." if slow else 'reached in every stage.'))


def measured(a, side: str, number: int) -> float:
    "Extra memory in megabytes of three steps, in a process of its own."
    plain = [f'--{k}={v}' for k in ('batch', 'images', 'threads', 'lora', 'generator', 'preset', 'device') if (v := getattr(a, k)) is not None] + ['--first-release']*a.first_release
    return float(subprocess.run([sys.executable, __file__, *plain, '--measure', side, str(number)], capture_output=True, text=True, check=True).stdout)


if __name__ == '__main__':
    main()
