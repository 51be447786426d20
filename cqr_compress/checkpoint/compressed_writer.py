"""Write compressed files: every tensor's shape is known before its values are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress._version import __version__
from cqr_compress.checkpoint.base import TensorEntry, read_blocks
from cqr_compress.checkpoint.compressed_file import (
    FORMAT_VERSION,
    METADATA_KEY,
    CompressedCheckpoint,
    dump_header,
    stored_name,
)
from cqr_compress.checkpoint.shards import Output, shard_paths
from cqr_compress.checkpoint.size_report import SizeReport, report_path, size_report
from cqr_compress.checkpoint.streaming_writer import atomic_file, check_outputs
from cqr_compress.errors import NonFiniteError
from cqr_compress.progress import Progress, Silent
from cqr_compress.table.blocks import BLOCK_BYTES
from cqr_compress.table.spec import AnySpec, TensorShape
from cqr_compress.table.table import CompressedTable

Write = Callable[[Output], None]


Changes = Callable[[dict[str, Any]], None]


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
