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
from cqr_compress.checkpoint.formats.budget import MAX_DIMENSIONS, MAX_SIZE
from cqr_compress.checkpoint.formats.mapped_storage import MappedFile
from cqr_compress.errors import CheckpointError, brief


@dataclass(frozen=True)
class SafetensorsSlice:
    """A `StoredTensor` over the bytes of an open safetensors file."""

    file: MappedFile
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
        with safe_open(path, "pt") as checked:
            entries = {name: checked.get_slice(name) for name in checked.keys()}  # noqa: SIM118
            dtypes = {name: str(entry.get_dtype()) for name, entry in entries.items()}
            metadata = dict(checked.metadata() or {})
    except SafetensorError as e:
        raise CheckpointError(
            f"{str(path)!r} is not a valid safetensors file: {e}. It is truncated, damaged or of another format."
        ) from e
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise CheckpointError(f"tensor {name!r} of {str(path)!r} has dtype {dtype}, which is not supported")
    # the library has validated the header; bytes are copied from its offsets, so that no tensor maps the file
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header: dict[str, Any] = json.loads(raw.read(length))
    for name in dtypes:
        shape = header[name]["shape"]
        if len(shape) > MAX_DIMENSIONS or math.prod(max(size, 1) for size in shape) > MAX_SIZE:
            raise CheckpointError(f"tensor {brief(name)} of {str(path)!r} has an impossible shape")
    file = MappedFile(path)
    return Checkpoint(
        path=path,
        format="safetensors",
        entries={
            name: TensorEntry(
                name,
                SafetensorsSlice(
                    file, 8 + length + header[name]["data_offsets"][0], tuple(header[name]["shape"]), DTYPES[dtype]
                ),
            )
            for name, dtype in dtypes.items()
        },
        files=(path,),
        metadata=metadata,
        close_files=file.close,
    )


SAFETENSORS = Format(
    suffixes=(".safetensors",),
    matches=lambda path, head: (
        head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80")))
    ),
    open=open_safetensors,
)
