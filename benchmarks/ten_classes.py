"""How long until the ten rarest classes of silk have images?

    python benchmarks/ten_classes.py [--scale 0.08 --images 100 --classes 10 --threads 2 --generator loom]

From an empty folder of runs: personalise each of them and draw 100 images of it, with the settings of
nbs/papers/03_a3_generation.ipynb in profile cpu. Wall clock from the start of the process; nothing is reused, not even
silk's images. `--scale 1` takes the whole budget 'loom' of `diffusion.methods.METHODS`.
"""
import argparse
import os
import tempfile
import time
from collections.abc import Callable

import numpy as np
import psutil

BEGIN = psutil.Process().create_time()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = (('classes', 10), ('images', 100), ('threads', 2), ('train-per-class', 200), ('val-per-class', 40))
    for name, default in numbers:
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--scale', type=float, default=.08, help="share of the personalisation's steps")
    parser.add_argument('--generator', default='loom', help='as for load_pipeline')
    parser.add_argument('--random', action='store_true', help='random weights in place of --generator')
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(LTHASH_HOME=f'{folder}/home', LTHASH_CACHE=f'{folder}/cache')
        measure(a, folder)


def stopwatch() -> tuple[dict[str, float], Callable[[str], None]]:
    "Seconds by part, and a function that books the time since its last call."
    parts, last = {'start of python, imports': time.time() - BEGIN}, [time.perf_counter()]
    def book(part: str) -> None:
        if part:                                                  # '': not counted
            parts[part] = parts.get(part, 0.) + time.perf_counter() - last[0]
        last[0] = time.perf_counter()
    return parts, book


def measure(a: argparse.Namespace, folder: str) -> None:
    "Personalise and draw, and print what it took."
    import torch
    from personalization import untrained

    from lthash.core.runtime import device_name
    from lthash.data.config import DataConfig, load_data, training_set
    from lthash.diffusion.pipelines import image_size
    from lthash.diffusion.synthetic import (
        SyntheticConfig,
        class_concept,
        few_shot_indices,
        shared_generator,
        synthetic_class,
    )
    torch.set_num_threads(a.threads)
    parts, book = stopwatch()
    if a.random:
        a.generator = untrained(f'{folder}/generator')
        book('')                                                  # the real one would be there
    config = SyntheticConfig(generator=a.generator, scale=a.scale, batch=min(a.images, 50),
                             train_per_class=a.train_per_class, val_per_class=a.val_per_class)
    side = image_size(shared_generator(config.generator)[0])
    book('generator')
    data = load_data(config)
    load_data(DataConfig.of(config, size=side))
    book(f'silk at {config.size} and {side} px')
    _, counts = training_set(config, data)
    rarest, shown = np.argsort(counts, kind='stable')[:a.classes].tolist(), few_shot_indices(config, data)
    each = []
    for c in rarest:
        begin = time.perf_counter()
        class_concept(config, c)
        book('personalise')
        assert len(synthetic_class(config, c, a.images)) == a.images
        book('draw')
        each.append(time.perf_counter() - begin)
    whole, stages = sum(parts.values()), config.recipe.stages
    seen = [len(shown[c]) for c in rarest]
    print(f'{device_name()}, torch {torch.__version__}; {a.classes} classes of {min(counts[rarest])} to '
          f'{max(counts[rarest])} images ({min(seen)} to {max(seen)} shown)')
    print(f'{config.method}, {" + ".join(str(s.steps) for s in stages)} steps of {stages[0].batch}, '
          f'{a.images} images of each class\n')
    print('| part | seconds |\n|---|---|')
    for part, spent in parts.items():
        print(f'| {part} | {spent:.1f} |')
    print(f'| **all** | **{whole:.1f}** |')
    print(f'\nPer class: {np.median(each):.1f} s (longest {max(each):.1f} s).')
    print(f'Aim: at most 6 minutes on two cores. {"Reached" if whole <= 360 else "Missed"} ({whole/60:.1f} min).')


if __name__ == '__main__':
    main()
