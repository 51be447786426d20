"""Plan all tables of a checkpoint or a model before anything is changed or written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.header import LeftDense, TableRecord
from cqr_compress.errors import BudgetError, CqrCompressWarning, SpecError, TableNotFoundError
from cqr_compress.planning.choose import TablePlan, plan_table
from cqr_compress.planning.encode import encode_table
from cqr_compress.planning.fields import small_field_rows
from cqr_compress.planning.find import Candidate
from cqr_compress.planning.quality_budget import plan_quality
from cqr_compress.planning.scan import ScannedTable, scan_table
from cqr_compress.progress import Progress
from cqr_compress.quantize.layouts import budget_bytes
from cqr_compress.quantize.options import DEFAULT_BITS_PER_DIM, ConvertOptions
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.quality import Quality, QualityMeter
from cqr_compress.table.spec import AnySpec

HELD_SAMPLE_BYTES = 2**30
"""Samples of all tables beyond this size are read again when a table is encoded."""


@dataclass(frozen=True)
class PlannedTable:
    """A table that will be compressed.

    Attributes:
        entry: where its rows are.
        plan: spec, reason and effort.
        spec: spec of the plan, not None.
        scan: result of one pass over the rows; the sample is empty if the samples of all tables exceed 1 GiB.
        options: options of the conversion.
    """

    entry: TensorEntry
    plan: TablePlan
    spec: AnySpec
    scan: ScannedTable
    options: ConvertOptions

    def record(self, quality: Quality | None = None) -> TableRecord:
        """Return the table's entry in a file's header; without a quality, with `Quality.widest` in its place."""
        budget = int(budget_bytes(self.scan.facts, self.options) or self.spec.nbytes)
        quality = quality or Quality.widest(weighted=self.scan.weights is not None)
        return TableRecord(spec=self.spec, quality=quality, reason=self.plan.reason, budget=budget)

    def encode(self, put: Callable[[str, Tensor], None], progress: Progress) -> QualityMeter:
        """Fit the table and pass its tensors to `put`; see `encode_table`."""
        scan = self.scan
        if len(scan.sample) == 0:
            scan = with_sample(scan, self.options, progress)
        return encode_table(scan, self.plan, self.options.seed, put, progress)


@dataclass(frozen=True)
class Planned:
    """Plans of all tables.

    Attributes:
        tables: tables to compress, by name.
        left_dense: tables that stay dense.
    """

    tables: Mapping[str, PlannedTable]
    left_dense: Sequence[LeftDense]

    def noting(self, names: Collection[str], note: str) -> Planned:
        """Return the plans with a note in the reasons of some tables."""
        noted = {
            name: replace(item, plan=replace(item.plan, reason=f"{item.plan.reason}; {note}"))
            for name, item in self.tables.items()
            if name in names
        }
        return replace(self, tables={**self.tables, **noted})


def plan_tables(
    checkpoint: Checkpoint,
    selected: Sequence[Candidate],
    options: ConvertOptions,
    weights: Mapping[str, Tensor],
    progress: Progress,
    estimated: bool = False,
) -> Planned:
    """Scan and plan every table; infeasible budgets are collected into one error.

    Args:
        checkpoint: a file, or the tensors of a live model.
        selected: the tables to compress.
        options: method and budget.
        weights: (N,) weights of the rows' squared errors, by table.
        progress: receives the progress of the work.
        estimated: estimate the error of every table, see `plan_table`.

    Raises:
        BudgetError: no layout fits; the message lists all tables concerned.
        SpecError: a `weight`, which compares tables that share a budget.
        TableNotFoundError: no table would gain from compression.
    """
    if options.weight is not None:
        raise SpecError(f"weight is {options.weight!r} without a budget that tables share: give a ratio or a size")
    tables: dict[str, PlannedTable] = {}
    left: list[LeftDense] = []
    problems: list[str] = []
    held = 0
    for candidate in selected:
        entry = checkpoint.entries[candidate.name]
        if candidate.shape[0] < options.min_rows and not candidate.named:
            left.append(
                left_table(candidate, f"{candidate.shape[0]} rows are fewer than min_rows = {options.min_rows}")
            )
            continue
        own = candidate.options(options)
        scan = scan_candidate(checkpoint, candidate, own, weights, progress)
        try:
            plan, own = plan_one(scan, own, progress, estimated)
        except BudgetError as e:
            problems.append(str(e))
            continue
        if plan.spec is None:
            left.append(left_table(candidate, plan.reason))
            continue
        held += scan.sample.nbytes
        if held > HELD_SAMPLE_BYTES:
            scan = replace(scan, sample=torch.empty(0, **CPU_FLOAT))
        tables[candidate.name] = PlannedTable(entry, plan, plan.spec, scan, own)
        warn_of_aliases(checkpoint, candidate)
    if problems:
        raise BudgetError("\n".join(problems))
    if not tables:
        reasons = "; ".join(f"{item.name}: {item.reason}" for item in left)
        raise TableNotFoundError(
            f"no table of {str(checkpoint.path)!r} would gain from compression ({reasons}). "
            "Pass a smaller --min-rows to compress small tables."
        )
    return Planned(tables, left)


def plan_one(
    scan: ScannedTable, options: ConvertOptions, progress: Progress, estimated: bool
) -> tuple[TablePlan, ConvertOptions]:
    """Plan one table within its bytes, or with its quality; return the plan and the options with its size.

    Raises:
        BudgetError: no layout fits.
    """
    if options.has_quality_budget:
        return plan_quality(scan, options, progress)
    return plan_table(scan, options, progress, estimated), options


def warn_of_aliases(checkpoint: Checkpoint, candidate: Candidate) -> None:
    """Warn where other names will read a compressed table, too."""
    for alias in candidate.aliases:
        if alias in checkpoint.aliases:
            warnings.warn(
                f"{alias!r} shares its values with {candidate.name!r}: both will read the compressed table. "
                "Pass --untie to compress only the latter.",
                CqrCompressWarning,
                stacklevel=4,
            )


def left_dense(candidates: Sequence[Candidate]) -> list[LeftDense]:
    """List tables that were found and not selected, for the report; a confidence below 0.3 is omitted."""
    return [left_table(c, c.reason) for c in candidates if not c.selected and c.confidence >= 0.3]


def scan_candidate(
    checkpoint: Checkpoint,
    candidate: Candidate,
    options: ConvertOptions,
    weights: Mapping[str, Tensor],
    progress: Progress,
) -> ScannedTable:
    """Read a table once, and draw its sample; rows of small fields are stored verbatim."""
    entry, exact = checkpoint.entries[candidate.name], options.exact_rows
    if candidate.field_starts:
        N, D = candidate.shape
        share = 1 / options.ratio if options.ratio else (options.bits_per_dim or DEFAULT_BITS_PER_DIM) * N * D / 8
        budget = share * entry.nbytes if options.ratio else share
        itemsize = entry.dtype.itemsize
        exact = (*exact, *small_field_rows(candidate.field_starts, candidate.shape, itemsize, budget))
    scan = _scan(entry, replace(options, exact_rows=exact), progress)
    return replace(scan, weights=weights.get(candidate.name), field_starts=candidate.field_starts)


def with_sample(scan: ScannedTable, options: ConvertOptions, progress: Progress) -> ScannedTable:
    """Return a scan with its sample, which is read again if it is no longer held."""
    if len(scan.sample):
        return scan
    again = _scan(scan.entry, replace(options, exact_rows=tuple(scan.exact_ids.tolist())), progress)
    return replace(scan, sample=again.sample, sample_ids=again.sample_ids)


def _scan(entry: TensorEntry, options: ConvertOptions, progress: Progress) -> ScannedTable:
    progress.start(f"reading {entry.name}", entry.shape[0], "rows")
    return scan_table(
        entry, options.exact_rows, options.nonfinite, options.seed, options.max_sample, progress.advance
    )


def left_table(candidate: Candidate, reason: str) -> LeftDense:
    """Return the record of a table that stays dense."""
    return LeftDense(name=candidate.name, shape=candidate.shape, nbytes=candidate.nbytes, reason=reason)
