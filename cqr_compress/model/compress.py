"""Compress the embedding layers of a live model, without a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.errors import BudgetError, SpecError, TableNotFoundError
from cqr_compress.model.swap import embedding_places, refuse_wrapper, swap_embeddings_
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.planning.choose import TablePlan, plan_table
from cqr_compress.planning.encode import encode_table
from cqr_compress.planning.find import find_tables
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.scan import ScannedTable, scan_table
from cqr_compress.progress import Progress, Silent
from cqr_compress.quantize.kmeans import row_weights
from cqr_compress.quantize.options import Request
from cqr_compress.table.decode import PER_ROW
from cqr_compress.table.quality import Quality
from cqr_compress.table.spec import AnySpec, CodebookSpec, RowwiseSpec
from cqr_compress.table.table import CompressedTable


@dataclass(frozen=True)
class CompressedLayer:
    """What became of one table of a model.

    Attributes:
        name: of the tensor in the state_dict.
        spec: how it is compressed, or None if it stayed dense.
        reason: why this layout, or why it stayed dense.
        quality: agreement of the rows with what they were, or None if it stayed dense.
    """

    name: str
    spec: AnySpec | None
    reason: str
    quality: Quality | None = None


def compress_(
    model: nn.Module,
    request: Request | AnySpec | float | None = None,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    frequencies: Frequencies = (),
    progress: Progress | None = None,
) -> list[CompressedLayer]:
    """Compress the embedding layers of a model, in place.

    Every table is planned before the first is compressed, and all are compressed before the model is changed:
    dense and compressed tables are in memory together for a while.

    Args:
        model: changed in place; make its optimizer after this call.
        request: method and budget; or a spec, whose layout each table gets (its shape and rows do not count); or
            the ratio of bytes before / after; 2 bits for each value if None.
        tables: globs or "re:" patterns of tensors to take instead of the weights of all embedding layers; they may
            name bare parameters.
        exclude: the same, of tensors to leave.
        frequencies: how often each id is used, (N,) by tensor, or files; see `convert`.
        progress: told of the work.

    Returns:
        One entry for each table that was looked at, in the order of the state_dict.

    Raises:
        TableNotFoundError: no embedding layer, a pattern that matches nothing, or no table that would gain.
        SpecError: a spec without stored codes, or a layout that a table's shape cannot have.
        BudgetError: tables for which no layout fits; the model is as it was.
    """
    progress = progress or Silent()
    request = _as_request(request)
    refuse_wrapper(model)
    entries = _entries(model, tables)
    checkpoint = Checkpoint(path=Path(type(model).__name__), format="live model", entries=entries)
    selected = [c.name for c in find_tables(checkpoint, tables or list(entries), exclude) if c.selected]
    if not selected:
        raise TableNotFoundError(f"{type(model).__name__} has no embedding layer: name its tables")
    counts = read_frequencies(frequencies, {name: entries[name].shape[0] for name in selected})
    weights = {name: row_weights(count) for name, count in counts.items()}
    plans: list[TablePlan] = []
    problems = []
    for name in selected:
        scan = _scan(entries[name], request, weights.get(name))
        progress.start(f"choosing a layout for {name}", 0, "trials")
        try:
            plans.append(plan_table(scan, request, progress.advance))
        except BudgetError as e:
            problems.append(str(e))
    if problems:
        raise BudgetError("\n".join(problems))
    if all(plan.spec is None for plan in plans):
        reasons = "; ".join(f"{plan.name}: {plan.reason}" for plan in plans)
        raise TableNotFoundError(f"no table of {type(model).__name__} would gain from compression ({reasons})")
    made: dict[str, CompressedTable] = {}
    layers = []
    for plan in plans:
        if plan.spec is None:
            layers.append(CompressedLayer(plan.name, None, plan.reason))
            continue
        made[plan.name], quality = _compressed(entries[plan.name], plan, request, weights.get(plan.name), progress)
        layers.append(CompressedLayer(plan.name, plan.spec, plan.reason, quality))
    swap_embeddings_(model, made)
    return layers


def _as_request(wanted: Request | AnySpec | float | None) -> Request:
    if isinstance(wanted, RowwiseSpec):
        return Request(method=wanted.method, codebook_dtype=wanted.scale_dtype)
    if isinstance(wanted, CodebookSpec):
        if not wanted.num_stored_levels:
            raise SpecError(
                f"a spec of {wanted.method} fixes no size for other tables: give a Request with a ratio"
            )
        return Request(
            method=wanted.method,
            num_columns=wanted.num_columns,
            num_levels=wanted.num_levels,
            n_bits=wanted.n_bits,
            rotation=wanted.rotation,
            rank=wanted.rank,
            codebook_dtype=wanted.codebook_dtype,
            seed=wanted.seed,
        )
    return wanted if isinstance(wanted, Request) else Request(ratio=None if wanted is None else float(wanted))


def _scan(entry: TensorEntry, request: Request, weights: Tensor | None) -> ScannedTable:
    scan = scan_table(entry, request.keep_rows, request.nonfinite, request.seed, request.max_sample)
    return replace(scan, weights=weights)


def _compressed(
    entry: TensorEntry, plan: TablePlan, request: Request, weights: Tensor | None, progress: Progress
) -> tuple[CompressedTable, Quality]:
    assert plan.spec is not None
    scan = _scan(entry, request, weights)
    blocks: dict[str, list[Tensor]] = {}
    meter = encode_table(
        scan, plan, request.seed, lambda short, t: blocks.setdefault(short, []).append(t), progress
    )
    tensors = {short: torch.cat(parts) if short in PER_ROW else parts[0] for short, parts in blocks.items()}
    return CompressedTable(plan.spec, tensors), meter.result()


def _entries(model: nn.Module, tables: Sequence[str]) -> Mapping[str, TensorEntry]:
    """Tensors that may be tables, each once: weights of embedding layers, or all where patterns choose."""
    entries: dict[str, TensorEntry] = {}
    seen: set[int] = set()
    for place in embedding_places(model):
        if not isinstance(place.module, TableLayer) and place.key not in seen:
            seen.add(place.key)
            entries[place.name] = TensorEntry(place.name, _InMemory(place.tensor.detach()))
    if tables:
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen and parameter.ndim == 2:
                entries[name] = TensorEntry(name, _InMemory(parameter.detach()))
    return entries


@dataclass(frozen=True)
class _InMemory:
    """A `LazyTensor` over a tensor of the model, on any device."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor.cpu()

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].cpu().clone()
