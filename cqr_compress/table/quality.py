"""Quality of decoded rows, compared with the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from cqr_compress.table.defaults import CPU_FLOAT

RECALL_BASE = 8192
RECALL_QUERIES = 512
RECALL_K = 10


@dataclass(frozen=True)
class Quality:
    """Metrics of a compressed table, compared with its source.

    Attributes:
        relative_mse: sum of squared differences / sum of squares, over all finite rows.
        mean_cosine: mean cosine similarity of each row with its source, without rows of norm 0.
        recall_at_10: share of each query's 10 nearest rows (Euclidean, without itself) that are among its 10
            nearest after compression; for at most 512 queries among at most 8,192 rows, sampled with the seed.
        weighted_relative_mse: `relative_mse` with rows weighted by frequency; None if frequencies are unknown.
    """

    relative_mse: float
    mean_cosine: float
    recall_at_10: float
    weighted_relative_mse: float | None = None

    def to_json(self) -> dict[str, float]:
        """Return the metrics that are not None, rounded to 6 significant digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Quality | None:
        """Read the output of `to_json`; None where a metric is missing, and unknown metrics are ignored.

        Raises:
            TypeError: a metric that is not a number.
            OverflowError: a metric that float64 cannot hold.
        """
        found: dict[str, float] = {}
        for name in (f.name for f in fields(cls) if f.name in values):
            if not isinstance(values[name], (int, float)) or isinstance(values[name], bool):
                raise TypeError(f"{name} is {values[name]!r}, not a number")
            found[name] = float(values[name])
        needed = {"relative_mse", "mean_cosine", "recall_at_10"}
        return cls(**found) if needed <= found.keys() else None

    @classmethod
    def widest(cls, weighted: bool) -> Quality:
        """Return placeholder metrics for sizing a header: no number of 6 digits has a longer representation."""
        value = -0.000123456
        return cls(value, value, value, value if weighted else None)


@dataclass
class QualityMeter:
    """Accumulates `Quality` block by block.

    Attributes:
        sample_ids: (m,) int64 ascending, ids of the rows for recall and verification.
        weights: (N,) weights of the rows' squared errors, or None.
        source: blocks of the sampled source rows, (m, D) together; filled by `add`.
        decoded: blocks of the sampled decoded rows, (m, D) together; filled by `add`.
    """

    sample_ids: Tensor
    weights: Tensor | None = None
    source: list[Tensor] = field(default_factory=list)
    decoded: list[Tensor] = field(default_factory=list)
    _error: float = 0.0
    _energy: float = 0.0
    _cosine: float = 0.0
    _rows: int = 0
    _weighted_error: float = 0.0
    _weighted_energy: float = 0.0

    @classmethod
    def for_table(cls, num_rows: int, seed: int, weights: Tensor | None = None) -> QualityMeter:
        """Create a meter with a sample of at most 8,192 of `num_rows` rows."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(num_rows, device="cpu")
        if num_rows > RECALL_BASE:
            order = torch.randperm(num_rows, generator=generator, device="cpu")[:RECALL_BASE].sort().values
        return cls(order, weights)

    def add(self, source: Tensor, decoded: Tensor, first_row: int) -> None:
        """Add the rows that start at `first_row`: (B, D) each, any floating dtype."""
        ends = torch.tensor([first_row, first_row + len(source)], device="cpu")
        a, b = torch.searchsorted(self.sample_ids, ends).tolist()
        picked = self.sample_ids[a:b] - first_row
        self.source.append(source[picked])
        self.decoded.append(decoded[picked])
        x, y = source.float(), decoded.float()
        finite = x.isfinite().all(1) & y.isfinite().all(1)
        if not finite.all():
            x, y = x[finite], y[finite]
        errors, energies = (part.square().sum(1, dtype=torch.float64) for part in (x - y, x))
        self._error += float(errors.sum())
        self._energy += float(energies.sum())
        if self.weights is not None:
            weights = self.weights[first_row : first_row + len(source)][finite].double()
            self._weighted_error += float((errors * weights).sum())
            self._weighted_energy += float((energies * weights).sum())
        norms = x.norm(dim=1) * y.norm(dim=1)
        cosines = ((x * y).sum(1) / norms)[norms > 0]
        self._cosine += float(cosines.sum(dtype=torch.float64))
        self._rows += len(cosines)

    def result(self) -> Quality:
        """Compute the metrics of all added rows."""
        weighted = None
        if self.weights is not None:
            weighted = self._weighted_error / (self._weighted_energy or 1.0)
        return Quality(
            weighted_relative_mse=weighted,
            relative_mse=self._error / self._energy if self._energy else self._error,
            mean_cosine=self._cosine / self._rows if self._rows else 1.0,
            recall_at_10=recall(torch.cat(self.source).float(), torch.cat(self.decoded).float()),
        )


def table_quality(
    blocks: Iterable[tuple[int, Tensor]],
    decode: Callable[[int, int], Tensor],
    num_rows: int,
    weights: Tensor | None = None,
    seed: int = 0,
) -> Quality:
    """Measure the quality of a table, block by block.

    Args:
        blocks: blocks of the source, as pairs of the first id and rows (B, D).
        decode: decodes the rows start..stop of the table.
        num_rows: N.
        weights: (N,) weights of the rows' squared errors, or None.
        seed: seed of the sample of rows on which recall is measured.
    """
    meter = QualityMeter.for_table(num_rows, seed, weights)
    for start, rows in blocks:
        meter.add(rows, decode(start, start + len(rows)).cpu(), start)
    return meter.result()


def recall(
    source: Tensor,
    decoded: Tensor,
    num_queries: int = RECALL_QUERIES,
    k: int = RECALL_K,
    queries: Tensor | None = None,
) -> float:
    """Compute the share of each query's k nearest rows that are among its k nearest after compression.

    Args:
        source: (m, D) float32; non-finite rows are ignored.
        decoded: (m, D) float32, the same rows after compression.
        num_queries: maximum number of queries, evenly spaced.
        k: number of neighbours; reduced if there are fewer rows.
        queries: indices of rows to choose queries from, int64; all rows if None. It requires finite rows.

    Returns:
        The mean over queries; 1.0 for fewer than two rows.
    """
    finite = source.isfinite().all(1) & decoded.isfinite().all(1)
    source, decoded = source[finite], decoded[finite]
    m = len(source)
    k = min(k, m - 1)
    if k < 1:
        return 1.0
    asked = torch.arange(m, device="cpu") if queries is None else queries
    at = torch.linspace(0, len(asked) - 1, min(num_queries, len(asked)), **CPU_FLOAT).long()
    queries = asked[torch.unique(at)]
    wanted, found = (_nearest(rows, queries, k) for rows in (source, decoded))
    shared = (wanted[:, :, None] == found[:, None, :]).any(2).float()
    return float(shared.mean())


def _nearest(rows: Tensor, queries: Tensor, k: int) -> Tensor:
    """Find the indices of the k nearest other rows of each query: (q, k)."""
    distances = rows.square().sum(1) - 2 * rows[queries] @ rows.T
    distances[torch.arange(len(queries), device="cpu"), queries] = float("inf")
    return distances.topk(k, dim=1, largest=False).indices
