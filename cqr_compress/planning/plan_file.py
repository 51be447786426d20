"""Plans in files, so that the next checkpoint of a model gets the same layouts without trials."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cqr_compress._version import __version__
from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import atomic_file
from cqr_compress.errors import CqrCompressWarning, FormatError, ShapeError, SpecError, TableNotFoundError, brief
from cqr_compress.planning.choose import TablePlan
from cqr_compress.planning.curves import options_of_size
from cqr_compress.planning.find import Candidate
from cqr_compress.planning.plan_tables import Planned, PlannedTable, scan_candidate, warn_of_aliases
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.spec import AnySpec, TrellisSpec, spec_from_json

_KIND, _SCHEMA_VERSION = "plan", 1


@dataclass(frozen=True)
class TableLayout:
    """The layout of one table in a plan.

    Attributes:
        spec: its spec, of a table that may have had another number of rows.
        budget: bytes that it was planned within.
        effort: effort of the fit.
        error: estimated relative squared error, or None.
        reason: why this layout was chosen.
    """

    spec: AnySpec
    budget: int
    effort: FitEffort
    error: float | None
    reason: str


@dataclass(frozen=True)
class PlanFile:
    """A plan as it is in a file.

    Attributes:
        path: the file.
        given: the fields of the options of the conversion that it was made with.
        tables: layouts, by table.
        left_dense: reasons of the tables that stay dense, by table.
    """

    path: Path
    given: Mapping[str, Any]
    tables: Mapping[str, TableLayout]
    left_dense: Mapping[str, str]

    def options(self, options: ConvertOptions) -> ConvertOptions:
        """Return the options of the plan.

        Args:
            options: given with the plan; each field has its default, or the value of the plan.

        Raises:
            SpecError: a field has another value.
        """
        default = ConvertOptions()
        for f in fields(ConvertOptions):
            now = getattr(options, f.name)
            if now not in (getattr(default, f.name), self.given.get(f.name, getattr(default, f.name))):
                was = self.given.get(f.name, getattr(default, f.name))
                raise SpecError(
                    f"{str(self.path)!r} was made with {f.name} {was!r}, and {now!r} is given: leave it out, or "
                    "plan to another file"
                )
        return ConvertOptions(**self.given)

    def select(self, checkpoint: Checkpoint, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Select the tables of the plan among the candidates of a checkpoint.

        Raises:
            TableNotFoundError: the checkpoint lacks a table of the plan.
        """
        names = {candidate.name for candidate in candidates}
        if missing := [name for name in self.tables if name not in names]:
            raise TableNotFoundError(
                f"{str(checkpoint.path)!r} has no {missing[0]!r}, a table of the plan {str(self.path)!r}: it has "
                f"{', '.join(sorted(names)[:5])}"
            )
        chosen = []
        for candidate in candidates:
            reason = candidate.reason
            if candidate.name not in self.tables:
                reason = self.left_dense.get(candidate.name, f"not in the plan {self.path.name}")
                if candidate.selected and candidate.name not in self.left_dense:
                    message = f"{candidate.name!r} stays dense: it is not in the plan {str(self.path)!r}"
                    warnings.warn(message, CqrCompressWarning, stacklevel=3)
            chosen.append(replace(candidate, selected=candidate.name in self.tables, reason=reason, named=True))
        return chosen

    def planned(
        self,
        checkpoint: Checkpoint,
        selected: Sequence[Candidate],
        options: ConvertOptions,
        weights: Mapping[str, Tensor],
        progress: Progress,
    ) -> Planned:
        """Scan the tables and give them their layouts, with as many rows as they have now.

        Raises:
            ShapeError: a table has another number of dimensions than in the plan, or too few rows.
        """
        tables: dict[str, PlannedTable] = {}
        for candidate in selected:
            name, layout = candidate.name, self.tables[candidate.name]
            scan = scan_candidate(checkpoint, candidate, options, weights, progress)
            spec = _spec_for(layout.spec, scan, str(self.path))
            plan = TablePlan(name, spec, layout.reason, layout.effort, layout.error)
            budget = max(spec.nbytes, layout.budget * scan.shape[0] // layout.spec.num_embeddings)
            own = options_of_size(scan, options, budget)
            tables[name] = PlannedTable(scan.entry, plan, spec, scan, own)
            warn_of_aliases(checkpoint, candidate)
        return Planned(tables, [])


def write_plan(path: Path, planned: Planned, options: ConvertOptions) -> None:
    """Write the plans of all tables, and the options that they were made with, as JSON."""
    default = ConvertOptions()
    given = {f.name: getattr(options, f.name) for f in fields(ConvertOptions)}
    values = {
        "kind": _KIND,
        "schema_version": _SCHEMA_VERSION,
        "version": __version__,
        "options": {name: value for name, value in given.items() if value != getattr(default, name)},
        "tables": {
            name: {
                "spec": table.spec.to_json(),
                "effort": asdict(table.plan.effort),
                "error": table.plan.error,
                "budget": table.record().budget,
                "reason": table.plan.reason,
            }
            for name, table in planned.tables.items()
        },
        "left_dense": {item.name: item.reason for item in planned.left_dense},
    }
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=2) + "\n").encode())


def read_plan(path: Path) -> PlanFile:
    """Read a plan.

    Raises:
        CheckpointError: no file of JSON.
        FormatError: not a plan, a damaged one, or one of a newer version.
    """
    values = read_json(path)
    if not isinstance(values, dict) or values.get("kind") != _KIND:
        raise FormatError(f"{str(path)!r} is JSON, but not a plan: give a file that --plan wrote, or a new name")
    if values.get("schema_version") != _SCHEMA_VERSION:
        raise FormatError(
            f"{str(path)!r} has plan schema {brief(values.get('schema_version'))}, but this version reads "
            f"{_SCHEMA_VERSION}: plan again to a new file"
        )
    try:
        given: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in values["options"].items()
        }
        ConvertOptions(**given)
        tables = {name: _layout(table) for name, table in values["tables"].items()}
        left = {str(name): str(reason) for name, reason in values["left_dense"].items()}
    except (TypeError, ValueError, KeyError, AttributeError, SpecError, OverflowError) as e:
        raise FormatError(f"{str(path)!r} is a damaged plan: {type(e).__name__}: {str(e)[:300]}") from e
    return PlanFile(path, given, tables, left)


def _layout(values: Mapping[str, Any]) -> TableLayout:
    effort = FitEffort(**values["effort"])
    if any(isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= 10**6 for n in asdict(effort).values()):
        raise ValueError("an effort is not a number of iterations")
    error, budget, reason = values["error"], values["budget"], values["reason"]
    if error is not None and (type(error) not in (int, float) or not 0 <= error < math.inf):
        raise ValueError(f"an error is {brief(error)}, no number of at least 0")
    if isinstance(budget, bool) or not isinstance(budget, int) or not 0 < budget < 2**63:
        raise ValueError(f"a budget is {brief(budget)}, no number of bytes")
    if not isinstance(reason, str):
        raise TypeError(f"a reason is {brief(reason)}")
    spec = spec_from_json(values["spec"])
    if not method_of(spec.method).makes(spec):
        raise SpecError(f"method {spec.method!r} has no layout {spec.layout} of kind {spec.kind!r}")
    return TableLayout(spec, budget, effort, error, reason)


def _spec_for(spec: AnySpec, scan: ScannedTable, where: str) -> AnySpec:
    """Return the spec of a table with the rows that it has now."""
    N, D = scan.shape
    facts, name = scan.facts, scan.entry.name
    if spec.embedding_dim != D:
        raise ShapeError(
            f"{name!r} has {D} dimensions, and {spec.embedding_dim} in the plan {where!r}: plan to a new file"
        )
    changes: dict[str, Any] = {
        "dtype": str(facts.dtype).removeprefix("torch."),
        "num_kept_rows": facts.num_exact_rows,
        "num_zero_rows": facts.num_zero_rows,
    }
    try:
        resized = spec.resized(N) if isinstance(spec, TrellisSpec) else spec
        found = replace(resized, num_embeddings=N, **changes)
    except SpecError as e:
        raise ShapeError(f"{name!r} of {N} rows cannot have its layout in the plan {where!r}: {e}") from e
    if found.nbytes >= facts.nbytes:
        raise ShapeError(
            f"{name!r} of {N} rows has {facts.nbytes:,} bytes, and {found.nbytes:,} in the layout of the plan "
            f"{where!r}: plan to a new file"
        )
    return found
