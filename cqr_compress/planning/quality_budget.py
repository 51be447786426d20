"""Plan the smallest table whose error or recall is good enough."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

from cqr_compress.errors import BudgetError, SpecError
from cqr_compress.planning.choose import TablePlan, plan_table
from cqr_compress.planning.curves import BITS_PER_DIM, HIGH_RATES, measure_sizes, options_of_size
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.planning.search import estimate
from cqr_compress.planning.trial_fit import TrialFit
from cqr_compress.progress import Progress
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.quality import Quality

_ERROR_MARGIN, _LOST_MARGIN = 0.98, 0.96
"""The plan aims at a little less error, or fewer lost neighbours: estimates differ from the final fit."""
_CLOSE = 0.04
"""Plans whose error is within 4% below the aim are not improved."""
_ROUNDS = 7
_NEAR = 0.004
"""Sizes that differ by 0.4% are not both planned."""
_LEAST_STEP = 0.015


@dataclass(frozen=True)
class QualityTarget:
    """The quality that a table has to have: one of the two is given.

    Attributes:
        max_error: largest relative squared error, weighted if rows have weights.
        min_recall: least recall@10.
    """

    max_error: float | None
    min_recall: float | None

    @classmethod
    def of(cls, options: ConvertOptions) -> QualityTarget:
        """Return the target that options have."""
        return cls(options.max_error, options.min_recall)

    def excess(self, fit: TrialFit) -> float:
        """Return the logarithm of the error, or of the share of lost neighbours, over what the plan aims at."""
        if self.max_error is not None:
            return math.log(max(fit.error, 1e-30) / (_ERROR_MARGIN * self.max_error))
        assert self.min_recall is not None
        return math.log(max(1 - fit.recall, 1e-6) / (_LOST_MARGIN * (1 - self.min_recall)))

    def missed(self, quality: Quality) -> str | None:
        """Describe how measured quality misses the target; None if it does not."""
        if self.max_error is not None:
            weighted = quality.weighted_relative_mse
            error = quality.relative_mse if weighted is None else weighted
            return f"an error of {error:.4g} instead of {self.max_error:g}" if error > self.max_error else None
        if self.min_recall is not None and quality.recall_at_10 < self.min_recall:
            return f"a recall@10 of {quality.recall_at_10:.4f} instead of {self.min_recall:g}"
        return None

    def __str__(self) -> str:
        if self.max_error is not None:
            return f"an error of at most {self.max_error:g}"
        return f"a recall@10 of at least {self.min_recall:g}"


def plan_quality(
    scan: ScannedTable, options: ConvertOptions, progress: Progress
) -> tuple[TablePlan, ConvertOptions]:
    """Choose the smallest spec of a table that has the quality which the options ask for.

    Brief fits at several sizes give the first size to plan; the secant method on the logarithm of the error, which
    falls about linearly with the bytes, gives the next ones.

    Returns:
        The plan, which leaves the table dense where no size is good enough; and the options with the size found.

    Raises:
        SpecError: a method whose tables have one size.
    """
    target = QualityTarget.of(options)
    if method_of(options.method).has_fixed_size(options):
        raise SpecError(f"{options.method} with these options has one size: give no max_error or min_recall")
    measured = measure_sizes(
        scan, options, progress, rates=(*BITS_PER_DIM, *HIGH_RATES), stop=lambda fit: target.excess(fit) <= 0
    )
    curve = tuple((fit.nbytes, fit.error) for fit in measured)
    name = scan.entry.name
    if not measured or target.excess(measured[-1]) > 0:
        return TablePlan(name, None, f"no smaller size of {options.method} has {target}"), options
    tried = [(float(fit.nbytes), target.excess(fit)) for fit in measured[-2:]]
    size = _crossing(tried)
    best: tuple[TablePlan, ConvertOptions] | None = None
    planned: list[tuple[float, float]] = []
    for _ in range(_ROUNDS):
        sized = options_of_size(scan, options, size)
        try:
            plan = plan_table(scan, sized, progress, estimated=True)
        except BudgetError:
            break
        if plan.spec is None:
            break
        excess = _excess(scan, plan, sized, target)
        planned.append((size if excess > 0 else plan.spec.nbytes, excess))
        if excess <= 0 and (best is None or plan.spec.nbytes < _nbytes(best[0])):
            best = plan, sized
        if -_CLOSE <= excess <= 0:
            break
        size = _next_size(planned, tried)
        if any(abs(size - before) < _NEAR * size for before, _ in planned):
            break
    if best is None:
        return TablePlan(name, None, f"no size of {options.method} that was tried has {target}"), options
    plan, sized = best
    return replace(plan, reason=f"{target}; {plan.reason}", curve=curve), sized


def _nbytes(plan: TablePlan) -> int:
    assert plan.spec is not None
    return plan.spec.nbytes


def _excess(scan: ScannedTable, plan: TablePlan, options: ConvertOptions, target: QualityTarget) -> float:
    """Estimate how far a plan is above its target; see `QualityTarget.excess`."""
    if target.max_error is not None and plan.error is not None:
        return math.log(max(plan.error, 1e-30) / (_ERROR_MARGIN * target.max_error))
    assert plan.spec is not None
    fit = estimate(scan, plan.spec, options)
    assert fit is not None, "methods with hashed codes have no brief fits"
    return target.excess(fit)


def _crossing(points: list[tuple[float, float]]) -> float:
    """Return the size at which a line through the last two points is 0; that of the only one."""
    if len(points) == 1:
        return points[0][0]
    (a, above), (b, below) = points
    return a + (b - a) * above / (above - below)


def _next_size(planned: list[tuple[float, float]], measured: list[tuple[float, float]]) -> float:
    """Return the next size to plan: between those of the closest plans, or by the measured slope and beyond."""
    above = max(((n, e) for n, e in planned if e > 0), default=None)
    below = min(((n, e) for n, e in planned if e <= 0), default=None)
    if above is not None and below is not None and below[0] > above[0]:
        share = (above[1] + _CLOSE / 2) / (above[1] - below[1])
        return above[0] + (below[0] - above[0]) * min(max(share, 0.2), 0.8)
    nbytes, excess = planned[-1]
    slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(measured) if b[0] != a[0]]
    slope = min(slopes[0] if slopes else -1 / nbytes, -1e-12)
    step = -(excess + _CLOSE / 2) / slope
    least: float = (
        _LEAST_STEP * nbytes * 2.0 ** (len(planned) - 1)
    )  # rows have whole bytes: small steps may change none
    return max(nbytes + (max(step, least) if excess > 0 else min(step, -least)), 1.0)
