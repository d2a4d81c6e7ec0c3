"""How fast is exact evaluation? mAP of Hamming ranking over all ranks, beside the routine of public repositories.

    python benchmarks/retrieval.py [--queries 10000 --items 50000 --bits 64 --threads 2]

The peer is implemented as in those repositories: one query at a time, a float32 product for the distances,
argsort, cumulative precision. It is timed on `--peer-queries` of the queries, and the time of all of them is that
times their number (each query costs the same). Both run in turns, and each keeps its fastest turn.
"""
import argparse
import platform
import resource
import time

import numpy as np
import psutil
import torch
from threadpoolctl import threadpool_limits

from lthash.evaluation.hamming import distance_counts, noisy_codes, unpack
from lthash.evaluation.metrics import mean_average_precision


def peer(query, query_labels, database, database_labels) -> float:
    "mAP over all ranks; query and database are +-1 in float32."
    total, ranks = 0., np.arange(1, len(database) + 1)
    for code, label in zip(query, query_labels):
        distances = .5*(query.shape[1] - database @ code)
        relevant = database_labels[np.argsort(distances)] == label
        if relevant.any():
            total += (np.cumsum(relevant)/ranks*relevant).sum()/relevant.sum()
    return total/len(query)


def seconds(function) -> float:
    "Wall-clock time of one call."
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def extra_megabytes(function) -> float:
    "How far the process grew above what it holds now; an upper bound, since an earlier peak counts too."
    before = psutil.Process().memory_info().rss
    function()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024   # ru_maxrss: kilobytes on Linux
    return (peak - before)/2**20


def arguments() -> argparse.Namespace:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {'queries': 10_000, 'items': 50_000, 'bits': 64, 'classes': 10, 'threads': 2, 'peer-queries': 200,
                'repeats': 5, 'large': 1_000_000}
    for name, default in defaults.items():
        parser.add_argument(f'--{name}', type=int, default=default)
    parser.add_argument('--noise', type=float, default=.3, help="probability that a bit differs from its centre's")
    return parser.parse_args()


def row(routine: str, took: float, queries: int, note: str = '') -> None:
    "Print one line of the table."
    print(f'| {routine} | {took/queries*1e6:.1f} | {took:.3f} | {note} |')


def main() -> None:
    a = arguments()
    torch.set_num_threads(a.threads)
    rng = np.random.default_rng(0)
    y, z = rng.integers(0, a.classes, a.queries), rng.integers(0, a.classes, a.items)
    q, d = noisy_codes(y, a.bits, a.noise, 1), noisy_codes(z, a.bits, a.noise, 2)
    several = [np.eye(a.classes, dtype=np.uint8)[labels] for labels in (y, z)]
    compiling = seconds(lambda: mean_average_precision(q[:2], y[:2], d, z))
    print(f'{platform.processor() or platform.machine()}, {a.threads} threads, '
          f'numpy {np.__version__}, torch {torch.__version__}')
    print(f'{a.queries:,} queries x {a.items:,} items, {a.bits} bits, {a.classes} classes, all ranks '
          f'(first call, with compiling or loading the kernels: {compiling:.1f} s)\n')

    memory = extra_megabytes(lambda: mean_average_precision(q, y, d, z))
    some = slice(0, min(a.peer_queries, a.queries))
    query, database = (unpack(codes, a.bits).astype(np.float32) for codes in (q[some], d))
    ours, alone, theirs, multi = [], [], [], []
    for turn in range(a.repeats):
        torch.set_num_threads(1)
        alone.append(seconds(lambda: mean_average_precision(q, y, d, z)))
        torch.set_num_threads(a.threads)
        ours.append(seconds(lambda: mean_average_precision(q, y, d, z)))
        with threadpool_limits(1 if turn % 2 else a.threads):                   # whichever suits its product better
            theirs.append(seconds(lambda: peer(query, y[some], database, z)))
        multi.append(seconds(lambda: mean_average_precision(q, several[0], d, several[1])))
    low, expected, high = (mean_average_precision(q[some], y[some], d, z, ties=ties)
                           for ties in ('worst', 'expected', 'best'))
    value = peer(query, y[some], database, z)
    assert low <= value <= high, (low, value, high)
    whole = min(theirs)*a.queries/len(query)

    print('| routine | microseconds per query | seconds | |\n|---|---|---|---|')
    row(f'peer, {len(query)} queries timed', whole, a.queries, 'extrapolated')
    row('lthash, counts and closed form', min(ours), a.queries,
        f'**{whole/min(ours):.0f} x** (slowest turn {whole/max(ours):.0f} x), extra memory {memory:.0f} MB')
    row('lthash, one thread', min(alone), a.queries, f'{whole/min(alone):.0f} x')
    row('lthash, the same labels as multi-hot', min(multi), a.queries, f'{whole/min(multi):.0f} x')
    if torch.cuda.is_available():
        arrays = [torch.as_tensor(x).cuda() for x in (q, y, d, z)]
        mean_average_precision(*arrays)
        there = min(seconds(lambda: mean_average_precision(*arrays)) for _ in range(a.repeats))
        here, host = distance_counts(*arrays), distance_counts(q, y, d, z)
        assert (here.items == host.items).all() and (here.relevant == host.relevant).all()
        row(f'lthash on {torch.cuda.get_device_name()}', there, a.queries, f'{whole/there:.0f} x')
    print(f'\nmAP of the timed queries: peer {value:.6f}; exact expectation {expected:.6f}, '
          f'over the order of ties {low:.6f} to {high:.6f}')

    if a.large:
        z = rng.integers(0, a.classes, a.large)
        d = rng.integers(0, 256, (a.large, -(-a.bits//8)), dtype=np.uint8)
        took = []
        memory = extra_megabytes(lambda: took.append(seconds(lambda: mean_average_precision(q[:1000], y[:1000], d, z))))
        print(f'{a.large:,} items, {min(1000, a.queries):,} queries: {took[0]:.2f} s, '
              f'extra memory at most {memory:.0f} MB')


if __name__ == '__main__':
    main()
