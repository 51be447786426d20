"""Error of a trellis on Gaussian values beside the rate-distortion bound, and the speed of its search.

    python tests/benchmarks/trellis.py [--window 10] [--dim 64]

Values are drawn from the seed and multiplied by the factor that suits the rate; "random order" are the same quantiles
in a random order, trained for 4 rounds and not widened. Speeds are of the compiled search with all threads.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from cqr_compress.quantize.rates import WIDENING
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.trellis import seeded_values


def noise_ratio(rows: Tensor, made: Tensor) -> float:
    return -10 * math.log10(float((rows - made).square().mean() / rows.square().mean()))


def trained(rows: Tensor, values: Tensor, rates: Tensor, window: int) -> float:
    """Return the ratio in dB after 4 rounds of search, one scale and averaged values."""
    scale, states = 1.0, torch.empty(0)
    for round_ in range(5):
        states = search_paths(rows / scale, torch.ones(len(rates)), rates, window, values)[0].long()
        if round_ == 4:
            break
        scale = float((rows * values[states]).sum() / values[states].square().sum())
        total = torch.bincount(states.flatten(), (rows / scale).flatten(), len(values)) + 2 * values
        values = (total / (torch.bincount(states.flatten(), minlength=len(values)) + 2)).float()
    return noise_ratio(rows, scale * values[states])


def main() -> None:
    parser = argparse.ArgumentParser(description="Error and speed of a trellis on Gaussian values.")
    parser.add_argument("--window", type=int, default=10, choices=(8, 10, 12))
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rows", type=int, default=6000)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, values = torch.randn(args.rows, args.dim), seeded_values(args.window, 0)
    for bits in range(1, 5):
        rates = torch.full((args.dim,), bits, dtype=torch.uint8)
        factor = WIDENING[args.window][bits - 1]
        begin = time.perf_counter()
        states, _ = search_paths(rows / factor, torch.ones(args.dim), rates, args.window, values)
        speed = args.rows / (time.perf_counter() - begin)
        ratio = noise_ratio(rows, factor * values[states.long()])
        random = trained(rows, values[torch.randperm(len(values))], rates, args.window)
        print(
            f"{bits} bits: {ratio:.2f} dB of {20 * bits * math.log10(2):.2f}, random order {random:.2f} dB; "
            f"{speed:,.0f} rows/s with {torch.get_num_threads()} threads",
            flush=True,
        )


if __name__ == "__main__":
    main()
