"""Images per second, and are they worth as much? lthash's sampling beside AttnDreamBooth's published inference.

    python benchmarks/generation.py [--seeds 3 --threads 2 --generator loom --device cpu]
    python benchmarks/generation.py --cas [--classes 6 --scale 0.3]

lthash: `generate` with the settings of `SyntheticConfig`, written to disk. Published: 50 steps of DPM-Solver++,
guidance 7.5, batches of 8, one random stream for all, nothing written; half precision on a CUDA device.
With --cas both draw the same personalised classes of silk (head to tail of the long-tailed set), as many images each,
and their classification accuracy scores (`cas`) on real validation images are compared: same classifier and seeds.
"""
import argparse
import os
import platform
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from personalization import seconds, untrained
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from lthash.core.runtime import device_name
from lthash.data.base import ImageSet, retrieval_split
from lthash.data.config import load_data, training_set
from lthash.diffusion.cas import CAS_CONFIG, cas, permutation_threshold
from lthash.diffusion.concepts import Concept
from lthash.diffusion.generate import Prompt, category_prompt, generate
from lthash.diffusion.pipelines import image_size, load_pipeline
from lthash.diffusion.synthetic import SyntheticConfig, class_concept

STEPS, GUIDANCE, BATCH = 50, 7.5, 8   # published


def published(pipe: StableDiffusionPipeline, concept: Concept | Prompt, n: int, size: int, seed: int) -> Tensor:
    "AttnDreamBooth's inference: uint8 (n, 3, size, size)."
    with concept.applied(pipe):
        before, pipe.scheduler = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        try:
            stream, pictures = torch.Generator(pipe.unet.device).manual_seed(seed), []
            while len(pictures) < n:
                count = min(BATCH, n - len(pictures))
                pictures += pipe(concept.prompt, num_images_per_prompt=count, num_inference_steps=STEPS,
                                 guidance_scale=GUIDANCE, generator=stream).images
        finally:
            pipe.scheduler = before
    return torch.stack([resize(pil_to_tensor(p), [size, size], InterpolationMode.BICUBIC, antialias=True)
                        for p in pictures])


def spread(config: SyntheticConfig, data: ImageSet, classes: int) -> list[int]:
    "Class numbers from the largest to the smallest class of the long-tailed set, evenly."
    _, counts = training_set(config, data)
    return np.argsort(-counts, kind='stable')[np.linspace(0, len(counts) - 1, classes).round().astype(int)].tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = (('images', 0, 'of each class and seed; default: whole batches of lthash, at least 48'),
               ('seeds', 3, 'turns; with --cas also seeds of the classifier'), ('classes', 6, 'with --cas'),
               ('threads', 2, ''), ('train-per-class', 200, 'of silk'), ('val-per-class', 40, 'of silk'),
               ('samples', CAS_CONFIG.samples, 'training samples of the classifier'))
    for name, default, told in numbers:
        parser.add_argument(f'--{name}', type=int, default=default, help=told)
    parser.add_argument('--cas', action='store_true', help='personalise classes of silk and compare CAS')
    parser.add_argument('--scale', type=float, default=1., help="share of the personalisation's steps, with --cas")
    parser.add_argument('--generator', default='loom', help='as for load_pipeline')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    parser.add_argument('--device')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.device:
        os.environ['LTHASH_DEVICE'] = a.device
    with tempfile.TemporaryDirectory() as folder:
        if a.random:
            a.generator = untrained(f'{folder}/generator')
        compare(a, Path(folder))


def compare(a: argparse.Namespace, folder: Path) -> None:
    "Draw both ways in turns, and print rates and scores."
    config = SyntheticConfig(generator=a.generator, scale=a.scale, train_per_class=a.train_per_class,
                             val_per_class=a.val_per_class)
    pipe = load_pipeline(a.generator)
    half = load_pipeline(a.generator, dtype=torch.float16) if pipe.unet.device.type == 'cuda' else pipe
    a.images = a.images or config.batch*-(-48//config.batch)
    drawn = {**{k: v for k, v in config.sampling.items() if k != 'seed'}, 'batch': config.batch}
    machine = platform.processor() or platform.machine()
    print(f'{machine}, {device_name(pipe.unet.device)}, torch {torch.__version__}; '
          f'{image_size(pipe)} px, kept at {config.size} px')
    concepts = {0: category_prompt('floral fabric')}
    if a.cas:
        data = load_data(config)
        classes = spread(config, data, a.classes)
        spent, concepts = seconds(lambda: {c: class_concept(config, c) for c in classes})
        names = ', '.join(data.classes[c] for c in classes)
        print(f'silk, {config.method}, {100*config.scale:g} % of its steps, {spent[0]:.0f} s: {names}')

    def ours(concept: Concept | Prompt, seed: int, n: int) -> Tensor:
        return generate(pipe, concept, n, tempfile.mkdtemp(dir=folder), seed=seed, progress=False, **drawn)

    sides = {'lthash': ours,
             'published': lambda concept, seed, n: published(half, concept, n, config.size, seed)}
    for side in sides.values():
        side(concepts[min(concepts)], 10**6, BATCH)                        # warm
    took, results = ({name: [] for name in sides} for _ in range(2))
    for seed in range(a.seeds):
        images = {name: [] for name in sides}
        for concept in concepts.values():
            for name, side in sides.items():
                spent, some = seconds(side, concept, seed, a.images)
                took[name].append(spent)
                images[name].append(some)
        if a.cas:
            at = retrieval_split(data, 'paper').validation
            labels = torch.tensor(list(concepts)).repeat_interleave(a.images)
            recipe = replace(CAS_CONFIG, samples=a.samples)
            real = data.images[at], data.labels[at]
            for name in sides:
                results[name].append(cas(torch.cat(images[name]), labels, *real, seed, recipe))
    tell(a, config, took, results, len(concepts))


def tell(a: argparse.Namespace, config: SyntheticConfig, took: dict, results: dict, classes: int) -> None:
    "The table, and what it says about the two aims."
    rate = {name: a.images/np.median(np.array(t), axis=0) for name, t in took.items()}     # wall clock, processor
    ratio, processor = rate['lthash']/rate['published']
    settings = {'lthash': (config.steps, config.guidance, config.batch, config.sampler),
                'published': (STEPS, GUIDANCE, BATCH, 'dpm++')}
    score = {name: 100*np.array([r['accuracy'] for r in found]) for name, found in results.items()}
    print('\n| way | steps | guidance | batch | sampler | images per second | CAS by seed (%) |\n|' + '---|'*7)
    for name, (steps, guidance, batch, sampler) in settings.items():
        seeds = ', '.join(f'{s:.1f}' for s in score[name])
        print(f'| {name} | {steps} | {guidance:g} | {batch} | {sampler} | {rate[name][0]:.2f} | {seeds} |')
    print(f'\nMedian of {len(took["lthash"])} turns of {a.images} images; processor time {processor:.2f} x.')
    print(f'Aim: at least 5 times as many images per second. {"Reached" if ratio >= 5 else "Missed"} ({ratio:.2f} x).')
    if a.cas:
        gain = score['lthash'] - score['published']
        within = -gain.mean() < max(s.std() for s in score.values())
        verdict = 'Reached' if gain.mean() >= 0 else 'Missed by less than one deviation' if within else 'Missed'
        limit = 100*permutation_threshold(results['lthash'])
        print(f'Aim: CAS at least as good. {verdict} ({gain.mean():+.1f} points; chance {100/classes:.1f} %).')
        passed = 'passed' if score['lthash'].mean() > limit else 'failed'
        print(f"Threshold of lthash's CAS test: {limit:.1f} %, {passed}.")


if __name__ == '__main__':
    main()
