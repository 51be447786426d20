"""Bits of the dimensions of a trellis: their errors, and their allocation by reverse water-filling."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from cqr_compress.table.trellis_spec import MAX_RATE

# Of Gaussian values, for paths of 64 dimensions with rates of 1 to 8 bits: squared error over the least possible,
# 4**-rate, in dB, and the factor on the values that it takes, by window. Few states for each bit work best with
# values that are spread wider than the Gaussian (towards Panter & Dite 1951, doi:10.1109/JRPROC.1951.230419).
LOSS_DB = {
    8: (0.70, 1.08, 1.42, 1.78, 2.34, 2.91, 3.45, 4.32),
    10: (0.63, 0.80, 0.98, 1.24, 1.51, 1.97, 2.33, 2.86),
    12: (0.64, 0.70, 0.81, 0.91, 1.08, 1.30, 1.60, 2.01),
}
WIDENING = {
    8: (0.89, 1.05, 1.1, 1.2, 1.3, 1.45, 1.45, 1.75),
    10: (0.86, 1.05, 1.1, 1.2, 1.2, 1.3, 1.3, 1.45),
    12: (0.85, 1.0, 1.05, 1.1, 1.1, 1.2, 1.2, 1.3),
}
WINDOWS = tuple(LOSS_DB)


def allocate(variances: Tensor, num_bits: int, window: int) -> Tensor:
    """Allocate bits to dimensions, each where it lowers the squared error most (reverse water-filling).

    Cover & Thomas, "Elements of Information Theory", section 10.3.3, with the errors of a trellis for whole bits.

    Args:
        variances: (P,) of the dimensions.
        num_bits: sum of the rates, at most 8 * P.
        window: bits of a state.

    Returns:
        (P,) uint8 rates of 0 to 8 bits.
    """
    rates = torch.zeros(len(variances), dtype=torch.uint8, device="cpu")
    for d, _ in itertools.islice(_by_gain(variances, window), num_bits):
        rates[d] += 1
    return rates


def errors_by_bytes(variances: Tensor, max_bytes: int, window: int) -> Tensor:
    """Compute the squared errors of rows of 0 to max_bytes bytes, relative to their variance.

    Args:
        variances: (P,) of the dimensions.
        max_bytes: at most P.
        window: bits of a state.

    Returns:
        (max_bytes + 1,) float64.
    """
    total = float(variances.clamp_min(0).sum())
    gains = [gain for _, gain in itertools.islice(_by_gain(variances, window), 8 * max_bytes)]
    reduced = torch.tensor([0.0, *gains], dtype=torch.float64, device="cpu").cumsum(0)[::8]
    return (1 - reduced / max(total, 1e-300)).clamp_min(0)


def rate_distortion_bound(variances: Tensor, energy: float, bits: float) -> float:
    """Compute the least relative squared error of Gaussian rows at a rate, by reverse water-filling.

    Cover & Thomas, "Elements of Information Theory", section 10.3.3.

    Args:
        variances: (D,) of the principal directions.
        energy: sum over the dimensions of the mean squares, which includes those of the mean row.
        bits: rate of a row.

    Returns:
        The error; 0 for rows without variance.
    """
    ordered = variances.double().clamp_min(0).sort(descending=True).values
    ordered = ordered[ordered > 0]
    if not len(ordered) or energy <= 0:
        return 0.0
    counts = torch.arange(1, len(ordered) + 1, dtype=torch.float64, device="cpu")
    levels = (
        ordered.log2().cumsum(0) - 2 * bits
    ) / counts  # log2 of the water level with the first dimensions wet
    level = float(levels.exp2().max().clamp_max(float(ordered[0])))
    return float(ordered.clamp_max(level).sum()) / energy


def _by_gain(variances: Tensor, window: int) -> Iterator[tuple[int, float]]:
    """Iterate over the dimensions to which one more bit is given, and how much it lowers the squared error."""
    errors = [1.0, *(10 ** (loss / 10) * 0.25**k for k, loss in enumerate(LOSS_DB[window], start=1))]
    gains = [errors[k] - errors[k + 1] for k in range(MAX_RATE)]
    rates = [0] * len(variances)
    heap = [(-variance * gains[0], d) for d, variance in enumerate(variances.tolist())]
    heapq.heapify(heap)
    while heap:
        gain, d = heapq.heappop(heap)
        yield d, -gain
        rates[d] += 1
        if rates[d] < MAX_RATE:
            heapq.heappush(heap, (gain * gains[rates[d]] / gains[rates[d] - 1], d))
