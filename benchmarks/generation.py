"""How many images a second, and are they worth as much? lthash's settings for drawing a class, beside AttnDreamBooth's published inference.

    python benchmarks/generation.py [--seeds 3 --threads 2 --generator loom --device cpu]
    python benchmarks/generation.py --cas [--classes 6 --scale 0.3]

lthash: `generation.generate` with the settings of `generation.Synthetic`, written to disk. Published: 50 steps of DPM-Solver++, guidance 7.5, batches of 8, one random stream for all, nothing written; half precision on a CUDA device.
With --cas both draw the same personalised classes of silk (head to tail of the long-tailed set), as many images each, and a network that has seen nothing else is examined on real validation images (`gate.cas`): the same classifier, seed and images.
"""
import argparse, os, platform, tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from lthash import datasets, gate, generation, generators, trials
from lthash.runs import device_name
from personalization import seconds, untrained

STEPS, GUIDANCE, BATCH = 50, 7.5, 8   # published


def published(pipe, concept, n: int, size: int, seed: int) -> Tensor:   # -> uint8 (n, 3, size, size)
    with concept.applied(pipe):
        before, pipe.scheduler = pipe.scheduler, DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        try:
            stream, pictures = torch.Generator(pipe.unet.device).manual_seed(seed), []
            while len(pictures) < n:
                pictures += pipe(concept.prompt, num_images_per_prompt=min(BATCH, n - len(pictures)), num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=stream).images
        finally: pipe.scheduler = before
    return torch.stack([resize(pil_to_tensor(p), [size, size], InterpolationMode.BICUBIC, antialias=True) for p in pictures])


def spread(config: generation.Synthetic, data: datasets.ImageSet, classes: int) -> list[int]:
    "Class numbers from the largest to the smallest class of the long-tailed set, evenly."
    _, counts = trials.training_set(config.trial, data)
    return np.argsort(-counts, kind='stable')[np.linspace(0, len(counts) - 1, classes).round().astype(int)].tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, told in (('images', 0, 'of each class and seed; default: whole batches of lthash, at least 48'), ('seeds', 3, 'turns; with --cas also seeds of the examination'), ('classes', 6, 'with --cas'), ('threads', 2, ''), ('train-per-class', 200, 'of silk'), ('val-per-class', 40, 'of silk')):
        parser.add_argument(f'--{name}', type=int, default=default, help=told)
    parser.add_argument('--cas', action='store_true', help='personalise classes of silk, draw them both ways and examine both')
    parser.add_argument('--scale', type=float, default=1., help="share of the personalisation's steps, with --cas")
    parser.add_argument('--passes', type=int, default=gate.EXAM.passes, help="of the examination's training")
    parser.add_argument('--generator', default='loom', help='as for lthash.generators.load')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    parser.add_argument('--device')
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if a.device: os.environ['LTHASH_DEVICE'] = a.device
    with tempfile.TemporaryDirectory() as folder:
        if a.random: a.generator = untrained(f'{folder}/generator')
        compare(a, Path(folder))


def compare(a, folder: Path):
    config = generation.Synthetic(generator=a.generator, scale=a.scale, train_per_class=a.train_per_class, val_per_class=a.val_per_class)
    pipe = generators.load(a.generator)
    half = generators.load(a.generator, dtype=torch.float16) if pipe.unet.device.type == 'cuda' else pipe
    a.images = a.images or config.batch*-(-48//config.batch)
    drawn = {k: getattr(config, k) for k in ('size', 'steps', 'guidance', 'sampler', 'batch')}
    print(f'{platform.processor() or platform.machine()}, {device_name(pipe.unet.device)}, torch {torch.__version__}; {generators.image_size(pipe)} px, kept at {config.size} px')
    if a.cas:
        data = trials.load_data(config.trial)
        classes = spread(config, data, a.classes)
        taking, concepts = seconds(lambda: {c: generation.class_concept(config, c) for c in classes})
        print(f'{len(classes)} classes of silk, {config.method}, {100*config.scale:g} % of its steps ({taking[0]:.0f} s now, nothing where they were on disk): {", ".join(data.classes[c] for c in classes)}')
    else: concepts = {0: generation.category_prompt('floral fabric')}
    sides = {'lthash': lambda concept, seed, n: generation.generate(pipe, concept, n, tempfile.mkdtemp(dir=folder), seed=seed, progress=False, **drawn),
             'published': lambda concept, seed, n: published(half, concept, n, config.size, seed)}
    for side in sides.values(): side(concepts[min(concepts)], 10**6, BATCH)                        # warm
    took, exams = ({name: [] for name in sides} for _ in range(2))
    for seed in range(a.seeds):
        images = {name: [] for name in sides}
        for concept in concepts.values():
            for name, side in sides.items():
                spent, some = seconds(side, concept, seed, a.images)
                took[name].append(spent)
                images[name].append(some)
        if not a.cas: continue
        at = datasets.retrieval_split(data, 'paper').validation
        labels = torch.tensor(list(concepts)).repeat_interleave(a.images)
        for name in sides: exams[name].append(gate.cas(torch.cat(images[name]), labels, data.images[at], data.labels[at], seed, replace(gate.EXAM, passes=a.passes)))

    rate = {name: a.images/np.median(np.array(t), axis=0) for name, t in took.items()}             # wall clock, processor
    ratio, processor = rate['lthash']/rate['published']
    told = {'lthash': f'{config.steps} steps, guidance {config.guidance:g}, batches of {config.batch}, {config.sampler}', 'published': f'{STEPS} steps, guidance {GUIDANCE:g}, batches of {BATCH}, dpm++'}
    print(f'\n| way | settings | images a second | |{" accuracy, by seed | mean |" if a.cas else ""}\n|---|---|---|---|{"---|---|" if a.cas else ""}')
    score = {name: 100*np.array([e['accuracy'] for e in es]) for name, es in exams.items()}
    for name in sides:
        words = f'**{ratio:.2f} x** (processor time {processor:.2f} x)' if name == 'lthash' else ''
        print(f'| {name} | {told[name]} | {rate[name][0]:.2f} | {words} |' + (f" {', '.join(f'{s:.1f}' for s in score[name])} | {score[name].mean():.1f} ± {score[name].std():.1f} % |" if a.cas else ''))
    print(f'\nMedian of {len(took["lthash"])} turns of {a.images} images each, in turns with the other way.' + (f' lthash draws whole batches: {-a.images % config.batch} images more were drawn each time and not counted.' if a.images % config.batch else ''))
    print(f"Aim: at least 5 times as many images a second. {'Reached' if ratio >= 5 else 'Missed'} ({ratio:.2f} x).")
    if a.cas:
        gain = score['lthash'] - score['published']
        word = 'Reached' if gain.mean() >= 0 else 'Missed by less than one standard deviation over seeds' if -gain.mean() < max(s.std() for s in score.values()) else 'Missed'
        floor = 100*gate.luck(exams['lthash'])
        print(f'Aim: an accuracy at least as good. {word} ({gain.mean():+.1f} points; by seed {", ".join(f"{g:+.1f}" for g in gain)}). Tested on {exams["lthash"][0]["tested"]} real validation images, {100/len(concepts):.1f} % is chance, '
              f'{floor:.1f} % the floor of lthash\'s gate: {"above it" if score["lthash"].mean() > floor else "not above it, so these images are worth nothing either way"}.')


if __name__ == '__main__':
    main()
