"""Entropies of pointers: the paper's diagnostics of collapse and of dependent columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_BINS = 2**22


@dataclass(frozen=True)
class Entropies:
    """Entropies of a table's pointers, in bits, over ids with equal weights.

    Attributes:
        h1: smallest entropy of the pointers of a column (H1 of arXiv:2210.05974), at most log2 K. It is low if
            most ids share few codewords.
        h2: smallest joint entropy of the pointers of two columns, at most 2 log2 K; h1 if two columns are
            permutations of each other. None for one column.
        dead_codewords: number of codewords that no pointer uses, for each column.
        codebook_size: K.
    """

    h1: float
    h2: float | None
    dead_codewords: tuple[int, ...]
    codebook_size: int

    @property
    def max_h1(self) -> float:
        """Largest possible h1: log2 K."""
        return math.log2(self.codebook_size)


def pointer_entropies(pointers: Tensor, codebook_size: int) -> Entropies:
    """Compute the entropies of pointers.

    Args:
        pointers: (N, C) integers in [0, K).
        codebook_size: K.
    """
    columns = pointers.to(torch.int64).unbind(1)
    counts = [torch.bincount(column, minlength=codebook_size) for column in columns]
    pairs = [
        _entropy(_counts(a * codebook_size + b, codebook_size**2))
        for i, a in enumerate(columns)
        for b in columns[:i]
    ]
    return Entropies(
        h1=min(_entropy(count) for count in counts),
        h2=min(pairs, default=None),
        dead_codewords=tuple(int((count == 0).sum()) for count in counts),
        codebook_size=codebook_size,
    )


def _counts(values: Tensor, num_bins: int) -> Tensor:
    if num_bins <= _MAX_BINS:
        return torch.bincount(values)
    counts: Tensor = torch.unique(values, return_counts=True)[1]
    return counts


def _entropy(counts: Tensor) -> float:
    share = counts[counts > 0].double()
    share = share / share.sum()
    return abs(float(-(share * share.log2()).sum()))
