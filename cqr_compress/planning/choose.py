"""Choose a spec for each table from the options, by trial fits on a sample where several layouts fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from cqr_compress.errors import BudgetError, SpecError, TableRefusedError
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.planning.search import BRIEF, Trial, estimate, kind_of, search, worth_trying
from cqr_compress.planning.trial_fit import TrialFit, trial_fit
from cqr_compress.progress import NoProgress, Progress
from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.layouts import budget_bytes, over_budget
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec

_SMALLEST_VALUE, _LARGEST_VALUE = 1e-15, 1e15
_TRIAL_ROWS = 4096


@dataclass(frozen=True)
class TablePlan:
    """The plan of one table.

    Attributes:
        name: name of the source tensor.
        spec: spec to compress it with, or None if it stays dense.
        reason: why this layout was chosen, or why the table stays dense.
        effort: effort of the final fit.
        error: estimated relative squared error from the trial fits, or None without them.
        trials: the layouts that were tried.
        curve: sizes in bytes and estimated errors of this table, where they were measured.
    """

    name: str
    spec: AnySpec | None
    reason: str
    effort: FitEffort = field(default_factory=FitEffort)
    error: float | None = None
    trials: tuple[Trial, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()


def plan_table(
    table: ScannedTable, options: ConvertOptions, progress: Progress | None = None, estimated: bool = False
) -> TablePlan:
    """Choose the spec of one table, by trial fits on its sample if several layouts fit.

    Args:
        table: from `scan_table`.
        options: method and budget.
        progress: receives a stage with the trials.
        estimated: estimate the error also where there is one layout only, by one trial fit.

    Raises:
        BudgetError: no layout of the method fits; the message contains the largest possible ratio.
        SpecError: an explicit layout that is invalid for the table's shape.
        TableRefusedError: values whose squares overflow or underflow float32.
    """
    name = table.entry.name
    _check_magnitude(table)
    method, facts = method_of(options.method), table.facts
    budget = budget_bytes(facts, options)
    specs = list(method.layouts(options, facts))
    smallest = min(specs, key=lambda spec: spec.nbytes, default=None)
    if smallest is not None and smallest.nbytes >= smallest.dense_nbytes:
        return TablePlan(name, None, f"the smallest layout takes {smallest.nbytes} bytes, no fewer than it has")
    limit = facts.nbytes - 1 if budget is None else min(budget, facts.nbytes - 1)
    fitting = [spec for spec in specs if spec.nbytes <= limit]
    if not fitting:
        message = over_budget(facts, options, limit, smallest)
        if options.has_budget or smallest is None:
            raise BudgetError(message)
        return TablePlan(name, None, message)
    worthy = worth_trying(fitting)
    trials: tuple[Trial, ...] = ()
    if len(worthy) == 1:
        fit = estimate(table, worthy[0], options) if estimated else None
        spec, error = worthy[0], None if fit is None else fit.error
        reason = "the one layout that was asked for" if len(specs) == 1 else "the one layout that uses the budget"
    else:
        found = search(table, worthy, options, progress or NoProgress())
        spec, error, trials = found.spec, found.error, found.trials
        reason = f"least error on a sample ({error:.4f} relative) of {found.num_layouts} layouts that fit"
    return TablePlan(name, spec, reason, method.effort(spec, options.refine_rounds), error, trials)


def resize_plan(table: ScannedTable, plan: TablePlan, options: ConvertOptions) -> TablePlan:
    """Return a plan of the same kind of layout with the bytes of other options; the same plan if there is none.

    Args:
        table: the scanned table.
        plan: a plan with a spec.
        options: the options of the plan with another budget.
    """
    spec = plan.spec
    assert spec is not None
    options = _of_kind(options, spec)
    method, budget = method_of(options.method), budget_bytes(table.facts, options) or 0
    layouts = method.layouts(options, table.facts)
    same = [each for each in layouts if each.method == spec.method and kind_of(each) == kind_of(spec)]
    largest = max((s for s in same if s.nbytes <= budget), key=lambda each: each.nbytes, default=spec)
    if largest.nbytes <= spec.nbytes:
        return plan
    fit = estimate(table, largest, options)
    effort = method.effort(largest, options.refine_rounds)
    error = plan.error if fit is None else fit.error
    return replace(plan, spec=largest, effort=effort, error=error, reason=f"{plan.reason}; extended by bytes left")


def _of_kind(options: ConvertOptions, spec: AnySpec) -> ConvertOptions:
    """Narrow options of `auto`, which has thousands of layouts, to those of one kind."""
    if options.method != "auto":
        return options
    found = replace(options, method=spec.method, rank=None)
    if isinstance(spec, TrellisSpec):
        return replace(found, rotation=spec.rotation)
    assert isinstance(spec, CodebookSpec), "auto has trellises and codebooks"
    return replace(
        found,
        num_columns=None if spec.method == "rq" else spec.num_columns,
        n_bits=spec.n_bits,
        rotation=spec.rotation,
        rank=spec.rank,
        codebook_dtype=spec.codebook_dtype,
    )


def _check_magnitude(table: ScannedTable) -> None:
    name = table.entry.name
    if table.largest and not _SMALLEST_VALUE < table.largest < _LARGEST_VALUE:
        raise TableRefusedError(
            f"the largest magnitude in {name!r} is {table.largest:.3g}: squared distances are outside the "
            f"range of float32. Pass --exclude {name!r}."
        )


def fit_briefly(table: ScannedTable, options: ConvertOptions) -> TrialFit:
    """Fit the layout with the most code bytes that options allow, briefly, to estimate their error.

    Raises:
        BudgetError: no layout fits.
        SpecError: codes are hashed from ids.
    """
    _check_magnitude(table)
    budget = budget_bytes(table.facts, options)
    specs = list(method_of(options.method).layouts(options, table.facts))
    fitting = [spec for spec in specs if budget is None or spec.nbytes <= budget]
    if not fitting:
        raise BudgetError(
            over_budget(table.facts, options, budget or 0, min(specs, key=lambda s: s.nbytes, default=None))
        )
    if not all("codes" in spec.tensor_shapes() for spec in fitting):
        raise SpecError(f"the error of {options.method} cannot be estimated from a sample: give a ratio")
    likely = max(worth_trying(fitting), key=_likelihood)
    return trial_fit(table, likely, BRIEF, _TRIAL_ROWS)


def _likelihood(spec: AnySpec) -> tuple[bool, int]:
    """Order layouts by how likely they are the best: a rotated trellis, else the one with the most code bytes."""
    rotated = isinstance(spec, TrellisSpec) and spec.rotation is not None
    return rotated, spec.tensor_shapes()["codes"].nbytes
