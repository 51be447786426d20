"""How close decoded rows are to their source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

RECALL_BASE = 8192
RECALL_QUERIES = 512
RECALL_K = 10


@dataclass(frozen=True)
class Quality:
    """Agreement of a compressed table with its source.

    Attributes:
        relative_mse: sum of squared differences / sum of squares, over all finite rows.
        mean_cosine: mean cosine of each row with its source, rows of norm 0 left out.
        recall_at_10: of each query's 10 nearest rows (Euclidean, itself left out), the share that is still
            among the 10 nearest after compression; 512 queries among 8,192 rows, drawn by the seed.
        weighted_relative_mse: `relative_mse` with each row weighted by how often it is used; None where that is
            not known.
    """

    relative_mse: float
    mean_cosine: float
    recall_at_10: float
    weighted_relative_mse: float | None = None

    def to_json(self) -> dict[str, float]:
        """The metrics that there are, rounded to 6 significant digits."""
        return {name: float(f"{value:.6g}") for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Quality:
        """Back from `to_json`.

        Raises:
            TypeError: a metric that is missing, unknown or no number.
        """
        for name, value in values.items():
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{name} is {value!r}, not a number")
        return cls(**values)

    @classmethod
    def widest(cls, weighted: bool) -> Quality:
        """Stands in a header for metrics that are measured later: no number of 6 digits is printed wider."""
        value = -0.000123456
        return cls(value, value, value, value if weighted else None)


@dataclass
class QualityMeter:
    """Adds up `Quality` block by block.

    Attributes:
        sample_ids: (m,) int64 ascending, the rows that recall and verification use.
        source: (m, D) their source rows; filled by `add`.
        decoded: (m, D) their decoded rows; filled by `add`.
        weights: (N,) what an error at each row costs, or None.
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
        """Draw the sample of a table of `num_rows` rows."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.arange(num_rows)
        if num_rows > RECALL_BASE:
            order = torch.randperm(num_rows, generator=generator)[:RECALL_BASE].sort().values
        return cls(order, weights)

    def add(self, source: Tensor, decoded: Tensor, first_row: int) -> None:
        """Take the rows from `first_row` on: (B, D) each, any floating dtype."""
        a, b = torch.searchsorted(self.sample_ids, torch.tensor([first_row, first_row + len(source)])).tolist()
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
        """The metrics over all rows that were added."""
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
    """Compare a whole table with its source, block by block.

    Args:
        blocks: of the source: first row and rows (B, D).
        decode: gives rows of the table from one number to another.
        num_rows: N.
        weights: (N,) what an error at each row costs, or None.
        seed: draws the rows on which recall is measured.
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
    """Share of each query's k nearest rows that stay among its k nearest.

    Args:
        source: (m, D) float32; rows that are not finite are left out.
        decoded: (m, D) float32, the same rows after compression.
        num_queries: rows asked, evenly spread.
        k: neighbours, fewer where there are fewer rows.
        queries: rows that may be asked, int64; any if None. All rows are finite then.

    Returns:
        The mean over queries, 1.0 where there is nothing to compare.
    """
    finite = source.isfinite().all(1) & decoded.isfinite().all(1)
    source, decoded = source[finite], decoded[finite]
    m = len(source)
    k = min(k, m - 1)
    if k < 1:
        return 1.0
    asked = torch.arange(m) if queries is None else queries
    queries = asked[torch.unique(torch.linspace(0, len(asked) - 1, min(num_queries, len(asked))).long())]
    wanted, found = (_nearest(rows, queries, k) for rows in (source, decoded))
    shared = (wanted[:, :, None] == found[:, None, :]).any(2).float()
    return float(shared.mean())


def _nearest(rows: Tensor, queries: Tensor, k: int) -> Tensor:
    """Ids of the k nearest other rows of each query: (q, k)."""
    distances = rows.square().sum(1) - 2 * rows[queries] @ rows.T
    distances[torch.arange(len(queries)), queries] = float("inf")
    return distances.topk(k, dim=1, largest=False).indices
