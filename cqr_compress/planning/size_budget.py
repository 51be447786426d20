"""Plan the tables of a file that must have a size: measure what each error costs, and divide the bytes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.errors import BudgetError, SpecError
from cqr_compress.planning.allocate import RatePoint, allocate_bytes, refined
from cqr_compress.planning.choose import estimate_error_of_options, plan_table
from cqr_compress.planning.find import Candidate
from cqr_compress.planning.plan_tables import HELD_SAMPLE_BYTES, Planned, PlannedTable, left_table, scan_entry
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.progress import Progress
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.defaults import CPU_FLOAT

_BITS_PER_DIM = (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
"""Rates at which the error of each table is measured by a brief fit."""
_UNUSED_SHARE = 0.002
"""Share of the bytes of all tables that may stay unused."""
_ROUNDS = 4


@dataclass
class SizePlanner:
    """Plans of the tables of one checkpoint for several sizes; what is measured once serves all of them.

    Attributes:
        options: options of the conversion, with the criterion that compares tables (`weight`).
        scans: the scanned tables, by name.
        curves: sizes and errors of each table; the last point is the dense table.
        importance: factor on each table's relative error.
    """

    checkpoint: Checkpoint
    options: ConvertOptions
    progress: Progress
    candidates: dict[str, Candidate] = field(default_factory=dict)
    scans: dict[str, ScannedTable] = field(default_factory=dict)
    curves: dict[str, list[RatePoint]] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    _plans: dict[tuple[str, int], PlannedTable] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        checkpoint: Checkpoint,
        selected: Sequence[Candidate],
        options: ConvertOptions,
        weights: Mapping[str, Tensor],
        progress: Progress,
    ) -> SizePlanner:
        """Scan all tables and measure their errors at several sizes.

        Raises:
            TableRefusedError: values whose squares overflow or underflow float32.
        """
        planner, held = cls(checkpoint, options, progress), 0
        for candidate in selected:
            name = candidate.name
            scan = scan_entry(checkpoint.entries[name], options, progress)
            scan = replace(scan, weights=weights.get(name))
            planner.candidates[name] = candidate
            planner.curves[name] = planner._curve(scan)
            planner.importance[name] = _importance(scan, options.weight)
            held += scan.sample.nbytes
            if held > HELD_SAMPLE_BYTES:
                scan = replace(scan, sample=torch.empty(0, **CPU_FLOAT))
            planner.scans[name] = scan
        return planner

    @property
    def dense(self) -> Planned:
        """The plan that leaves all tables dense."""
        return Planned({}, [left_table(candidate, "") for candidate in self.candidates.values()])

    @property
    def dense_bytes(self) -> int:
        """Bytes of all dense tables."""
        return self.nbytes(self.dense)

    def nbytes(self, planned: Planned) -> int:
        """Return the bytes of all tables, compressed or dense, in a plan of this planner."""
        compressed = sum(item.spec.nbytes for item in planned.tables.values())
        return compressed + sum(item.nbytes for item in planned.left_dense)

    @property
    def smallest(self) -> int:
        """Bytes of all tables at their smallest measured sizes."""
        return int(sum(points[0].nbytes for points in self.curves.values()))

    def plan(self, budget: float) -> Planned:
        """Plan all tables within a number of bytes.

        Raises:
            BudgetError: the smallest layouts of the tables have more bytes.
        """
        given = allocate_bytes(self.curves, self.importance, budget)
        if given is None:
            raise BudgetError(f"the smallest layouts of all tables take {self.smallest} bytes of {int(budget)}")
        left = []
        tables: dict[str, PlannedTable] = {}
        for name, nbytes in given.items():
            candidate = self.candidates[name]
            if nbytes >= self.curves[name][-1].nbytes:
                left.append(left_table(candidate, "its bytes save more error than those of other tables"))
            else:
                tables[name] = self._planned(name, int(nbytes))
        for name in sorted(tables, key=lambda each: -tables[each].spec.nbytes)[:_ROUNDS]:
            unused = budget - self.nbytes(Planned(tables, left))
            if unused <= _UNUSED_SHARE * budget:
                break
            tables[name] = self._planned(name, tables[name].spec.nbytes + int(unused))
        return Planned(tables, left)

    def _curve(self, scan: ScannedTable) -> list[RatePoint]:
        """Measure a table's error at several sizes."""
        dense = RatePoint(scan.facts.nbytes, 0.0)
        points = []
        sizes = [bits * scan.entry.stored.shape[0] * scan.shape[1] / 8 for bits in _BITS_PER_DIM]
        sizes = [size for size in sizes if size < dense.nbytes]
        self.progress.start(f"measuring {scan.entry.name}", len(sizes), "sizes")
        for size in sizes:
            with contextlib.suppress(BudgetError):  # too small for this table
                points.append(RatePoint(size, self._error(scan, self._options(scan, size))))
            self.progress.advance()
        return refined([*points, dense])

    def _error(self, scan: ScannedTable, options: ConvertOptions) -> float:
        """Estimate the error that options lead to; of all methods, that of a trellis where one fits."""
        if options.method == "auto":
            with contextlib.suppress(BudgetError, SpecError):  # options of codebooks may be given
                return estimate_error_of_options(scan, replace(options, method="trellis", rank=None))
        return estimate_error_of_options(scan, options)

    def _options(self, scan: ScannedTable, nbytes: float) -> ConvertOptions:
        """Return the options of one table, with its bytes as the budget."""
        N, D = scan.shape
        return replace(self.options, size=None, file_ratio=None, bits_per_dim=8 * (nbytes + 0.5) / (N * D))

    def _planned(self, name: str, nbytes: int) -> PlannedTable:
        """Plan one table within a number of bytes."""
        if (name, nbytes) not in self._plans:
            scan, entry = self.scans[name], self.checkpoint.entries[name]
            options = self._options(scan, nbytes)
            if len(scan.sample) == 0:
                scan = replace(scan_entry(entry, self.options, self.progress), weights=scan.weights)
            plan = plan_table(scan, options, self.progress, estimated=True)
            assert plan.spec is not None
            self._plans[name, nbytes] = PlannedTable(entry, plan, plan.spec, self.scans[name], options)
        return self._plans[name, nbytes]


def _importance(scan: ScannedTable, weight: str) -> float:
    """Return the factor on a table's relative error: its energy, its rows, or 1."""
    if weight == "equal":
        return 1.0
    N, D = scan.shape
    return float(N) if weight == "rows" else max(scan.mean_square * N * D, 1e-300)
