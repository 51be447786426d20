"""Compress the embedding layers of a live model in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.base import Checkpoint, StoredTensor, TensorEntry
from cqr_compress.errors import SpecError, TableNotFoundError, TableRefusedError
from cqr_compress.model.swap import embedding_slots, refuse_wrapper, swap_embeddings_
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.option_fields import merged
from cqr_compress.planning.find import find_tables
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.plan_tables import PlannedTable, plan_tables
from cqr_compress.planning.rules import Rules, read_rules
from cqr_compress.planning.size_budget import SizePlanner
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.base import row_weights
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.decode import PER_ROW
from cqr_compress.table.file_form import from_file
from cqr_compress.table.quality import Quality
from cqr_compress.table.spec import AnySpec, CodebookSpec, RowwiseSpec, TrellisSpec
from cqr_compress.table.table import CompressedTable


@dataclass(frozen=True)
class CompressedLayer:
    """Result of `compress_` for one table of a model.

    Attributes:
        name: name of the tensor in the state_dict.
        spec: spec of the compressed table, or None if it stayed dense.
        reason: why this layout was chosen, or why the table stayed dense.
        quality: quality compared with the dense rows, or None if it stayed dense.
    """

    name: str
    spec: AnySpec | None
    reason: str
    quality: Quality | None = None


def compress_(
    model: nn.Module,
    options: ConvertOptions | AnySpec | None = None,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Rules = (),
    frequencies: Frequencies = (),
    progress: Progress | None = None,
    **option_fields: Any,
) -> list[CompressedLayer]:
    """Compress the embedding layers of a model, in place.

        cqr.compress_(model, ratio=8)

    All tables are planned before the first one is compressed, and compressed before the model is modified: dense
    and compressed tables are in memory at the same time.

    Args:
        model: modified in place; create its optimizer after this call.
        options: method and budget; or a spec whose layout each table gets (its shape and special rows are
            ignored); if None, 2 bits for each value.
        tables: globs or "re:" patterns of tensors to compress instead of the weights of all embedding layers,
            which may include bare parameters.
        exclude: the same, of tensors to leave dense.
        rules: options of single tables, such as `{"emb_l.0.*": "int8", "re:user": "keep"}`; see `convert`.
        frequencies: counts of the ids, (N,) by tensor, or files; see `convert`.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.
        **option_fields: fields of `ConvertOptions`, such as `ratio=8`; they override those of `options`.

    Returns:
        One result for each selected table, in the order of the state_dict.

    Raises:
        TableNotFoundError: no embedding layer, a pattern without match, or no table that becomes smaller.
        SpecError: a spec without stored codes, or a layout that is invalid for a table's shape.
        TableRefusedError: a table on the meta device.
        BudgetError: tables for which no layout fits; the model is unchanged.
    """
    if isinstance(options, (CodebookSpec, RowwiseSpec, TrellisSpec)):
        options = _options_of(options, option_fields)
    chosen = merged(ConvertOptions, options, option_fields)
    refuse_wrapper(model)
    entries = _entries(model, tables)
    checkpoint = Checkpoint(path=Path(type(model).__name__), format="live model", entries=entries)
    selected = [
        c for c in find_tables(checkpoint, tables or list(entries), exclude, read_rules(rules)) if c.selected
    ]
    if not selected:
        raise TableNotFoundError(
            f"{type(model).__name__} has no embedding layer to compress: select tensors with `tables`"
        )
    empty = [c.name for c in selected if _is_empty(entries[c.name].stored)]
    if empty:
        raise TableRefusedError(
            f"{empty[0]!r} is on the meta device, which has no values: load the weights into the model first, or "
            "convert its checkpoint and call load_compressed"
        )
    if chosen.weight == "task":
        raise SpecError("weight is 'task': the sensitivity is measured by convert, of the model's checkpoint")
    if chosen.has_file_budget:
        raise SpecError("size and file_ratio are of a file: give a ratio, or convert the model's checkpoint")
    counts = read_frequencies(frequencies, {c.name: c.shape[0] for c in selected})
    weights = {name: row_weights(count) for name, count in counts.items()}
    with shown(progress) as progress:
        if chosen.weight is not None and chosen.ratio is not None:
            planner = SizePlanner.measure(checkpoint, selected, chosen, weights, {}, progress)
            planned = planner.plan_ratio(chosen.ratio)
        else:
            planned = plan_tables(checkpoint, selected, chosen, weights, progress)
        layers = {item.name: CompressedLayer(item.name, None, item.reason) for item in planned.left_dense}
        made: dict[str, CompressedTable] = {}
        for name, table in planned.tables.items():
            made[name], quality = _encoded(table, progress)
            layers[name] = CompressedLayer(name, table.spec, table.plan.reason, quality)
    swap_embeddings_(model, made)
    return [layers[candidate.name] for candidate in selected]


def _options_of(spec: AnySpec, given: Mapping[str, Any]) -> ConvertOptions:
    """Return the options that give tables of other shapes the layout of a spec."""
    if isinstance(spec, RowwiseSpec):
        return ConvertOptions(method=spec.method, codebook_dtype=spec.scale_dtype)
    if isinstance(spec, TrellisSpec):
        return ConvertOptions(
            method=spec.method,
            bits_per_dim=None
            if given.get("ratio")
            else 8 * spec.nbytes / (spec.num_embeddings * spec.embedding_dim),
            rotation=spec.rotation,
            window=spec.window,
            codebook_dtype=spec.codebook_dtype,
            seed=spec.seed,
        )
    if not spec.num_stored_levels:
        if given.get("ratio") or given.get("bits_per_dim"):
            return ConvertOptions(method=spec.method, codebook_dtype=spec.codebook_dtype, seed=spec.seed)
        raise SpecError(f"a spec of {spec.method} does not determine the size of other tables: give a ratio")
    helpers = {(): "none", ("stored",): "stored", ("hashed",): "hashed"}
    clustered = spec.method == "cqr"
    return ConvertOptions(
        method=spec.method,
        num_columns=spec.num_columns,
        num_levels=None if clustered else spec.num_levels,
        helper=helpers[spec.code_sources[1:]] if clustered else None,
        n_bits=spec.n_bits,
        rotation=spec.rotation,
        rank=spec.rank,
        codebook_dtype=spec.codebook_dtype,
        seed=spec.seed,
    )


def _encoded(table: PlannedTable, progress: Progress) -> tuple[CompressedTable, Quality]:
    blocks: dict[str, list[Tensor]] = {}
    meter = table.encode(lambda short, tensor: blocks.setdefault(short, []).append(tensor), progress)
    tensors = {short: torch.cat(parts) if short in PER_ROW else parts[0] for short, parts in blocks.items()}
    return CompressedTable(table.spec, from_file(table.spec, tensors)), meter.result()


def _entries(model: nn.Module, tables: Sequence[str]) -> Mapping[str, TensorEntry]:
    """Return possible tables, each once: weights of embedding layers; with patterns, all 2-D parameters."""
    entries: dict[str, TensorEntry] = {}
    seen: set[int] = set()
    for slot in embedding_slots(model):
        if not isinstance(slot.module, TableLayer) and slot.key not in seen:
            seen.add(slot.key)
            entries[slot.name] = TensorEntry(slot.name, _InMemory(slot.tensor.detach()))
    if tables:
        for name, parameter in model.named_parameters():
            if id(parameter) not in seen and parameter.ndim == 2:
                entries[name] = TensorEntry(name, _InMemory(parameter.detach()))
    return entries


def _is_empty(stored: StoredTensor) -> bool:
    return isinstance(stored, _InMemory) and stored.tensor.is_meta


@dataclass(frozen=True)
class _InMemory:
    """A `StoredTensor` over a tensor of the model, on any device."""

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
