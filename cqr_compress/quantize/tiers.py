"""Tiers of rows with more or less bits: their borders and sizes, from the importance of the rows.

The error of a row is its importance times D(b), the relative error of b bytes. Sorted by importance, rows of one
tier are next to each other. Their borders and sizes minimize a Lagrangian, the weighted error plus a price for
each byte (Everett 1963, doi:10.1287/opre.11.3.399), by dynamic programming over bins of rows. At the best price,
the marginal error of a byte is the same in all tiers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_BINS = 32
"""Number of bins of equally many rows, and of bins of equal importance."""
_PRICE_STEPS = 40


@dataclass(frozen=True)
class Tiers:
    """Tiers of rows, those of least importance first.

    Attributes:
        nbytes: bytes of a row of each tier, ascending.
        rows: number of rows of each tier.
        error: sum of the importance of the rows times their relative errors, divided by that of the importance.
    """

    nbytes: tuple[int, ...]
    rows: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class RankedRows:
    """The rows of a table in descending order of importance.

    Attributes:
        total: (N + 1,) float64 importance of the first 0 to N rows.
        edges: (M + 1,) int64 borders of bins of rows, from 0 to N.
    """

    total: Tensor
    edges: Tensor

    @classmethod
    def of(cls, importance: Tensor) -> RankedRows:
        """Rank rows by their importance (N,) float64, at least 0."""
        ordered = importance.sort(descending=True).values
        total = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
        N, grid = len(importance), torch.arange(_BINS + 1, dtype=torch.float64, device="cpu") / _BINS
        by_rows = (grid * N).round().to(torch.int64)
        by_importance = torch.searchsorted(total, grid * total[-1]).clamp_max(N)
        edges = [by_rows, by_importance, torch.tensor([0, N], device="cpu")]
        steps = (ordered.diff() != 0).nonzero().flatten() + 1
        if len(steps) <= _BINS:  # groups of equal importance
            edges.append(steps)
        return cls(total, _ascending(torch.cat(edges)))


def field_means(values: Tensor, starts: Sequence[int]) -> Tensor:
    """Replace values (N,) by the mean of each field's."""
    sizes = torch.tensor([*starts, len(values)], device="cpu").diff()
    ids = torch.repeat_interleave(torch.arange(len(starts), device="cpu"), sizes)
    sums = torch.zeros(len(starts), dtype=values.dtype, device="cpu").index_add_(0, ids, values)
    return (sums / sizes)[ids]


def allocate_tiers(ranked: RankedRows, errors: Tensor, num_bytes: int, least: int, num_tiers: int) -> Tiers | None:
    """Find the tiers of least error within a number of bytes.

    Args:
        ranked: the N rows.
        errors: (B + 1,) float64 relative errors of rows of 0 to B bytes, descending.
        num_bytes: bytes of the codes of all rows.
        least: smallest number of bytes of a row.
        num_tiers: maximum number of tiers.

    Returns:
        The tiers, of which there may be fewer; None if the rows do not fit.
    """
    edges, N, most = ranked.edges, len(ranked.total) - 1, len(errors) - 1
    if N * least > num_bytes or least > most:
        return None
    total = ranked.total[edges]
    sizes = _candidates(num_bytes / N, least, most, errors)
    slopes = -errors[sizes].diff() / sizes.diff()  # what a byte is worth in a row of each size, descending
    rows = (edges[None, :] - edges[:, None]).double()  # of the bins a to b
    weight = (total[None, :] - total[:, None]) / total[-1].clamp_min(1e-300)
    is_segment = torch.ones(len(edges), len(edges), dtype=torch.bool, device="cpu").triu(1)
    price_of_worth = (rows / weight.clamp_min(1e-300)).clamp_max(1e300)

    def best(price: float) -> tuple[list[int], list[int]]:
        """Return the bins at which tiers begin, and the sizes of the tiers, those of most importance first."""
        size = sizes[torch.searchsorted(-slopes, -price * price_of_worth)]
        cost = torch.where(is_segment, weight * errors[size] + price * rows * size, torch.inf)
        least_cost, origins = cost[0], []
        for _ in range(num_tiers - 1):
            found, origin = (least_cost[:, None] + cost).min(0)
            origins.append(torch.where(found < least_cost, origin, -1))
            least_cost = torch.minimum(found, least_cost)
        begins, chosen, end = list[int](), list[int](), len(edges) - 1
        for origin in reversed(origins):
            begin = int(origin[end])
            if begin > 0:
                begins.append(begin)
                chosen.append(int(size[begin, end]))
                end = begin
        return [0, *reversed(begins)], [int(size[0, end]), *reversed(chosen)]

    low, high = 0.0, 1.0
    found: tuple[list[int], list[int]] | None = None
    for step in range(_PRICE_STEPS):
        price = high if step == 0 else (low * high) ** 0.5 if low else high * 1e-3
        begins, chosen = best(price)
        counts = _row_counts(edges, begins)
        if sum(count * size for count, size in zip(counts, chosen, strict=True)) <= num_bytes:
            found, high = (begins, chosen), price
        else:
            low = price
        if low and high / low < 1.01:
            break
    if found is None:
        return None
    counts, chosen = _merged(_row_counts(edges, found[0]), found[1])
    _spend(counts, chosen, errors, num_bytes, num_tiers)
    counts, chosen = _merged(counts, chosen)
    sums = ranked.total[torch.tensor([0, *counts], device="cpu").cumsum(0)].diff()
    error = float((sums * errors[torch.tensor(chosen, device="cpu")]).sum() / sums.sum().clamp_min(1e-300))
    return Tiers(tuple(reversed(chosen)), tuple(reversed(counts)), error)


def _candidates(mean: float, least: int, most: int, errors: Tensor) -> Tensor:
    """Return sizes to try for rows of `mean` bytes on average, at which errors are convex: ascending int64."""
    low, high = min(most, max(least, int(mean / 6))), min(most, int(mean * 4) + 1)
    kept = [low]
    for size in range(low + 1, max(low, high) + 1):
        while len(kept) > 1 and _worth(errors, kept[-2], kept[-1]) <= _worth(errors, kept[-1], size):
            kept.pop()
        kept.append(size)
    return torch.tensor(kept, device="cpu")


def _worth(errors: Tensor, smaller: int, larger: int) -> float:
    """Return how much each byte reduces the error between two sizes."""
    return float(errors[smaller] - errors[larger]) / (larger - smaller)


def _ascending(values: Tensor) -> Tensor:
    """Return the values, each once, in ascending order."""
    ordered = values.sort().values
    return ordered[torch.cat([ordered.new_ones(1, dtype=torch.bool), ordered.diff() > 0])]


def _row_counts(edges: Tensor, begins: list[int]) -> list[int]:
    counts: list[int] = edges[[*begins, len(edges) - 1]].diff().tolist()
    return counts


def _merged(counts: list[int], sizes: list[int]) -> tuple[list[int], list[int]]:
    """Merge neighbours of one size, and drop tiers without rows."""
    out_counts: list[int] = []
    out_sizes: list[int] = []
    for count, size in zip(counts, sizes, strict=True):
        if out_sizes and out_sizes[-1] == size:
            out_counts[-1] += count
        elif count:
            out_counts.append(count)
            out_sizes.append(size)
    return out_counts, out_sizes


def _spend(counts: list[int], sizes: list[int], errors: Tensor, num_bytes: int, num_tiers: int) -> None:
    """Move rows to the tier above, or to a new tier with a byte more, while bytes are left; in place."""
    left = num_bytes - sum(count * size for count, size in zip(counts, sizes, strict=True))
    for tier in range(len(sizes) - 1):
        moved = min(counts[tier + 1], left // (sizes[tier] - sizes[tier + 1]))
        counts[tier] += moved
        counts[tier + 1] -= moved
        left -= moved * (sizes[tier] - sizes[tier + 1])
    if len(sizes) < num_tiers and left and sizes[0] + 1 < len(errors):
        moved = min(counts[0], left)
        counts[:1], sizes[:1] = [moved, counts[0] - moved], [sizes[0] + 1, sizes[0]]
