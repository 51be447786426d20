"""Fit a teacher's rows anew, where an error of a row costs what the task's loss says, at the bytes there are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cqr_compress import processes
from cqr_compress.checkpoint import open_checkpoint
from cqr_compress.clustering.curvature import Curvature
from cqr_compress.errors import BudgetError
from cqr_compress.nn import TableLayer
from cqr_compress.plan import plan_table
from cqr_compress.progress import Progress
from cqr_compress.quantize.refit import fit_in_basis
from cqr_compress.refitting import source_rows
from cqr_compress.request import Request
from cqr_compress.rows import ScannedTable, in_basis
from cqr_compress.spec import STORED, AnySpec, CodebookSpec
from cqr_compress.tuning.tuned import TunedModel

_ADDITIVE = ("pq", "rq", "prq")


@dataclass(frozen=True)
class Refit:
    """Fits of a teacher's rows, to be tried one after another.

    Attributes:
        tuned: the model; its tables change.
        teacher: the dense checkpoint.
        curvature: what the task says about each table; others stay as they are.
        counts: how often ids are used, by table.
        method: that the conversion was asked for.
        budgets: bytes that each table may have; its own if it is not named.
        progress: told of the work.
    """

    tuned: TunedModel
    teacher: Path
    curvature: Mapping[str, Curvature]
    counts: Mapping[str, Tensor]
    method: str
    budgets: Mapping[str, int]
    progress: Progress

    @staticmethod
    def tables(tuned: TunedModel) -> dict[str, TableLayer]:
        """The tables that can be fitted: those with stored codes."""
        return {
            name: layer
            for name, layer in tuned.tables.items()
            if isinstance(layer.spec, CodebookSpec) and layer.spec.num_stored_levels
        }

    @torch.no_grad()
    def candidates(self) -> Iterator[str]:
        """Put one fit after another into the model: with frequent ids weighing more, and alike for all ids.

        Layouts stay, or are chosen anew among those of the same method within the bytes that the conversion had.

        Yields:
            What was done.

        Raises:
            TableNotFoundError: the teacher lacks a table.
            ShapeError: it has another shape there.
        """
        given = {name: layer.spec for name, layer in self.tables(self.tuned).items() if name in self.curvature}
        for weighted, rotated in itertools.product((False, True), self._ways(given)):
            layouts = []
            with open_checkpoint(self.teacher) as checkpoint:
                for name, spec in given.items():
                    assert isinstance(spec, CodebookSpec)
                    layer, curvature = self.tuned.tables[name], self.curvature[name]
                    counts = self.counts.get(name, curvature.counts.cpu()) if weighted else None
                    scan = source_rows(checkpoint, name, layer.table(), counts, self.progress)
                    made = self._fit(name, scan, curvature, spec, rotated) if processes.rank() == 0 else None
                    found, tensors = processes.object_from_first(made) or (spec, {})
                    kept = {s: t for s, t in layer.table_tensors().items() if s.startswith("kept_")}
                    self.tuned.install(name, found, {**tensors, **kept})
                    layouts.append(f"{name} {found.layout}")
            more = ", and more at frequent ids" if weighted else ""
            yield f"fitted {', '.join(layouts)} anew, errors costing what the loss says{more}"

    def _ways(self, given: Mapping[str, AnySpec]) -> tuple[bool, ...]:
        """Whether to try layouts with a rotation, without, or both."""
        some = any(isinstance(spec, CodebookSpec) and _may_rotate(spec) for spec in given.values())
        return (False, True) if some else (False,)

    def _fit(
        self, name: str, scan: ScannedTable, curvature: Curvature, spec: CodebookSpec, rotated: bool
    ) -> tuple[CodebookSpec, dict[str, Tensor]]:
        """Choose a layout and fit it."""
        budget = max(spec.nbytes, self.budgets.get(name, 0))
        rotated = spec.rotation is not None or (rotated and _may_rotate(spec))
        whole = rotated or spec.num_columns == 1
        basis = curvature.basis(1 if whole else spec.num_columns)
        moved, found = in_basis(scan, basis), spec
        if whole and (spec.method in _ADDITIVE or rotated):
            self.progress.start(f"choosing a layout for {name}", 0, "trials")
            found = _replanned(moved, spec, self.method, rotated, budget, self.progress)
        if found.rotation is None and found.num_columns != spec.num_columns:
            found = spec  # the basis is that of the columns there were
        if found is spec and rotated and spec.rotation is None:  # no such layout fits
            basis = curvature.basis(spec.num_columns)
            moved = in_basis(scan, basis)
        self.progress.start(f"fitting {name}", 0, "steps")
        return found, fit_in_basis(moved, found, basis, self.progress.advance)


def _may_rotate(spec: CodebookSpec) -> bool:
    return spec.rotation is None and (spec.method in _ADDITIVE or spec.code_sources == (STORED,))


def _replanned(
    rows: ScannedTable, spec: CodebookSpec, method: str, rotated: bool, budget: int, progress: Progress
) -> CodebookSpec:
    """The layout of least error within a budget; the given one where there is none."""
    additive = spec.method if spec.method in _ADDITIVE else "pq"
    request = Request(
        method="auto" if method == "auto" and rotated else additive,
        ratio=max(1.0001, spec.dense_nbytes / (budget + 0.5)),
        rotation="opq" if rotated else None,
        rank="auto" if rotated else None,
        codebook_dtype=spec.codebook_dtype,
        min_rows=0,
        seed=spec.seed,
    )
    try:
        found = plan_table(rows, request, progress.advance).spec
    except BudgetError:
        return spec
    if not isinstance(found, CodebookSpec) or found.nbytes > budget:
        return spec
    same = ["dtype", "num_kept_rows", "num_zero_rows", *(() if spec.method in _ADDITIVE else ["method"])]
    return replace(found, **{name: getattr(spec, name) for name in same})
