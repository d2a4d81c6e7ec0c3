"""What does bias suppression cost? Training steps of BSCDH beside those of plain InfoNCE.

    python benchmarks/bias_suppression.py [--steps 300 --threads 1]

Both methods take turns on the same batches: two views of 64 images from kept features (or through an encoder), forward,
backward, optimiser, momentum encoder, queue. Time is the processor's, so other load on the machine counts little; the
overhead is the median over steps of the ratio of the two turns, and beside it the range in which that median lies in
95 % of resamplings.
"""
import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lthash.models.backbones import build_backbone
from lthash.unsupervised.augmentations import augment
from lthash.unsupervised.base import Batch, make_method
from lthash.unsupervised.bscdh import BSCDH
from lthash.unsupervised.contrastive import InfoNCE

Views = Callable[[Tensor], tuple[Tensor, Tensor]]    # (b,) positions -> features (b, d) of two views


def overhead(seconds: np.ndarray) -> tuple[float, float, float]:   # (steps, 2) -> percent
    "Median overhead of the second column, and the ends of its 95 % interval."
    ratio = seconds[:, 1]/seconds[:, 0]
    again = np.median(np.random.default_rng(0).choice(ratio, (1000, len(ratio))), axis=1)
    return tuple(100*(v - 1) for v in (np.median(ratio), *np.quantile(again, (.025, .975))))


def turns(views: Views, bits: int, queue: int, hidden: int, batch: int, steps: int) -> np.ndarray:   # (steps, 2)
    "Seconds of each step of InfoNCE and BSCDH on features of width 512."
    nets = [make_method(kind, 512, bits, queue=queue, hidden=hidden) for kind in (InfoNCE, BSCDH)]
    optimizers = [net.optimizers(net.recipe)[0] for net in nets]
    seconds = np.zeros((steps + 5, 2))
    for step in range(steps + 5):
        for i in ((0, 1) if step % 2 else (1, 0)):
            torch.manual_seed(step)
            begin = time.process_time()
            index = torch.randint(5000, (batch,))
            first, second = views(index)
            given = Batch(index, first, first, second, step, 0.)
            optimizers[i].zero_grad()
            nets[i].loss(given).backward()
            optimizers[i].step()
            nets[i].after_step(given)
            seconds[step, i] = time.process_time() - begin
    return seconds[5:]                                             # the first ones warm up


def sources() -> tuple[Views, Views]:
    "Two views from kept features, and through an encoder."
    generator = torch.Generator().manual_seed(0)
    kept = torch.randn(5000, 8, 512, generator=generator).half()
    images = torch.randint(0, 256, (5000, 3, 32, 32), dtype=torch.uint8, generator=generator)
    encoder = build_backbone('squeezenet1_0', 'random', size=64).eval().requires_grad_(False)

    def cached(index: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(kept[index, v].float() for v in torch.randint(8, (2,)))

    @torch.no_grad()
    def fresh(index: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(encoder(augment(images[index], 'cibh', 64)) for _ in range(2))

    return cached, fresh


def main() -> None:
    "Print a table of all cases."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (('steps', 300), ('batch', 64), ('bits', 64), ('threads', 1)):
        parser.add_argument(f'--{name}', type=int, default=default)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    cached, fresh = sources()
    cases = [*(('kept features, head 512-1024-64', cached, 1024, queue, a.steps) for queue in (256, 1024, 4096)),
             ('kept features, head 512-512-64', cached, 512, 1024, a.steps),
             ('fresh views through SqueezeNet at 64 px, head 512-1024-64', fresh, 1024, 1024, max(5, a.steps//15))]
    print(f'{platform.processor() or platform.machine()}, {a.threads} threads, torch {torch.__version__}; '
          f'batches of {a.batch}, {a.bits} bits, medians of {a.steps} steps\n')
    print('| step | queue | InfoNCE (ms) | BSCDH (ms) | overhead |\n|---|---|---|---|---|')
    for title, views, hidden, queue, steps in cases:
        seconds = turns(views, a.bits, queue, hidden, a.batch, steps)
        middle, low, high = overhead(seconds)
        plain, ours = 1000*np.median(seconds, axis=0)
        print(f'| {title} | {queue} | {plain:.2f} | {ours:.2f} | {middle:+.1f} % ({low:+.1f} to {high:+.1f}) |',
              flush=True)


if __name__ == '__main__':
    main()
