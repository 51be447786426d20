"""Plan the tables of a file that must have a size: measure what each error costs, and divide the bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.errors import BudgetError
from cqr_compress.planning.allocate import RatePoint, allocate_bytes, refined
from cqr_compress.planning.choose import plan_table, resize_plan
from cqr_compress.planning.curves import HIGH_RATES, measure_sizes, options_of_size
from cqr_compress.planning.find import Candidate
from cqr_compress.planning.plan_tables import (
    HELD_SAMPLE_BYTES,
    Planned,
    PlannedTable,
    left_table,
    plan_one,
    scan_candidate,
    warn_of_aliases,
    with_sample,
)
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.progress import Progress
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.defaults import CPU_FLOAT

Curves = dict[str, list[RatePoint]]
"""Sizes and errors by table."""
_UNUSED_SHARE = 0.002
"""Share of the bytes of all tables that may stay unused."""
_FULL_SHARE = 0.97
"""A table that uses less of its bytes has a layout of coarse steps: others get what it leaves."""
_SMALL_ERROR = 1e-3
_ROUNDS = 4


@dataclass
class SizePlanner:
    """Plans of the tables of one checkpoint for several sizes; what is measured once serves all of them.

    Attributes:
        options: options of the conversion, with the criterion that compares tables (`weight`).
        candidates: the tables, by name.
        scans: the scanned tables, by name.
        fixed: tables whose size a rule determines, and those that stay dense whatever the size.
        curves: sizes and errors of each other table; the last point is the dense table, but for tables that a rule
            names.
        importance: factor on each table's relative error.
    """

    checkpoint: Checkpoint
    options: ConvertOptions
    progress: Progress
    candidates: dict[str, Candidate] = field(default_factory=dict)
    scans: dict[str, ScannedTable] = field(default_factory=dict)
    fixed: Planned = field(default_factory=lambda: Planned({}, []))
    curves: Curves = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    _plans: dict[tuple[str, int], PlannedTable] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        checkpoint: Checkpoint,
        selected: Sequence[Candidate],
        options: ConvertOptions,
        weights: Mapping[str, Tensor],
        importance: Mapping[str, float],
        progress: Progress,
        measured: Curves | None = None,
    ) -> SizePlanner:
        """Scan all tables and measure their errors at several sizes.

        Args:
            checkpoint: the source.
            selected: the tables.
            options: options of the conversion.
            weights: (N,) weights of the rows' squared errors, by table.
            importance: factors on the tables' relative errors; those that `options.weight` means for other tables.
            progress: receives the progress of the work.
            measured: curves that were measured before with these options, which are not measured again; new ones
                are added.

        Raises:
            TableRefusedError: values whose squares overflow or underflow float32.
        """
        planner, held = cls(checkpoint, options, progress), 0
        for candidate in selected:
            name = candidate.name
            own = candidate.options(options)
            scan = scan_candidate(checkpoint, candidate, own, weights, progress)
            planner.candidates[name] = candidate
            planner._measure_one(candidate, scan, own, {} if measured is None else measured)
            planner.importance[name] = importance.get(name) or _importance(scan, options.weight or "energy")
            held += scan.sample.nbytes
            if held > HELD_SAMPLE_BYTES:
                scan = replace(scan, sample=torch.empty(0, **CPU_FLOAT))
            planner.scans[name] = scan
            warn_of_aliases(checkpoint, candidate)
        return planner

    @property
    def dense(self) -> Planned:
        """The plan that leaves all tables dense but those that rules name."""
        left = [left_table(self.candidates[name], "") for name in self.curves]
        return Planned(self.fixed.tables, [*left, *self.fixed.left_dense])

    def nbytes(self, planned: Planned) -> int:
        """Return the bytes of all tables, compressed or dense, in a plan of this planner."""
        compressed = sum(item.spec.nbytes for item in planned.tables.values())
        return compressed + sum(item.nbytes for item in planned.left_dense)

    @property
    def smallest(self) -> int:
        """Bytes of all tables at their smallest measured sizes."""
        return int(sum(points[0].nbytes for points in self.curves.values())) + self.nbytes(self.fixed)

    def plan_ratio(self, ratio: float) -> Planned:
        """Plan all tables so that their bytes together have a ratio.

        Raises:
            BudgetError: the smallest layouts of the tables have more bytes.
        """
        dense = sum(candidate.nbytes for candidate in self.candidates.values())
        return self.plan(dense / ratio)

    def plan(self, budget: float) -> Planned:
        """Plan all tables within a number of bytes.

        Raises:
            BudgetError: the smallest layouts of the tables have more bytes.
        """
        given = allocate_bytes(self.curves, self.importance, budget - self.nbytes(self.fixed))
        if given is None:
            raise BudgetError(
                f"all tables take {self.smallest:,} bytes at their smallest, more than {int(budget):,}: give a "
                "larger budget"
            )
        left = list(self.fixed.left_dense)
        tables: dict[str, PlannedTable] = {}
        for name, nbytes in given.items():
            candidate = self.candidates[name]
            if candidate.rule is None and nbytes >= self.curves[name][-1].nbytes:
                left.append(left_table(candidate, "its bytes save more error than those of other tables"))
            else:
                tables[name] = self._planned(name, int(nbytes))
        self._use_rest(tables, given, budget - self.nbytes(Planned(self.fixed.tables, left)))
        return Planned({**self.fixed.tables, **tables}, left)

    def _use_rest(self, tables: dict[str, PlannedTable], given: Mapping[str, float], budget: float) -> None:
        """Extend layouts by the bytes that others leave unused, whose sizes have coarse steps."""
        used = {name: table.spec.nbytes for name, table in tables.items()}
        full = {name: self.curves[name] for name in tables if used[name] >= _FULL_SHARE * given[name]}
        others = sum(nbytes for name, nbytes in used.items() if name not in full)
        if full and sum(used.values()) < (1 - _UNUSED_SHARE) * budget:
            for name, nbytes in (allocate_bytes(full, self.importance, budget - others) or {}).items():
                tables[name] = self._grown(tables[name], int(nbytes))
        for name in sorted(tables, key=lambda each: -tables[each].spec.nbytes)[:_ROUNDS]:
            unused = budget - sum(table.spec.nbytes for table in tables.values())
            if unused <= _UNUSED_SHARE * budget:
                break
            tables[name] = self._grown(tables[name], tables[name].spec.nbytes + int(unused))

    def _measure_one(
        self, candidate: Candidate, scan: ScannedTable, own: ConvertOptions, measured: Curves
    ) -> None:
        """Measure a table's error at several sizes; plan it at once if a rule determines its size."""
        name, rule = candidate.name, candidate.rule
        if rule is not None and not own.shares_budget:
            plan, own = plan_one(scan, own, self.progress, estimated=True)
            tables, left = dict(self.fixed.tables), list(self.fixed.left_dense)
            if plan.spec is None:
                left.append(left_table(candidate, plan.reason))
            else:
                tables[name] = PlannedTable(scan.entry, plan, plan.spec, scan, own)
            self.fixed = Planned(tables, left)
            return
        dense = [RatePoint(scan.facts.nbytes, 0.0)] if rule is None else []
        if name not in measured:
            sizes = measure_sizes(scan, own, self.progress)
            if not sizes or sizes[-1].error > _SMALL_ERROR:  # of layouts that have many bits
                sizes += measure_sizes(scan, own, self.progress, rates=HIGH_RATES)
            measured[name] = [RatePoint(size.nbytes, size.error) for size in sizes]
        points = measured[name]
        if not points and not dense:
            raise BudgetError(f"no size of {own.method} fits {name!r}, which rule {rule and rule.text!r} names")
        self.curves[name] = refined([*points, *dense])

    def _planned(self, name: str, nbytes: int) -> PlannedTable:
        """Plan one table within a number of bytes."""
        if (name, nbytes) not in self._plans:
            scan, entry = self.scans[name], self.checkpoint.entries[name]
            own = self.candidates[name].options(self.options)
            options = options_of_size(scan, own, nbytes)
            plan = plan_table(self._with_sample(name, scan), options, self.progress, estimated=True)
            assert plan.spec is not None
            spec, curve = plan.spec, tuple((point.nbytes, point.error) for point in self.curves[name])
            self._plans[name, nbytes] = PlannedTable(
                entry, replace(plan, curve=curve), spec, self.scans[name], options
            )
        return self._plans[name, nbytes]

    def _grown(self, table: PlannedTable, nbytes: int) -> PlannedTable:
        """Return a plan of the same kind of layout within more bytes."""
        name, scan = table.entry.name, table.scan
        options = options_of_size(scan, self.candidates[name].options(self.options), nbytes)
        plan = resize_plan(self._with_sample(name, scan), table.plan, options)
        assert plan.spec is not None
        return PlannedTable(table.entry, plan, plan.spec, scan, options)

    def _with_sample(self, name: str, scan: ScannedTable) -> ScannedTable:
        """Return a scan with its sample, which is read again where it is no longer held."""
        return with_sample(scan, self.candidates[name].options(self.options), self.progress)


def _importance(scan: ScannedTable, weight: str) -> float:
    """Return the factor on a table's relative error: its energy, also of its lookups, its rows, or 1."""
    N, D = scan.shape
    if weight in ("equal", "rows"):
        return float(N) if weight == "rows" else 1.0
    energy = scan.mean_square * N * D
    if weight == "frequency" and scan.weights is not None:
        sampled = scan.weights[scan.sample_ids]
        energies = scan.sample.square().sum(1)
        energy = float((sampled * energies).sum() / sampled.sum())
    elif weight == "frequency":
        energy = scan.mean_square * D
    return max(energy, 1e-300)
