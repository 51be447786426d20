"""Safetensors files, read through the safetensors library, which checks every header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
"""Dtype names of the format (safetensors documentation, "Format")."""


@dataclass(frozen=True)
class SafetensorsSlice:
    """A `LazyTensor` over an open safetensors file."""

    file: Any
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        """Copy the whole tensor into memory."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop into memory."""
        rows: Tensor = self.file.get_slice(self.name)[start:stop]
        return rows


def open_safetensors(path: Path) -> Checkpoint:
    """Open a safetensors file.

    Raises:
        CheckpointError: the header does not describe the file, or a dtype that torch does not know.
    """
    try:
        file: Any = safe_open(path, "pt")
        names = list(file.keys())
    except SafetensorError as e:
        raise CheckpointError(
            f"{str(path)!r} is not a valid safetensors file: {e}. It is truncated, damaged or of another format."
        ) from e
    entries = {}
    for name in names:
        piece = file.get_slice(name)
        dtype = DTYPES.get(str(piece.get_dtype()))
        if dtype is None:
            raise CheckpointError(
                f"tensor {name!r} of {str(path)!r} has dtype {piece.get_dtype()}, which cannot be carried over"
            )
        shape = tuple(piece.get_shape())
        entries[name] = TensorEntry(name, SafetensorsSlice(file, name, shape, dtype))
    return Checkpoint(
        path=path,
        format="safetensors",
        entries=entries,
        files=(path,),
        metadata=dict(file.metadata() or {}),
        close_files=lambda: file.__exit__(None, None, None),
    )
