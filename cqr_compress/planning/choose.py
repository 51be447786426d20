"""Choose a spec for each table from the options, by trial fits on a sample where several layouts fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cqr_compress.errors import BudgetError, TableRefusedError
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.quantize.base import Effort
from cqr_compress.quantize.layouts import budget_bytes, over_budget
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.decode import decode_rows
from cqr_compress.table.spec import AnySpec, CodebookSpec

_SMALLEST_VALUE, _LARGEST_VALUE = 1e-15, 1e15


_FIRST_TRIAL_ROWS = 4096
_SECOND_TRIAL_ROWS = 16384
_FINALISTS = 4
_BRIEF = Effort(kmeans_iterations=4, refine_rounds=0, beam=1)


@dataclass(frozen=True)
class TablePlan:
    """The plan of one table.

    Attributes:
        name: name of the source tensor.
        spec: spec to compress it with, or None if it stays dense.
        reason: why this layout was chosen, or why the table stays dense.
        effort: effort of the final fit.
    """

    name: str
    spec: AnySpec | None
    reason: str
    effort: Effort = field(default_factory=Effort)


def plan_table(table: ScannedTable, options: ConvertOptions, step: Callable[[], None] = lambda: None) -> TablePlan:
    """Choose the spec of one table, by trial fits on its sample if several layouts fit.

    Args:
        table: from `scan_table`.
        options: method and budget.
        step: called after each trial.

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
    largest = _largest_of_each(fitting)
    if len(largest) == 1:
        spec, reason = largest[0], "the one layout that was asked for"
    else:
        spec, reason = _choose(table, largest, options, step)
    return TablePlan(name, spec, reason, method.effort(spec, options.refine_rounds))


def _check_magnitude(table: ScannedTable) -> None:
    name = table.entry.name
    if table.largest and not _SMALLEST_VALUE < table.largest < _LARGEST_VALUE:
        raise TableRefusedError(
            f"the largest magnitude in {name!r} is {table.largest:.3g}: squared distances are outside the "
            f"range of float32. Pass --exclude {name!r}."
        )


def _largest_of_each(specs: list[AnySpec]) -> list[AnySpec]:
    """Keep the largest layout of each group that differs in the number of levels only; drop small layouts.

    A layout that uses less than 80% of the bytes of the largest one is dropped.
    """
    best: dict[tuple[object, ...], AnySpec] = {}
    for spec in specs:
        key: tuple[object, ...] = (spec.method,)
        if isinstance(spec, CodebookSpec):
            sources = spec.code_sources if spec.method == "cqr" else ()
            key = (spec.num_columns, spec.codebook_size, spec.rotation, spec.rank, sources)
        if key not in best or spec.nbytes > best[key].nbytes:
            best[key] = spec
    most = max(spec.nbytes for spec in best.values())
    return [spec for spec in best.values() if spec.nbytes >= 0.8 * most]


def _choose(
    table: ScannedTable, specs: list[AnySpec], options: ConvertOptions, step: Callable[[], None]
) -> tuple[AnySpec, str]:
    """Rank all layouts by brief trial fits, and the best again with more rows and effort (successive halving)."""
    errors: list[tuple[float, AnySpec]] = []
    lost = _lost_energy(table) if any(_left_out(spec) for spec in specs) else None
    for spec in sorted(specs, key=_left_out):
        if lost is not None and errors and float(lost[_left_out(spec)]) > min(error for error, _ in errors):
            continue
        pca = replace(spec, rotation="pca") if isinstance(spec, CodebookSpec) and spec.rotation else spec
        errors.append((estimate_error(table, pca, _BRIEF, _FIRST_TRIAL_ROWS), spec))
        step()
    errors.sort(key=lambda pair: pair[0])
    finalists = [spec for _, spec in errors[:_FINALISTS]]
    longer = []
    for spec in finalists:
        refine_rounds = 4 if isinstance(spec, CodebookSpec) and spec.rotation == "opq" else 1
        effort = Effort(
            kmeans_iterations=10,
            refine_rounds=refine_rounds if options.refine_rounds is None else options.refine_rounds,
            restarts=1,
        )
        longer.append((estimate_error(table, spec, effort, _SECOND_TRIAL_ROWS), spec))
        step()
    error, best = min(longer, key=lambda pair: pair[0])
    return best, f"least error on a sample ({error:.4f} relative) of {len(specs)} layouts that fit"


def _left_out(spec: AnySpec) -> int:
    """Count the dimensions that a rotation of reduced rank drops; 0 without one."""
    return 0 if not isinstance(spec, CodebookSpec) else spec.embedding_dim - spec.width


def _lost_energy(table: ScannedTable) -> Tensor:
    """Compute the relative squared error of the best projection that drops 0, 1, 2, ... dimensions."""
    rows = table.sample
    if table.weights is not None:
        rows = rows * table.weights[table.sample_ids].sqrt()[:, None]
    energies = torch.linalg.eigvalsh((rows.T @ rows).double()).clamp_min(0)
    return torch.cat([energies.new_zeros(1), energies.cumsum(0) / energies.sum().clamp_min(1e-300)])


def estimate_error(table: ScannedTable, spec: AnySpec, effort: Effort, num_rows: int) -> float:
    """Estimate the relative squared error of a layout fitted to the whole table.

    With fewer rows than the table has, the error on the fitted rows is biased downward and the held-out error
    upward, by about the same amount, which decreases as 1 / rows: the estimate is interpolated to the table's N.

    Args:
        table: the scanned table.
        spec: the layout.
        effort: effort of the trial fit.
        num_rows: maximum number of rows to fit on; up to half as many are held out.
    """
    N, _ = table.shape
    generator = torch.Generator().manual_seed(spec.num_embeddings)
    order = torch.randperm(len(table.sample), generator=generator)
    fitted = table.sample[order[:num_rows]]
    other = table.sample[order[num_rows : num_rows + num_rows // 2]]
    weights = None if table.weights is None else table.weights[table.sample_ids][order]
    rows = _SampleRows(fitted, None if weights is None else weights[:num_rows])
    small = replace(spec, num_embeddings=max(len(fitted), 1), num_kept_rows=0, num_zero_rows=0)
    quantizer = method_of(spec.method).fit(rows, small, effort, lambda: None)

    def error(part: Tensor, cost: Tensor | None) -> float:
        body = {**quantizer.shared_tensors(), **quantizer.encode(part, 0)}
        decoded = decode_rows(small, body, torch.arange(len(part)))
        lost, energy = (decoded - part).square().sum(1), part.square().sum(1)
        if cost is not None:
            lost, energy = lost * cost, energy * cost
        return float(lost.sum() / energy.sum().clamp_min(1e-30))

    inside = error(fitted, rows.weights)
    if len(other) == 0:
        return inside
    outside = error(other, None if weights is None else weights[num_rows : num_rows + num_rows // 2])
    return (inside + outside) / 2 - (outside - inside) / 2 * min(1.0, len(fitted) / N)


def estimate_ratio(table: ScannedTable, options: ConvertOptions) -> float:
    """Estimate the error that options lead to, by one brief fit of the layout with the most code bytes.

    Returns:
        The relative squared error.

    Raises:
        BudgetError: no layout fits.
    """
    _check_magnitude(table)
    budget = budget_bytes(table.facts, options)
    specs = list(method_of(options.method).layouts(options, table.facts))
    fitting = [spec for spec in specs if budget is None or spec.nbytes <= budget]
    if not fitting:
        raise BudgetError(
            over_budget(table.facts, options, budget or 0, min(specs, key=lambda s: s.nbytes, default=None))
        )
    likely = max(_largest_of_each(fitting), key=lambda spec: spec.tensor_shapes()["codes"].nbytes)
    return estimate_error(table, likely, _BRIEF, _FIRST_TRIAL_ROWS)


@dataclass(frozen=True)
class _SampleRows:
    sample: Tensor
    weights: Tensor | None

    @property
    def sample_ids(self) -> Tensor:
        return torch.arange(len(self.sample))

    @property
    def stored_apart_ids(self) -> Tensor:
        return torch.empty(0, dtype=torch.int64)

    def blocks(self) -> Iterator[tuple[int, Tensor]]:
        yield 0, self.sample
