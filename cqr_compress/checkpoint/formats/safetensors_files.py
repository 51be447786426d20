"""Safetensors files, whose headers are validated by the safetensors library."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cqr_compress.checkpoint.base import DTYPES, Checkpoint, Format, TensorEntry
from cqr_compress.checkpoint.checksums import CHECKSUMS_KEY, checksums_from_text
from cqr_compress.checkpoint.formats.budget import MAX_DIMENSIONS, MAX_SIZE
from cqr_compress.checkpoint.formats.mapped_storage import SourceFile
from cqr_compress.errors import CheckpointError, brief


@dataclass(frozen=True)
class SafetensorsSlice:
    """A `StoredTensor` over the bytes of an open safetensors file."""

    file: SourceFile
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Copy the whole tensor into memory."""
        return self._copy(0, self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop into memory."""
        stop = max(start, min(stop, self.shape[0]))
        return self._copy(start, (stop - start, *self.shape[1:]))

    def _copy(self, first_row: int, shape: tuple[int, ...]) -> Tensor:
        width = math.prod(self.shape[1:]) * self.dtype.itemsize
        raw = self.file.copy(self.offset + first_row * width, math.prod(shape) * self.dtype.itemsize)
        return raw.view(self.dtype).view(shape)


def open_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file.

    Raises:
        CheckpointError: the header does not match the file, or a dtype is not supported.
    """
    try:
        source = SourceFile(path)
    except OSError as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e.strerror or e}") from e
    try:
        return _opened(source)
    except BaseException:
        source.close()
        raise


def _opened(source: SourceFile) -> Checkpoint:
    where = repr(str(source.path))
    try:
        with safe_open(source.path, "pt") as checked:
            slices = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118
            shapes = {name: (tuple(found.get_shape()), str(found.get_dtype())) for name, found in slices.items()}
            metadata = dict(checked.metadata() or {})
    except (OSError, RuntimeError) as e:  # safetensors reports that too many files are open as a RuntimeError
        raise CheckpointError(f"{where} cannot be read: {e}") from e
    except SafetensorError as e:
        raise CheckpointError(
            f"{where} is not a valid safetensors file: {e}. It is truncated, damaged or of another format."
        ) from e
    for name, (_, dtype) in shapes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} of {where} has dtype {dtype}, which is not supported")
    # the library has validated the header; bytes are copied from its offsets, so that no tensor maps the file
    length = int.from_bytes(source.copy(0, 8).numpy().tobytes(), "little")
    header: dict[str, Any] = json.loads(source.copy(8, length).numpy().tobytes())
    if not shapes.keys() <= header.keys():
        raise CheckpointError(f"{where} was replaced while it was opened")
    for name in shapes:
        shape = header[name]["shape"]
        if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_SIZE:
            raise CheckpointError(f"tensor {brief(name)} of {where} has an impossible shape")
    return Checkpoint(
        path=source.path,
        format="safetensors",
        entries={
            name: TensorEntry(
                name,
                SafetensorsSlice(source, 8 + length + header[name]["data_offsets"][0], shape, DTYPES[dtype]),
            )
            for name, (shape, dtype) in shapes.items()
        },
        files=(source.path,),
        metadata=metadata,
        checksums=checksums_from_text(metadata, shapes, str(source.path)) if CHECKSUMS_KEY in metadata else {},
        close_files=source.close,
    )


SAFETENSORS = Format(
    suffixes=(".safetensors",),
    matches=lambda path, head: (
        head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")))
    ),
    open=open_safetensors,
)
