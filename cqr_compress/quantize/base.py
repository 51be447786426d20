"""Interfaces shared by all methods: facts of a table, its rows, the effort of a fit, and a fitted quantizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cqr_compress.errors import SpecError
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.spec import AnySpec


@dataclass(frozen=True)
class TableFacts:
    """Properties of a table that determine its possible layouts.

    Attributes:
        name: name of the tensor.
        shape: (N, D).
        dtype: dtype of the tensor.
        nbytes: bytes of the tensor.
        num_exact_rows: number of rows stored verbatim.
        num_zero_rows: number of all-zero rows among the others.
        largest: largest magnitude in the finite rows.
        mean_square: mean of the squared values, those of non-finite rows taken as 0.
        variances: computes the variances (D,) of the rows along their principal directions, descending, or of
            their dimensions.
        importance: computes the importance (N,) of the rows, see `TableRows.importance`.
        num_fields: number of fields of a fused table.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    nbytes: int
    num_exact_rows: int
    num_zero_rows: int
    largest: float
    mean_square: float
    variances: Callable[[bool], Tensor]
    importance: Callable[[float], Tensor]
    num_fields: int = 1


class TableRows(Protocol):
    """The rows of a table as input of a fit: finite, float32."""

    @property
    def sample(self) -> Tensor:
        """(n, D) float32, drawn at random."""

    @property
    def sample_ids(self) -> Tensor:
        """(n,) int64, ids of the sampled rows."""

    @property
    def weights(self) -> Tensor | None:
        """(N,) float32 weights of the rows' squared errors, mean about 1; None for equal weights."""

    @property
    def stored_apart_ids(self) -> Tensor:
        """Int64 ids of the rows that are stored apart and need no fit."""

    def importance(self, power: float) -> Tensor:
        """Compute the importance of the rows: (N,) float64.

        It is the weight of a row, multiplied by a power of the square of its distance from the mean row; 0 for
        rows that are stored apart.
        """

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over all rows, as pairs of the first id and a (B, D) float32 block."""


@dataclass(frozen=True)
class FitEffort:
    """Number of iterations of each step of a fit.

    Attributes:
        kmeans_iterations: Lloyd iterations for each codebook.
        refine_rounds: rounds of joint refinement after k-means; 0 gives the textbook quantizer.
        beam: beam width of the search that encodes a row level by level.
        restarts: random restarts of the local search for each row, if L > 1.
    """

    kmeans_iterations: int = 25
    refine_rounds: int = 0
    beam: int = 4
    restarts: int = 0


class Quantizer(Protocol):
    """A fitted quantizer: it holds the shared tensors and encodes rows block by block."""

    @property
    def spec(self) -> AnySpec:
        """The table's spec."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the tensors whose size does not depend on the number of rows, by short name."""

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows (B, D) float32 that start at `first_row`, to tensors with one entry for each row."""


class Method(Protocol):
    """A compression method; its name, summary and papers are in `registry.METHODS`."""

    def check(self, options: ConvertOptions) -> None:
        """Refuse options that the method does not support.

        Raises:
            SpecError: an unsupported option, which the message names.
        """

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Return whether the options determine the size of a table, so that no budget is needed."""

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Iterate over the layouts that the table's shape and the options allow."""

    def makes(self, spec: AnySpec) -> bool:
        """Return whether the method can fit this layout, which a file may have."""

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> FitEffort:
        """Return the effort of the final fit; `refine_rounds` replaces the method's default if not None."""

    def num_steps(self, spec: AnySpec, effort: FitEffort) -> int:
        """Return the maximum number of calls of `step` in `fit`."""

    def fit(self, rows: TableRows, spec: AnySpec, effort: FitEffort, step: Callable[[], None]) -> Quantizer:
        """Fit a layout to the rows of a table; `step` is called after each unit of work."""


LAYOUT_OPTIONS = ("num_columns", "num_levels", "n_bits", "rotation", "rank", "helper", "window", "max_tiers")
"""Options that not every method supports."""


def refuse_others(options: ConvertOptions, takes: tuple[str, ...]) -> None:
    """Refuse the options of LAYOUT_OPTIONS that a method does not support.

    Raises:
        SpecError: unsupported options, which the message names.
    """
    given = [name for name in LAYOUT_OPTIONS if getattr(options, name) is not None]
    if others := [name for name in given if name not in takes]:
        taken = ", ".join(takes) or "none of the options of a layout"
        raise SpecError(f"method {options.method!r} takes no {', '.join(others)}: it takes {taken}")


def refuse_int8(options: ConvertOptions) -> None:
    """Refuse int8 codebooks for a method without them.

    Raises:
        SpecError: they are asked for.
    """
    if options.codebook_dtype == "int8":
        raise SpecError(f"codebook_dtype is 'int8': the values of method {options.method!r} are floating point")


def row_weights(counts: Tensor) -> Tensor:
    """Compute weights of the rows' squared errors from the counts of the ids: mean about 1, all positive.

    Args:
        counts: (n,) at least 0, not all 0.

    Returns:
        (n,) float32.
    """
    return (counts.double() / counts.double().mean() + 1e-3).float()


def weighted_mean(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Compute the mean (D,) of rows (n, D), with weights (n,) or None."""
    return rows.mean(0) if weights is None else weights.to(rows.dtype) @ rows / weights.sum()


def importance_of(energies: Tensor, power: float, weights: Tensor | None, stored_apart: Tensor) -> Tensor:
    """Compute `TableRows.importance` from squared distances (N,), weights (N,) or None, and ids."""
    importance = energies.double() ** power
    if weights is not None:
        importance *= weights
    importance[stored_apart] = 0.0
    return importance
