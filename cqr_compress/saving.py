"""Write a live model with compressed layers as a compressed file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import __version__
from cqr_compress.checkpoint import TensorEntry, open_checkpoint, read_blocks
from cqr_compress.checkpoint.compressed import (
    FORMAT_VERSION,
    METADATA_KEY,
    CompressedCheckpoint,
    dump_header,
    stored_name,
)
from cqr_compress.checkpoint.output import Output, shard_paths
from cqr_compress.checkpoint.writer import atomic_file, check_outputs
from cqr_compress.errors import NonFiniteError, SwapError, TableNotFoundError
from cqr_compress.loading import model_tensors
from cqr_compress.nn import TableLayer
from cqr_compress.nn.in_place import computed
from cqr_compress.progress import Progress, Silent
from cqr_compress.report import SizeReport, report_path, size_report
from cqr_compress.spec import AnySpec, CodebookSpec, TensorShape
from cqr_compress.swap import Place, compressed_places, refuse_wrapper
from cqr_compress.table import BLOCK_BYTES, CompressedTable

Write = Callable[[Output], None]
Changes = Callable[[dict[str, Any]], None]


def save_compressed(
    model: nn.Module,
    output: str | Path,
    like: str | Path | None = None,
    *,
    prefix: str | None = None,
    shard_bytes: int | None = None,
    force: bool = False,
    change_header: Changes = lambda header: None,
    progress: Progress | None = None,
) -> SizeReport:
    """Write a model whose embedding layers are compressed, and a JSON report beside the file.

    The output is written to a temporary file, read back, and only then renamed into place.

    Args:
        model: with compressed layers, as `load_compressed`, `compress_` or `CQREmbedding` make them.
        output: the safetensors file to write.
        like: the compressed file that was loaded into the model: names, dtypes, nesting and whatever the model
            does not have are taken over from it. Without one, names are the model's, dtypes those of its tensors.
        prefix: as it was given to `load_compressed`.
        shard_bytes: split the output into files of about this size.
        force: replace existing output.
        change_header: may change the metadata before it is written.
        progress: told of the work.

    Returns:
        The size report.

    Raises:
        TableNotFoundError: the model has no compressed layer.
        SwapError: the model is not the one that `like` was loaded into.
        NonFiniteError: a value that is not finite in the file's dtype.
        OutputExistsError: the output is there and `force` is not given; other errors of writing.
    """
    output, progress = Path(output), progress or Silent()
    refuse_wrapper(model)
    check_outputs([output, report_path(output)], force)
    if like is None:
        header = _new_header(model)
        return _write(
            output, header, {}, _parts_of_model(model, header), shard_bytes, force, progress, change_header
        )
    with open_checkpoint(like) as checkpoint:
        opened = CompressedCheckpoint.of(checkpoint)
        header = json.loads(json.dumps(opened.header))
        parts = _parts_like(model, opened, header, prefix)
        return _write(output, header, checkpoint.metadata, parts, shard_bytes, force, progress, change_header)


def rewrite_tables(
    opened: CompressedCheckpoint,
    tables: Mapping[str, CompressedTable],
    changes: Mapping[str, Mapping[str, Any]],
    output: Path,
    force: bool = False,
    progress: Progress | None = None,
) -> SizeReport:
    """Write a compressed file with some of its tables replaced; all other tensors are copied.

    Args:
        opened: the file.
        tables: the new ones, by name.
        changes: of the tables' metadata, by name.
        output: the file to write.
        force: replace existing output.
        progress: told of the work.
    """
    header, parts = json.loads(json.dumps(opened.header)), _Parts()
    for name, spec in opened.specs.items():
        if name in tables:
            parts.add_table(name, tables[name].spec, tables[name].tensors)
            header["tables"][name] |= {"spec": tables[name].spec.to_json(), **changes.get(name, {})}
        else:
            for short in spec.tensor_shapes():
                parts.copy(opened.checkpoint.entries[stored_name(name, short)])
            parts.specs[name] = spec
    for entry in opened.dense_entries.values():
        parts.copy(entry)
    metadata = opened.checkpoint.metadata
    return _write(output, header, metadata, parts, None, force, progress or Silent(), lambda header: None)


class _Parts:
    """What goes into the file, in order: shapes that are known in advance, and who writes them."""

    def __init__(self) -> None:
        self.shapes: dict[str, TensorShape] = {}
        self.specs: dict[str, AnySpec] = {}
        self.writes: list[Write] = []

    def add_table(self, name: str, spec: AnySpec, tensors: Mapping[str, Tensor]) -> None:
        self.specs[name] = spec
        for short, shape in spec.tensor_shapes().items():
            self._add(stored_name(name, short), shape, tensors[short])

    def add_tensor(self, name: str, shape: TensorShape, tensor: Tensor) -> None:
        self._add(name, shape, tensor)

    def add_dense(self, entry: TensorEntry, tensor: Tensor) -> None:
        """Write a model's tensor; bit for bit as the file has it, if it is the same in the model's dtype."""

        def write(out: Output) -> None:
            held = entry.lazy.read()
            same = torch.equal(held.to(tensor.dtype), tensor.detach().cpu())
            out.write(entry.name, held if same else _narrowed(entry.name, tensor, entry.dtype))

        self._put(entry.name, TensorShape(entry.shape, entry.dtype), write)

    def copy(self, entry: TensorEntry) -> None:
        def write(out: Output) -> None:
            for _, block in read_blocks(entry, BLOCK_BYTES):
                out.write(entry.name, block)

        self._put(entry.name, TensorShape(entry.shape, entry.dtype), write)

    def _put(self, name: str, shape: TensorShape, write: Write) -> None:
        self.shapes[name] = shape
        self.writes.append(write)

    def _add(self, stored: str, shape: TensorShape, tensor: Tensor) -> None:
        def write(out: Output) -> None:
            out.write(stored, _narrowed(stored, tensor, shape.dtype))

        self._put(stored, shape, write)


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not bool(value.isfinite().all()) and bool(tensor.isfinite().all()):
        raise NonFiniteError(f"{name!r} has values beyond {dtype}: nothing was written")
    return value


def _parts_like(
    model: nn.Module, opened: CompressedCheckpoint, header: dict[str, Any], prefix: str | None
) -> _Parts:
    """Take every tensor of the file from the model, and from the file what the model does not have."""
    parts, places = _Parts(), model_tensors(model, opened, prefix)
    for name, spec in opened.specs.items():
        layer = _layer_at(places.get(name))
        if layer is None:
            raise SwapError(
                f"the model does not read {name!r} from codes: load {str(opened.checkpoint.path)!r} into it first"
            )
        made = _as_in_file(layer.spec, spec)
        parts.add_table(name, made, layer.table_tensors())
        header["tables"][name]["spec"] = made.to_json()
        if made.layout != spec.layout:
            header["tables"][name]["reason"] = "chosen anew for the task"
    for name, entry in opened.dense_entries.items():
        place = places.get(name)
        if place is not None and tuple(place.tensor.shape) == tuple(entry.shape):
            parts.add_dense(entry, place.tensor)
        else:
            parts.copy(entry)
    return parts


def _as_in_file(spec: AnySpec, file: AnySpec) -> AnySpec:
    """The layer's spec, with the dtypes of the file."""
    if isinstance(spec, CodebookSpec) and isinstance(file, CodebookSpec):
        return replace(spec, dtype=file.dtype, codebook_dtype=file.codebook_dtype)
    return replace(spec, dtype=file.dtype)


def _parts_of_model(model: nn.Module, header: dict[str, Any]) -> _Parts:
    """Take every tensor of the model under its own name."""
    parts = _Parts()
    named: dict[int, str] = {}
    hidden = set()
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, TableLayer):
            shorts = (*module.spec.tensor_shapes(), "hash_seed")
            hidden |= {f"{path}.{short}" if path else short for short in shorts}
    for place in compressed_places(model, every_path=True):
        layer = _layer_at(place)
        assert layer is not None
        if id(layer.owner) in named:
            header["aliases"][place.name] = named[id(layer.owner)]
            continue
        named[id(layer.owner)] = place.name
        table = layer.table()
        parts.add_table(place.name, table.spec, table.tensors)
        header["tables"][place.name] = {
            "spec": table.spec.to_json(), "quality": {}, "reason": "made by its layer",
        }  # fmt: skip
    if not named:
        raise TableNotFoundError(f"{type(model).__name__} has no compressed layer")
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in hidden:
            continue
        if id(tensor) in named:
            header["aliases"][name] = named[id(tensor)]
            continue
        named[id(tensor)] = name
        parts.add_tensor(name, TensorShape(tuple(tensor.shape), tensor.dtype), tensor)
    dense = sum(shape.nbytes for name, shape in parts.shapes.items())
    stored = sum(spec.nbytes - spec.dense_nbytes for spec in parts.specs.values())
    header["source"]["bytes"] = dense - stored
    return parts


def _layer_at(place: Place | None) -> TableLayer | None:
    return None if place is None else computed(place.module).get(place.attribute)


def _new_header(model: nn.Module) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION, "version": __version__, "seed": 0, "tables": {}, "aliases": {},
        "extras": [], "skeleton": None, "left_dense": [],
        "source": {
            "file": type(model).__name__, "format": "live model", "bytes": 0, "optimizer_bytes": 0,
            "placeholders": [],
        },
    }  # fmt: skip


def _write(
    output: Path,
    header: dict[str, Any],
    metadata: Mapping[str, str],
    parts: _Parts,
    shard_bytes: int | None,
    force: bool,
    progress: Progress,
    change_header: Changes,
) -> SizeReport:
    change_header(header)
    metadata = {**metadata, "format": "pt", METADATA_KEY: dump_header(header)}
    paths = shard_paths(output, parts.shapes, shard_bytes)
    out = Output(output, parts.shapes, paths, metadata)
    check_outputs([*paths, out.final_path], force)
    with out:
        progress.start("writing", len(parts.writes), "tensors")
        for write in parts.writes:
            write(out)
            progress.advance()
        out.finish(metadata)
        progress.start("verifying", sum(shape.nbytes for shape in parts.shapes.values()), "bytes")
        with out.reopen() as opened:
            CompressedCheckpoint.of(opened)
            out.verify(opened, progress.advance)
        report = size_report(header, parts.specs, str(out.final_path), out.file_bytes, measured=True)
        out.commit()
    with atomic_file(report_path(output)) as file:
        file.write((json.dumps(report.to_json(), indent=2) + "\n").encode())
    return report
