"""Images per second of the embedded silk on one core: `python benchmarks/silk.py [size ...]`.

Processor time, the best of five rounds over all classes: a shared machine only ever slows it down.
"""
import sys
import time

from lthash.data.silk import CLASSES, render_many

for size in [int(a) for a in sys.argv[1:]] or [32, 64, 128, 256]:
    each = max(1, 640//size)
    classes, indices = [c for c in range(len(CLASSES)) for _ in range(each)], list(range(each))*len(CLASSES)
    rounds = []
    for _ in range(5):
        begin = time.process_time()
        render_many(classes, indices, size=size)
        rounds.append(time.process_time() - begin)
    print(f'{size:4d} pixels: {len(classes)/min(rounds):7.0f} images/s')
