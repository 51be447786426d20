"""Methods: each makes specs that fit a budget, and fits a spec to a table.

A method is one line of METHODS, one function that lists its layouts and one that fits a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, cast

from torch import Tensor

from cqr_compress.quantize.additive import Effort, fit_additive, num_steps
from cqr_compress.quantize.clustered import fit_clustered, num_clustered_steps
from cqr_compress.quantize.kmeans import row_weights
from cqr_compress.quantize.rowwise import RowwiseQuantizer
from cqr_compress.quantize.sketch import fit_sketch, num_sketch_steps
from cqr_compress.spec import AnySpec, CodebookSpec, RowwiseSpec

__all__ = ["DEFAULT_EFFORT", "METHODS", "Effort", "Method", "Quantizer", "TableRows", "fit", "row_weights"]


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


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("pq", "product quantization", "doi:10.1109/TPAMI.2010.57", "additive"),
        Method("rq", "residual quantization, beam search", "doi:10.3390/s101211259", "additive"),
        Method("prq", "product-residual: residual codebooks in each column", "doi:10.3390/s101211259", "additive"),
        Method("cqr", "clustering the sketch: pointers and helper codebooks", "arXiv:2210.05974", "cqr"),
        Method("int8", "8-bit integers, scale and zero point per row", "arXiv:2101.05615", "rowwise"),
        Method("int4", "4-bit integers, scale and zero point per row", "arXiv:1911.02079", "rowwise"),
        Method("hash", "hashing trick, fitted by least squares", "doi:10.1145/1553374.1553516", "sketch"),
        Method("qr", "quotient-remainder, fitted by least squares", "doi:10.1145/3394486.3403059", "sketch"),
    )
}

DEFAULT_EFFORT: dict[str, Effort] = {
    "pq": Effort(),
    "rq": Effort(rounds=4, restarts=1),
    "prq": Effort(rounds=6, restarts=2),
    "cqr": Effort(rounds=6, restarts=2),
}
"""Effort of a method where the user sets none; a rotation by OPQ takes at least OPQ_ROUNDS."""

OPQ_ROUNDS = 12


def effort_for(spec: CodebookSpec, rounds: int | None = None) -> Effort:
    """The effort that fits a spec by default, with `rounds` set by the user or None."""
    effort = DEFAULT_EFFORT.get(spec.method, Effort())
    if rounds is None:
        rounds = max(effort.rounds, OPQ_ROUNDS if spec.rotation == "opq" else 0)
    return Effort(effort.kmeans_iterations, rounds, effort.beam, effort.restarts)


def num_fit_steps(spec: AnySpec, effort: Effort) -> int:
    """Calls of `step` that `fit` makes at most."""
    if isinstance(spec, RowwiseSpec):
        return 1
    if spec.num_stored_levels == spec.num_levels:
        return num_steps(spec, effort)
    return num_clustered_steps(spec, effort) if spec.num_stored_levels else num_sketch_steps(spec)


def fit(rows: TableRows, spec: AnySpec, effort: Effort, step: Callable[[], None] = lambda: None) -> Quantizer:
    """Fit what a spec describes to a table's rows.

    Args:
        rows: the table.
        spec: the layout.
        effort: work to put into stored codes; the other methods have one way.
        step: called after each unit of work.
    """
    if isinstance(spec, RowwiseSpec):
        step()
        return RowwiseQuantizer(spec)
    if not spec.num_stored_levels:
        return cast(Quantizer, fit_sketch(rows.blocks, rows.skipped_ids, spec, step, rows.weights))
    weights = None if rows.weights is None else rows.weights[rows.sample_ids]
    if spec.num_stored_levels == spec.num_levels:
        return cast(Quantizer, fit_additive(rows.sample, spec, effort, step, weights))
    return cast(Quantizer, fit_clustered(rows.sample, rows.sample_ids, spec, effort, step, weights))
