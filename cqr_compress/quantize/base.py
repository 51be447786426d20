"""What every method works with: facts of a table, its rows, the effort of a fit, and a fitted quantizer."""

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
    """What is known of a table before a layout is chosen.

    Attributes:
        name: of the tensor.
        shape: (N, D).
        dtype: of the tensor.
        nbytes: of the tensor.
        num_exact_rows: rows that are stored verbatim.
        num_zero_rows: all-zero rows among the others.
        largest: largest magnitude of the finite values.
        mean_square: mean of the squared finite values.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    nbytes: int
    num_exact_rows: int
    num_zero_rows: int
    largest: float
    mean_square: float


class TableRows(Protocol):
    """The rows of a table, as a fit needs them: finite, float32."""

    @property
    def sample(self) -> Tensor:
        """(n, D) float32, drawn at random."""

    @property
    def sample_ids(self) -> Tensor:
        """(n,) int64, which rows the sample is."""

    @property
    def weights(self) -> Tensor | None:
        """(N,) float32 weights of the rows' squared errors, mean about 1; None where all are equal."""

    @property
    def stored_apart_ids(self) -> Tensor:
        """Rows that need not be fitted, int64."""

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Pass over all rows: (first row, (B, D) float32) pairs."""


@dataclass(frozen=True)
class Effort:
    """How much work goes into a fit.

    Attributes:
        kmeans_iterations: Lloyd iterations for each codebook.
        refine_rounds: joint refinements after k-means; 0 gives the textbook quantizer.
        beam: partial codes kept while a row is encoded level by level.
        restarts: random restarts of the local search for each row, where L > 1.
    """

    kmeans_iterations: int = 25
    refine_rounds: int = 0
    beam: int = 4
    restarts: int = 0


class Quantizer(Protocol):
    """What is fitted: it holds the shared tensors and encodes rows block by block."""

    @property
    def spec(self) -> AnySpec:
        """The table's spec."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors that do not grow with the rows, by short name."""

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Tensors with one entry for each of the rows (B, D) float32 that start at `first_row`."""


class Method(Protocol):
    """A way to compress a table; its name, summary and paper are in `registry.METHODS`."""

    def check(self, options: ConvertOptions) -> None:
        """Refuse options that the method does not take.

        Raises:
            SpecError: names the option.
        """

    def has_fixed_size(self, options: ConvertOptions) -> bool:
        """Whether the options fix the size of a table, so that no budget is needed."""

    def layouts(self, options: ConvertOptions, facts: TableFacts) -> Iterator[AnySpec]:
        """Every layout that the table's shape and the user's fixed choices allow."""

    def effort(self, spec: AnySpec, refine_rounds: int | None) -> Effort:
        """Effort of the final fit, with the rounds that the user set, or None."""

    def num_steps(self, spec: AnySpec, effort: Effort) -> int:
        """Calls of `step` that `fit` makes at most."""

    def fit(self, rows: TableRows, spec: AnySpec, effort: Effort, step: Callable[[], None]) -> Quantizer:
        """Fit a layout to a table's rows; `step` is called after each unit of work."""


LAYOUT_OPTIONS = ("num_columns", "num_levels", "n_bits", "rotation", "rank", "helper")
"""Options that not every method takes."""


def refuse_others(options: ConvertOptions, takes: tuple[str, ...]) -> None:
    """Refuse the options of LAYOUT_OPTIONS that a method does not take.

    Raises:
        SpecError: names them.
    """
    given = [name for name in LAYOUT_OPTIONS if getattr(options, name) is not None]
    if others := [name for name in given if name not in takes]:
        taken = ", ".join(takes) or "none of them"
        raise SpecError(
            f"method {options.method!r} takes no {', '.join(others)}: of {', '.join(LAYOUT_OPTIONS)} it takes "
            f"{taken}"
        )


def row_weights(counts: Tensor) -> Tensor:
    """Weights of the rows' squared errors, from how often each row is used: mean about 1, and never 0.

    Args:
        counts: (n,) at least 0, not all 0.

    Returns:
        (n,) float32.
    """
    return (counts.double() / counts.double().mean() + 1e-3).float()
