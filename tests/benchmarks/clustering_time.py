"""Time one clustering of a sketch, and its memory beside the layer's own.

    python tests/benchmarks/clustering_time.py [--rows 100000 1000000] [--codewords 256 4096] [--rounds 3]

The layer is that of "Clustering the Sketch" (arXiv:2210.05974): 4 columns of 32 dimensions, pointers and a hashed
helper, with random codebooks. A clustering samples 256 ids for each centroid, runs k-means in each column and points
every id to its nearest centroid. Each figure is of a process of its own: the median time of the rounds, and the
growth of the peak memory from before the first to after the last.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time

import torch

from cqr_compress import ClusterOptions, CQREmbedding


def measure(num_rows: int, codebook_size: int, rounds: int, iterations: int) -> None:
    layer = CQREmbedding(num_rows, 32, codebook_size=codebook_size, preset="paper")
    CQREmbedding(1000, 32, codebook_size=16).cluster()  # load the libraries
    times = []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(rounds):
        with torch.no_grad():
            layer.codebooks.normal_()
        started = time.perf_counter()
        told = layer.cluster(options=ClusterOptions(iterations=iterations))
        times.append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    grown = (after - before) / 1024
    print(
        f"{num_rows:>9,} {codebook_size:>9,} {statistics.median(times):8.2f} {grown:9.0f} MiB "
        f"{layer.nbytes / 2**20:8.1f} MiB {told.relative_error:10.4f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--codewords", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=ClusterOptions.iterations)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        measure(args.rows[0], args.codewords[0], args.rounds, args.iterations)
        return
    print(f"{torch.get_num_threads()} threads, {args.iterations} iterations of k-means")
    print(f"{'rows':>9} {'codewords':>9} {'seconds':>8} {'peak grew':>13} {'the layer':>12} {'rel. error':>10}")
    for num_rows in args.rows:
        for size in args.codewords:
            command = [sys.executable, __file__, "--one", "--rows", str(num_rows), "--codewords", str(size)]
            extra = ["--rounds", str(args.rounds), "--iterations", str(args.iterations)]
            subprocess.run([*command, *extra], check=True)


if __name__ == "__main__":
    main()
