"""Re-quantize the original's rows under Fisher-weighted error, within the budget of the conversion."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from cqr_compress import distributed
from cqr_compress.checkpoint.base import StoredTensor, TensorEntry
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import BudgetError
from cqr_compress.finetuning.fisher import FisherMatrix
from cqr_compress.finetuning.tuned_model import TunedModel
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.planning.choose import plan_table
from cqr_compress.planning.scan import ScannedTable, source_rows
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import TableRows
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.quantize.rates import WINDOWS
from cqr_compress.quantize.registry import method_of
from cqr_compress.quantize.trellis_fit import multiplied
from cqr_compress.table.decode import stored_rows
from cqr_compress.table.file_form import as_in_file
from cqr_compress.table.spec import STORED, AnySpec, CodebookSpec, TrellisSpec

_ADDITIVE = ("pq", "rq", "prq")


@dataclass(frozen=True)
class FisherFit:
    """Candidate fits of the original's rows under Fisher-weighted error.

    Attributes:
        tuned: the model, whose tables are replaced.
        original: the dense checkpoint.
        fisher: Fisher information by table; tables without it stay unchanged.
        counts: counts of the ids, by table; those of `fisher` for other tables.
        method: method of the conversion.
        budgets: budget in bytes, by table; at least the current size of the table is allowed.
        progress: receives the progress of the work.
        layouts: layouts that were chosen, which later fits of the same kind keep; None where none fits the budget.
    """

    tuned: TunedModel
    original: Path
    fisher: Mapping[str, FisherMatrix]
    counts: Mapping[str, Tensor]
    method: str
    budgets: Mapping[str, int]
    progress: Progress
    layouts: dict[tuple[object, ...], AnySpec | None] = field(default_factory=dict)

    @staticmethod
    def tables(tuned: TunedModel) -> dict[str, TableLayer]:
        """Return the tables that can be fitted, which have stored codes."""
        return {
            name: layer
            for name, layer in tuned.tables.items()
            if isinstance(layer.spec, TrellisSpec)
            or (isinstance(layer.spec, CodebookSpec) and layer.spec.num_stored_levels)
        }

    @torch.no_grad()
    def candidates(self) -> Iterator[str]:
        """Install one fit after another in the model: with equal weights of all ids, then weighted by counts.

        Where a rotation or a single column allows it, the layout is chosen again among those of the same method
        within the budget of the conversion. Trellises are fitted under the square root of the metric, too.

        Yields:
            A log line that describes the fit.

        Raises:
            TableNotFoundError: the original lacks a table.
            ShapeError: a table has another shape in the original.
        """
        layers = {name: layer for name, layer in self.tables(self.tuned).items() if name in self.fisher}
        given = {name: layer.spec for name, layer in layers.items()}
        held = {name: layer.table_tensors() for name, layer in layers.items()}  # which `install` does not change
        for weighted, (rotated, power) in itertools.product((False, True), self._ways(given)):
            layouts = []
            with open_checkpoint(self.original) as checkpoint:
                for name, spec in given.items():
                    layer, fisher = self.tuned.tables[name], self.fisher[name]
                    counts = self.counts.get(name, fisher.counts.cpu()) if weighted else None
                    scan = source_rows(checkpoint, name, layer.table(), counts, self.progress)
                    made: tuple[AnySpec, dict[str, Tensor]] | None = None
                    if distributed.rank() == 0 and isinstance(spec, TrellisSpec):
                        made = self._fit_trellis(name, scan, fisher, spec, held[name], power)
                    elif distributed.rank() == 0 and isinstance(spec, CodebookSpec):
                        made = self._fit(name, scan, fisher, spec, rotated)
                    found, tensors = distributed.broadcast_object(made) or (spec, {})
                    kept = {s: t for s, t in layer.table_tensors().items() if s.startswith("kept_")}
                    self.tuned.install(name, found, {**tensors, **kept})
                    layouts.append(f"{name} {found.layout}")
            more = ", weighted by frequency" if weighted else ""
            yield f"re-quantized {', '.join(layouts)} under Fisher-weighted error{more}"

    def _ways(self, given: Mapping[str, AnySpec]) -> list[tuple[bool, float]]:
        """Return whether to add a rotation, where a table supports it, and powers of the metric of trellises."""
        may_rotate = any(isinstance(spec, CodebookSpec) and _may_rotate(spec) for spec in given.values())
        trellis = any(isinstance(spec, TrellisSpec) for spec in given.values())
        return [(False, 1.0), *([(True, 1.0)] if may_rotate else []), *([(False, 0.5)] if trellis else [])]

    def _fit_trellis(
        self,
        name: str,
        scan: ScannedTable,
        fisher: FisherMatrix,
        spec: TrellisSpec,
        held: Mapping[str, Tensor],
        power: float,
    ) -> tuple[TrellisSpec, dict[str, Tensor]]:
        """Choose a layout and fit it; the table as it was given, of `spec` and `held`, where no layout fits."""
        budget = max(spec.nbytes, self.budgets.get(name, 0))
        options = ConvertOptions(
            method="trellis",
            ratio=max(1.0001, spec.dense_nbytes / (budget + 0.5)),
            rotation="pca",
            codebook_dtype=spec.codebook_dtype,
            window=spec.window if spec.window == max(WINDOWS) else None,  # which a fast search does not choose
            effort="fast",
            min_rows=0,
            seed=spec.seed,
        )
        metric_sqrt = fisher.metric_sqrt(power=power)
        moved = transformed(scan, metric_sqrt)
        found = self._layout((name, power, scan.weights is not None), moved, options)  # tiers follow weights
        if not isinstance(found, TrellisSpec) or found.nbytes > budget:  # a rotation does not fit the budget
            return spec, {short: held[short] for short in spec.body_shapes()}
        self.progress.start(f"fitting {name}", 0, "steps")
        method = method_of("trellis")
        quantizer = method.fit(moved, found, method.effort(found, None), self.progress.advance)
        encoded = [stored_rows(found, quantizer.encode(block, start)) for start, block in moved.blocks()]
        made = multiplied(found, quantizer.shared_tensors(), torch.linalg.inv(metric_sqrt.double()).float())
        return found, made | {short: torch.cat([part[short] for part in encoded]) for short in encoded[0]}

    def _fit(
        self, name: str, scan: ScannedTable, fisher: FisherMatrix, spec: CodebookSpec, rotated: bool
    ) -> tuple[CodebookSpec, dict[str, Tensor]]:
        """Choose a layout and fit it."""
        budget = max(spec.nbytes, self.budgets.get(name, 0))
        rotated = spec.rotation is not None or (rotated and _may_rotate(spec))
        whole = rotated or spec.num_columns == 1
        metric_sqrt = fisher.metric_sqrt(1 if whole else spec.num_columns)
        moved, found = transformed(scan, metric_sqrt), spec
        if whole and (spec.method in _ADDITIVE or rotated):
            options = _options(spec, self.method, rotated, budget)
            found = _like(spec, self._layout((name, rotated), moved, options), budget)
        if found.rotation is None and found.num_columns != spec.num_columns:
            found = spec  # the metric has the blocks of the previous columns
        if found is spec and rotated and spec.rotation is None:  # no layout with a rotation fits the budget
            metric_sqrt = fisher.metric_sqrt(spec.num_columns)
            moved = transformed(scan, metric_sqrt)
        self.progress.start(f"fitting {name}", 0, "steps")
        return found, fit_transformed(moved, found, metric_sqrt, self.progress.advance)

    def _layout(self, key: tuple[object, ...], rows: ScannedTable, options: ConvertOptions) -> AnySpec | None:
        """Choose the layout of least error, once for each key, which begins with the table's name."""
        if key not in self.layouts:
            self.progress.start(f"choosing a layout for {key[0]}", 0, "trials")
            try:
                self.layouts[key] = plan_table(rows, options, self.progress).spec
            except BudgetError:
                self.layouts[key] = None
        return self.layouts[key]


def _may_rotate(spec: CodebookSpec) -> bool:
    return spec.rotation is None and (spec.method in _ADDITIVE or spec.code_sources == (STORED,))


def _options(spec: CodebookSpec, method: str, rotated: bool, budget: int) -> ConvertOptions:
    """Return options by which the layout of codebooks is chosen again, of a conversion with `method`."""
    additive = spec.method if spec.method in _ADDITIVE else "pq"
    return ConvertOptions(
        method="auto" if method == "auto" and rotated else additive,
        ratio=max(1.0001, spec.dense_nbytes / (budget + 0.5)),
        rotation="opq" if rotated else None,
        rank="auto" if rotated else None,
        codebook_dtype=spec.codebook_dtype,
        min_rows=0,
        seed=spec.seed,
    )


def _like(spec: CodebookSpec, found: AnySpec | None, budget: int) -> CodebookSpec:
    """Return a layout of codebooks that was found, as one of the table of `spec`; `spec` if it does not fit."""
    if not isinstance(found, CodebookSpec) or found.nbytes > budget:
        return spec
    same = ["dtype", "num_kept_rows", "num_zero_rows", *(() if spec.method in _ADDITIVE else ["method"])]
    return replace(found, **{name: getattr(spec, name) for name in same})


def transformed(scan: ScannedTable, metric_sqrt: Tensor) -> ScannedTable:
    """Return the table with its rows multiplied by `metric_sqrt`, (D, D) float32, block by block when read."""
    moved = _Multiplied(scan.entry.stored, metric_sqrt)
    sample = scan.sample @ metric_sqrt
    return replace(
        scan,
        entry=TensorEntry(scan.entry.name, moved),
        sample=sample,
        largest=float(sample.abs().max()),
        mean_square=float(sample.square().mean()),
    )


@dataclass(frozen=True)
class _Multiplied:
    """A `StoredTensor` of rows multiplied by a matrix; its values are float32 for any dtype of the source."""

    source: StoredTensor
    metric_sqrt: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def read(self) -> Tensor:
        return self.source.read().float() @ self.metric_sqrt

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.source.read_rows(start, stop).float() @ self.metric_sqrt


def fit_transformed(
    rows: TableRows, spec: CodebookSpec, metric_sqrt: Tensor, step: Callable[[], None] = lambda: None
) -> dict[str, Tensor]:
    """Fit a layout to rows multiplied by the square root of a metric, and transform its tensors back.

    The fit minimizes ||(x - y) @ metric_sqrt|| of a decoded row y of x, at no cost in bytes: the inverse of the
    square root of the metric goes into the rotation if the layout has one, else into the codebooks. With several
    columns and no rotation, `metric_sqrt` has to be zero between columns.

    Args:
        rows: the rows of the original, multiplied by `metric_sqrt`.
        spec: the layout.
        metric_sqrt: (D, D) float32, invertible.
        step: called after each unit of work.

    Returns:
        `codes`, `codebooks` and `rotation` where the spec has them, in the spec's dtypes.

    Raises:
        NonFiniteError: a value is outside the range of its dtype.
    """
    C, S = spec.num_columns, spec.sub_dim
    back = torch.linalg.inv(metric_sqrt.double()).float()
    wide = replace(spec, codebook_dtype="float32", rotation="opq" if spec.rotation else None)
    method = method_of(spec.method)
    quantizer = method.fit(rows, wide, method.effort(wide, None), step)
    made = dict(quantizer.shared_tensors())
    parts: dict[str, list[Tensor]] = {}
    for start, block in rows.blocks():
        for short, tensor in quantizer.encode(block, start).items():
            parts.setdefault(short, []).append(tensor)
    if spec.rotation:
        made["rotation"] = made["rotation"] @ back
    else:
        blocks = [back[c * S : (c + 1) * S, c * S : (c + 1) * S] for c in range(C)]
        made["codebooks"] = torch.stack([made["codebooks"][c] @ blocks[c] for c in range(C)])
    made |= {short: torch.cat(tensors) for short, tensors in parts.items()}
    return as_in_file(spec, made)
