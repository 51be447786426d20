"""What every method works with: a table's rows and a fitted quantizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from cqr_compress.table.spec import AnySpec


class Quantizer(Protocol):
    """What is fitted: it holds the shared tensors and encodes rows block by block."""

    @property
    def spec(self) -> AnySpec:
        """The table's spec."""

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors that do not grow with the rows, by short name."""

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Tensors with one entry for each of the rows (B, D) float32 that start at `first_row`."""


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
        """(N,) float32, what an error at each row costs, mean about 1; None where all are alike."""

    @property
    def skipped_ids(self) -> Tensor:
        """Rows that need not be fitted, int64."""

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Pass over all rows: (first row, (B, D) float32) pairs."""


@dataclass(frozen=True)
class Method:
    """A way to make codes and codebooks.

    Attributes:
        name: as on the command line.
        summary: one line.
        paper: where it is from.
        kind: the layouts it has: "additive", "cqr", "sketch" or "rowwise".
    """

    name: str
    summary: str
    paper: str
    kind: str
