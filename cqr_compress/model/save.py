"""Save a live model with compressed layers as a compressed file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import CompressedOutput, Destination
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.header import Header, SourceRecord, TableRecord
from cqr_compress.checkpoint.parts import Part, copied_part, table_part, tensor_part, trained_part
from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.errors import SwapError, TableNotFoundError
from cqr_compress.model.load import model_tensors
from cqr_compress.model.surgery import table_attributes
from cqr_compress.model.swap import TensorSlot, compressed_slots, names_inside_tables, refuse_wrapper
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import Progress, shown
from cqr_compress.table.base_spec import TensorShape
from cqr_compress.table.spec import AnySpec, RowwiseSpec
from cqr_compress.table.table import CompressedTable


def save_compressed(
    model: nn.Module,
    output: str | Path,
    template: str | Path | None = None,
    *,
    prefix: str | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
    change_header: Callable[[Header], Header] = lambda header: header,
    progress: Progress | None = None,
) -> SizeReport:
    """Save a model whose embedding layers are compressed, with a JSON report next to the file.

    The output is written to a temporary file, read back, and only then renamed into place.

    Args:
        model: model with compressed layers, from `load_compressed`, `compress_` or `CQREmbedding`.
        output: the safetensors file to write.
        template: the compressed file that was loaded into the model: it provides names, dtypes, nesting and the
            tensors that the model does not have. If None, names and dtypes are those of the model's tensors.
        prefix: prefix that was passed to `load_compressed`.
        shard_bytes: split the output into files of about this size.
        force: replace existing output.
        change_header: maps the header of the template or the model to the one to write.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Returns:
        The size report.

    Raises:
        TableNotFoundError: the model has no compressed layer.
        SwapError: the model is not the one that `template` was loaded into.
        NonFiniteError: a value is not finite in the file's dtype.
        OutputExistsError: the output exists, and `force` is False.
        OutputError: the output cannot be written.
    """
    destination = Destination(path=Path(output), shard_bytes=shard_bytes, force=force)
    refuse_wrapper(model)
    destination.check()
    with shown(progress) as progress:
        if template is None:
            header, parts = parts_of_model(model)
            return CompressedOutput(destination, change_header(header), parts, {}).write(progress)
        with open_checkpoint(template) as checkpoint:
            opened = CompressedFile.from_checkpoint(checkpoint)
            header, parts = _from_template(model, opened, prefix)
            return CompressedOutput(destination, change_header(header), parts, checkpoint.metadata).write(progress)


def _from_template(model: nn.Module, opened: CompressedFile, prefix: str | None) -> tuple[Header, list[Part]]:
    """Collect the tensors of the file from the model, and those that the model does not have from the file."""
    parts: list[Part] = []
    tables: dict[str, TableRecord] = {}
    slots = model_tensors(model, opened, prefix)
    for name, record in opened.header.tables.items():
        layer = _layer_in(slots.get(name))
        if layer is None:
            raise SwapError(f"the model does not decode {name!r} from codes: load {opened.name!r} into it first")
        spec = _with_dtypes_of(layer.spec, record.spec)
        parts.append(table_part(name, spec, layer.table_tensors()))
        changed = spec.layout != record.spec.layout
        tables[name] = replace(record, spec=spec, reason="chosen for the task" if changed else record.reason)
    for name, entry in opened.dense_entries.items():
        slot = slots.get(name)
        same = slot is not None and tuple(slot.tensor.shape) == tuple(entry.shape)
        parts.append(trained_part(entry, slot.tensor) if slot is not None and same else copied_part(entry))
    return replace(opened.header, tables=tables), parts


def _with_dtypes_of(spec: AnySpec, file: AnySpec) -> AnySpec:
    """Return the layer's spec with the dtypes of the file."""
    if not isinstance(spec, RowwiseSpec) and not isinstance(file, RowwiseSpec):
        return replace(spec, dtype=file.dtype, codebook_dtype=file.codebook_dtype)
    return replace(spec, dtype=file.dtype)


def parts_of_model(model: nn.Module, dtypes: Mapping[str, AnySpec] = {}) -> tuple[Header, list[Part]]:
    """Collect the tensors of a model with compressed layers, under their names in its state_dict.

    Args:
        model: the model.
        dtypes: specs by name of tables that get the dtypes of a spec instead of those in memory.

    Raises:
        TableNotFoundError: the model has no compressed layer.
    """
    parts: list[Part] = []
    named: dict[int, str] = {}
    tables: dict[str, TableRecord] = {}
    aliases: dict[str, str] = {}
    dense_bytes = 0
    for slot in compressed_slots(model, every_path=True):
        layer = _layer_in(slot)
        assert layer is not None
        if id(layer.owner) in named:
            aliases[slot.name] = named[id(layer.owner)]
            continue
        named[id(layer.owner)] = slot.name
        table: CompressedTable = layer.table()
        spec = _with_dtypes_of(table.spec, dtypes.get(slot.name, table.spec))
        parts.append(table_part(slot.name, spec, table.tensors))
        tables[slot.name] = TableRecord(spec=spec, quality=None, reason="made by its layer")
        dense_bytes += spec.dense_nbytes
    if not named:
        raise TableNotFoundError(f"{type(model).__name__} has no compressed layer")
    inside = names_inside_tables(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in inside:
            continue
        if id(tensor) in named:
            aliases[name] = named[id(tensor)]
            continue
        named[id(tensor)] = name
        shape = TensorShape(tuple(tensor.shape), tensor.dtype)
        parts.append(tensor_part(name, tensor, shape))
        dense_bytes += shape.nbytes
    source = SourceRecord(file=type(model).__name__, format="live model", nbytes=dense_bytes)
    return Header(tables=tables, source=source, aliases=aliases), parts


def _layer_in(slot: TensorSlot | None) -> TableLayer | None:
    return None if slot is None else table_attributes(slot.module).get(slot.attribute)
