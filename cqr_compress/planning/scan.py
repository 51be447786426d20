"""The rows of one table as input of a quantizer: scanned once, sampled, and read again in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.errors import NonFiniteError, ShapeError, SpecError, TableNotFoundError
from cqr_compress.planning.find import with_table_names
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import TableFacts, importance_of, row_weights, weighted_mean
from cqr_compress.quantize.options import MAX_SAMPLE_ROWS
from cqr_compress.quantize.tiers import field_means
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.table import CompressedTable

MAX_SAMPLE_BYTES = 512 * 2**20
"""Largest sample in bytes: a larger table is sampled uniformly without replacement, a smaller one taken whole."""


_SPECTRUM_ROWS = 16_384


@dataclass(frozen=True)
class ScannedTable:
    """A table after one pass over its rows.

    Attributes:
        entry: where the rows are.
        sample: (n, D) float32, the rows that codebooks are fitted to.
        sample_ids: (n,) int64, ids of the sampled rows, ascending.
        exact_ids: (r,) int64 ascending, rows stored verbatim: selected by the user, non-finite, or all-zero with
            a negative zero.
        zero_ids: (z,) int64 ascending, all-zero rows among the others.
        nonfinite_rows: number of rows with NaN or infinity.
        largest: largest magnitude in the finite rows.
        mean_square: mean of the squared values, those of non-finite rows taken as 0.
        weights: (N,) float32 weights of the rows' squared errors, mean about 1; None for equal weights.
        field_starts: first rows of the fields of a fused table; empty for a single field.
    """

    entry: TensorEntry
    sample: Tensor
    sample_ids: Tensor
    exact_ids: Tensor
    zero_ids: Tensor
    nonfinite_rows: int
    largest: float
    mean_square: float
    weights: Tensor | None = None
    field_starts: tuple[int, ...] = ()

    @property
    def stored_apart_ids(self) -> Tensor:
        """Ids of the exact and zero rows, which are stored apart and need no fit."""
        return torch.cat([self.exact_ids, self.zero_ids])

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        N, D = self.entry.shape
        return N, D

    @property
    def facts(self) -> TableFacts:
        """Properties that determine the possible layouts."""
        return TableFacts(
            name=self.entry.name,
            shape=self.shape,
            dtype=self.entry.dtype,
            nbytes=self.entry.nbytes,
            num_exact_rows=len(self.exact_ids),
            num_zero_rows=len(self.zero_ids),
            largest=self.largest,
            mean_square=self.mean_square,
            variances=self.variances,
            importance=self.importance,
            num_fields=max(1, len(self.field_starts)),
        )

    def importance(self, power: float) -> Tensor:
        """Compute the importance (N,) of the rows; see `TableRows.importance`.

        Rows of a field have the mean energy of the field, so that the borders of tiers are those of fields.
        """
        if not self.field_starts:
            return importance_of(self._energies, power, self.weights, self.stored_apart_ids)
        energies = field_means(self._energies, self.field_starts)
        return importance_of(energies, 1.0 if power else 0.0, self.weights, self.stored_apart_ids)

    @cached_property
    def _energies(self) -> Tensor:
        """Squared distances (N,) of the rows from the mean of the sample; reads the table."""
        weights = None if self.weights is None else self.weights[self.sample_ids]
        mean = weighted_mean(self.sample, weights)
        return torch.cat([(rows - mean).square().sum(1) for _, rows in self.blocks()])

    def variances(self, principal: bool) -> Tensor:
        """Compute the variances of the sample: (D,) float64.

        Args:
            principal: along the principal directions, descending; else of the dimensions.
        """
        generator = torch.Generator("cpu").manual_seed(0)  # tables are often in an order, as by frequency
        drawn = torch.randperm(len(self.sample), generator=generator, device="cpu")[:_SPECTRUM_ROWS]
        rows = self.sample[drawn].double()
        weights = None if self.weights is None else self.weights[self.sample_ids[drawn]].double()
        rows = rows - weighted_mean(rows, weights)
        cost = rows.new_ones(len(rows)) if weights is None else weights
        if not principal:
            return cost @ rows.square() / cost.sum()
        covariance = (rows * cost[:, None]).T @ rows / cost.sum()
        variances: Tensor = torch.linalg.eigvalsh(covariance)
        return variances.flip(0)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over all rows in float32; non-finite rows are replaced by zeros."""
        N, D = self.shape
        for start, stop in row_blocks(N, D):
            rows = self.entry.stored.read_rows(start, stop).float()
            if self.nonfinite_rows:
                rows[~rows.isfinite().all(1)] = 0.0
            yield start, rows


def scan_table(
    entry: TensorEntry,
    exact_rows: Sequence[int] = (),
    nonfinite: str = "error",
    seed: int = 0,
    max_sample: int = MAX_SAMPLE_ROWS,
    step: Callable[[int], None] = lambda rows: None,
) -> ScannedTable:
    """Read a table once in row blocks, and collect its sample, exact rows, zero rows and statistics.

    Args:
        entry: a 2-D floating-point tensor.
        exact_rows: ids of rows to store verbatim; negative ids count from the end.
        nonfinite: "error", or "keep" to store rows with NaN or infinity verbatim.
        seed: seed of the sample.
        max_sample: maximum number of rows in the sample.
        step: called with the number of rows of each block.

    Raises:
        NonFiniteError: NaN or infinity (also a float64 value that overflows float32) and `nonfinite` is "error".
        SpecError: an id of `exact_rows` outside the table.
    """
    N, D = entry.shape
    asked = _check_ids(exact_rows, N, entry.name)
    limit = max(1, min(max_sample, MAX_SAMPLE_BYTES // (4 * D)))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randperm(N, generator=generator, device="cpu")[:limit].sort().values
    sample = torch.empty(len(ids), D, **CPU_FLOAT)
    usable = torch.ones(len(ids), dtype=torch.bool, device="cpu")
    bad: list[Tensor] = []
    zero: list[Tensor] = []
    signed: list[Tensor] = []  # all-zero rows with a negative zero, which are stored verbatim
    largest, total = 0.0, 0.0
    for start, stop in row_blocks(N, D):
        source = entry.stored.read_rows(start, stop)
        rows = source.float()
        finite = rows.isfinite().all(1)
        is_zero = (source == 0).all(1)
        zero.append((is_zero & ~rows.signbit().any(1)).nonzero().flatten() + start)
        signed.append((is_zero & rows.signbit().any(1)).nonzero().flatten() + start)
        if not finite.all():
            bad.append((~finite).nonzero().flatten() + start)
            rows = torch.where(finite[:, None], rows, 0.0)
        if finite.any():  # in the source's dtype: a float64 value below the range of float32 is not 0
            largest = max(largest, float(source[finite].abs().max()))
        total += float(rows.square().sum(dtype=torch.float64))
        a, b = (int(i) for i in torch.searchsorted(ids, torch.tensor([start, stop], device="cpu")))
        sample[a:b] = rows[ids[a:b] - start]
        usable[a:b] = finite[ids[a:b] - start]
        step(stop - start)
    bad_ids = torch.cat(bad) if bad else torch.empty(0, dtype=torch.int64, device="cpu")
    if len(bad_ids) and nonfinite != "keep":
        first = ", ".join(str(int(i)) for i in bad_ids[:5])
        raise NonFiniteError(
            f"{entry.name!r} ({N} x {D}) has NaN or infinity in {len(bad_ids)} rows, first {first}. "
            "Pass --nonfinite keep to store those rows verbatim."
        )
    kept = torch.unique(torch.cat([asked, bad_ids, *signed]))
    zero_ids = torch.cat(zero)
    zero_ids = zero_ids[~torch.isin(zero_ids, kept)]
    usable &= ~torch.isin(ids, kept) & ~torch.isin(ids, zero_ids)
    if not usable.any():
        usable[:] = True
    if not usable.all():
        sample, ids = sample[usable], ids[usable]
    return ScannedTable(
        entry=entry,
        sample=sample,
        sample_ids=ids,
        exact_ids=kept,
        zero_ids=zero_ids,
        nonfinite_rows=len(bad_ids),
        largest=largest,
        mean_square=total / (N * D),
    )


def _check_ids(exact_rows: Sequence[int], N: int, name: str) -> Tensor:
    outside = [row for row in exact_rows if not -N <= row < N]
    if outside:
        raise SpecError(f"exact row {outside[0]} is outside {name!r}: give ids from {-N} to {N - 1}")
    return torch.tensor([row % N for row in exact_rows], dtype=torch.int64, device="cpu")


def source_rows(
    checkpoint: Checkpoint, name: str, table: CompressedTable, counts: Tensor | None, progress: Progress
) -> ScannedTable:
    """Scan the dense rows that a compressed table was made of.

    Raises:
        TableNotFoundError: the checkpoint has no tensor of that name.
        ShapeError: the tensor has another shape.
    """
    spec, entry = table.spec, with_table_names(checkpoint).entries.get(name)
    if entry is None:
        raise TableNotFoundError(
            f"{str(checkpoint.path)!r} has no {name!r}: give the dense checkpoint that was converted"
        )
    if entry.shape != (spec.num_embeddings, spec.embedding_dim):
        here = spec.num_embeddings, spec.embedding_dim
        raise ShapeError(
            f"{name!r} is {entry.shape} in {str(checkpoint.path)!r} and {here} in the compressed file: give the "
            "dense checkpoint that was converted"
        )
    progress.start(f"reading {name}", spec.num_embeddings, "rows")
    scan = scan_table(entry, table.exact_ids.tolist(), "keep", getattr(spec, "seed", 0), step=progress.advance)
    return scan if counts is None else replace(scan, weights=row_weights(counts))
