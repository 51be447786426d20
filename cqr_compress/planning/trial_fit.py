"""Trial fits of a layout to a part of a table's sample, and what they say about a fit to the whole table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.planning.scan import ScannedTable
from cqr_compress.quantize.base import FitEffort, importance_of, weighted_mean
from cqr_compress.quantize.registry import method_of
from cqr_compress.quantize.trellis_fit import ENERGY_POWER
from cqr_compress.table.decode import decode_rows
from cqr_compress.table.quality import RECALL_BASE, recall
from cqr_compress.table.spec import AnySpec, TrellisSpec

_LIMIT = 0.75


@dataclass(frozen=True)
class SampleRows:
    """Rows of a sample, of which the first are fitted and the others held out.

    Attributes:
        every: (n, D) float32.
        weights: (n,) weights of all of them, or None.
        num_fitted: number of rows that are fitted.
        known_importance: (n,) importance of rows of a fused table, which that of their fields determines; or None.
    """

    every: Tensor
    weights: Tensor | None
    num_fitted: int
    known_importance: Tensor | None = None

    @property
    def sample(self) -> Tensor:
        return self.every[: self.num_fitted]

    @property
    def sample_ids(self) -> Tensor:
        return torch.arange(self.num_fitted, device="cpu")

    @property
    def stored_apart_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64, device="cpu")

    def importance(self, power: float) -> Tensor:
        if self.known_importance is not None:
            return self.known_importance
        energies = (self.every - weighted_mean(self.every, self.weights)).square().sum(1)
        return importance_of(energies, power, self.weights, self.stored_apart_ids)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.sample


@dataclass(frozen=True)
class TrialFit:
    """A layout fitted to some rows of a table's sample, and the others held out.

    Attributes:
        rows: the rows, those that were fitted first.
        decoded: (n, D) float32, their decoded rows.
        num_rows: N of the table.
        nbytes: bytes of the whole table in this layout.
    """

    rows: SampleRows
    decoded: Tensor
    num_rows: int
    nbytes: int

    @property
    def error(self) -> float:
        """The relative squared error, as it would be for the whole table; see `estimate_error`."""
        fitted, n = self.rows.num_fitted, len(self.decoded)
        inside = self._error(0, fitted)
        if n == fitted:
            return inside
        outside = self._error(fitted, n)
        return inside + _LIMIT * (outside - inside) * (1 - min(1.0, fitted / self.num_rows))

    @property
    def recall(self) -> float:
        """Recall@10 among at most 8,192 of the rows, as `Quality` has it."""
        return recall(self.rows.every[:RECALL_BASE], self.decoded[:RECALL_BASE])

    def _error(self, start: int, stop: int) -> float:
        part, weights = self.rows.every[start:stop], self.rows.weights
        lost, energy = (self.decoded[start:stop] - part).square().sum(1), part.square().sum(1)
        if weights is not None:
            lost, energy = lost * weights[start:stop], energy * weights[start:stop]
        return float(lost.sum() / energy.sum().clamp_min(1e-30))


def estimate_error(table: ScannedTable, spec: AnySpec, effort: FitEffort, num_rows: int) -> float:
    """Estimate the relative squared error of a layout fitted to the whole table.

    With fewer rows than the table has, the error on the fitted rows is too low and the held-out error too high, by
    amounts that decrease with the number of rows. The limit of both is about three quarters of the way from the
    first to the second (.72 to .77 for pq and prq of a table of 340,000 x 100 fitted to 16,384 rows); the estimate
    is interpolated from it to the table's N.

    Args:
        table: the scanned table.
        spec: the layout.
        effort: effort of the trial fit.
        num_rows: maximum number of rows to fit on; up to half as many are held out.
    """
    return trial_fit(table, spec, effort, num_rows).error


def trial_fit(table: ScannedTable, spec: AnySpec, effort: FitEffort, num_rows: int) -> TrialFit:
    """Fit a layout to a part of the sample; see `estimate_error`."""
    generator = torch.Generator().manual_seed(spec.num_embeddings)
    order = torch.randperm(len(table.sample), generator=generator, device="cpu")
    if len(table.sample) <= num_rows:
        order = torch.arange(len(table.sample), device="cpu")  # with the effort of the final fit, this is that fit
    order = order[: num_rows + num_rows // 2]
    weights = None if table.weights is None else table.weights[table.sample_ids[order]]
    known = table.importance(ENERGY_POWER)[table.sample_ids[order]] if table.field_starts else None
    rows = SampleRows(table.sample[order], weights, min(num_rows, len(order)), known)
    if isinstance(spec, TrellisSpec):
        small: AnySpec = spec.resized(len(order))
    else:
        small = replace(spec, num_embeddings=max(rows.num_fitted, 1), num_kept_rows=0, num_zero_rows=0)
    quantizer = method_of(spec.method).fit(rows, small, effort, lambda: None)
    parts = []
    for start, stop in ((0, rows.num_fitted), (rows.num_fitted, len(order))):
        if stop > start:
            encoded = quantizer.encode(rows.every[start:stop], start if isinstance(small, TrellisSpec) else 0)
            ids = torch.arange(stop - start, device="cpu")
            parts.append(decode_rows(small, {**quantizer.shared_tensors(), **encoded}, ids))
    return TrialFit(rows, torch.cat(parts), table.shape[0], spec.nbytes)
