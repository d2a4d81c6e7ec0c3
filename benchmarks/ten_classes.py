"""How long until the ten rarest classes of silk have images? From an empty folder of runs: personalise each of them and draw 100 images of it, with the settings of notebook 12 in profile cpu.

    python benchmarks/ten_classes.py [--scale 0.08 --images 100 --classes 10 --threads 2 --generator loom]

Wall clock from the start of the process; nothing is reused, not even silk's pictures. `--scale 1` takes the whole budget of `stages.METHODS['loom']`.
"""
import argparse, os, tempfile, time
from dataclasses import replace

import numpy as np
import psutil

BEGIN = psutil.Process().create_time()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('classes', 10), ('images', 100), ('threads', 2), ('train-per-class', 200), ('val-per-class', 40)): parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--scale', type=float, default=.08, help="share of the personalisation's steps")
    parser.add_argument('--generator', default='loom', help='as for lthash.generators.load')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(LTHASH_HOME=f'{folder}/home', LTHASH_CACHE=f'{folder}/cache')
        run(a, folder)


def run(a, folder: str):
    import torch
    from lthash import generation, generators, trials
    from lthash.runs import device_name
    from personalization import untrained
    torch.set_num_threads(a.threads)
    parts, last = {'start of python, imports': time.time() - BEGIN}, time.perf_counter()
    def done(part: str):
        nonlocal last
        parts[part] = parts.get(part, 0.) + time.perf_counter() - last
        last = time.perf_counter()
    if a.random:
        a.generator = untrained(f'{folder}/generator')
        last = time.perf_counter()                                     # not counted: the real one is there
    config = generation.Synthetic(generator=a.generator, scale=a.scale, batch=min(a.images, 50), train_per_class=a.train_per_class, val_per_class=a.val_per_class)
    side = generators.image_size(generation.shared_generator(config.generator)[0])
    done('generator')
    data = trials.load_data(config.trial)
    trials.load_data(replace(config.trial, size=side))
    done(f'silk at {config.size} and {side} px')
    _, counts = trials.training_set(config.trial, data)
    rarest, shown = np.argsort(counts, kind='stable')[:a.classes].tolist(), generation.shots(config, data)
    each = []
    for c in rarest:
        begin = time.perf_counter()
        generation.class_concept(config, c)
        done('personalise')
        images = generation.synthetic_class(config, c, a.images)
        done('draw')
        assert len(images) == a.images
        each.append(time.perf_counter() - begin)
    whole = sum(parts.values())
    print(f'{device_name()}, torch {torch.__version__}; {a.classes} classes of {min(counts[rarest])} to {max(counts[rarest])} images ({min(len(shown[c]) for c in rarest)} to {max(len(shown[c]) for c in rarest)} shown), '
          f'{config.method}, {" + ".join(str(s.steps) for s in config.recipe.stages)} steps of {config.recipe.stages[0].batch}, {a.images} images each\n')
    print('| part | seconds |\n|---|---|')
    for part, spent in parts.items(): print(f'| {part} | {spent:.1f} |')
    print(f'| **all** | **{whole:.1f}** |')
    print(f'\nA class: {np.median(each):.1f} s (longest {max(each):.1f} s). Aim: at most 6 minutes on two cores. {"Reached" if whole <= 360 else "Missed"} ({whole/60:.1f} min).')


if __name__ == '__main__':
    main()
