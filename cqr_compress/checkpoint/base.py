"""Format-independent interface of checkpoints: names, shapes and lazy reads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class StoredTensor(Protocol):
    """A tensor on disk, read by `read` or `read_rows` only; each call reads it again."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""

    def read(self) -> Tensor:
        """Copy the whole tensor into memory."""

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop of the first dimension into memory."""


@dataclass(frozen=True)
class TensorEntry:
    """One named tensor of a checkpoint.

    Attributes:
        name: name in the state_dict, wrapper prefixes included.
        stored: access to its values.
    """

    name: str
    stored: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.stored.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.stored.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class UnbuiltObject:
    """An object of the file that was not instantiated, because that would execute code.

    Attributes:
        path: keys that lead to it in the file's nesting, joined by dots.
        class_name: name of its class in the file.
    """

    path: str
    class_name: str


@dataclass(frozen=True)
class Checkpoint:
    """A lazy mapping from names to tensors, with the other content of the file.

    Attributes:
        path: the file, index or folder that was opened.
        format: "torch-zip", "torch-legacy", "safetensors" or "sharded ...".
        entries: tensors by name, in file order; a tensor that several names share is listed once.
        aliases: other names of a tensor, each with its name in `entries`.
        outside_model: names of tensors outside the dict that contains the model's state_dict.
        structure: nesting and plain values of a pickled file as JSON (see `formats.nesting`), or None if flat.
        unbuilt_objects: objects that were not instantiated.
        optimizer_bytes: bytes of optimizer state, which is not in `entries`.
        files: all files of the checkpoint.
        metadata: safetensors metadata; of shards, that of the first one.
        checksums: CRC-32 of the bytes of tensors, for files that have them (see `checksums`).
        close_files: closes the files.
    """

    path: Path
    format: str
    entries: Mapping[str, TensorEntry]
    aliases: Mapping[str, str] = field(default_factory=dict)
    outside_model: frozenset[str] = frozenset()
    structure: Any = None
    unbuilt_objects: tuple[UnbuiltObject, ...] = ()
    optimizer_bytes: int = 0
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    checksums: Mapping[str, int] = field(default_factory=dict)
    close_files: Callable[[], None] = lambda: None

    @property
    def file_bytes(self) -> int:
        """Size of all files of the checkpoint."""
        return sum(file.stat().st_size for file in self.files)

    def aliases_of(self, name: str) -> list[str]:
        """Return the other names of the tensor `name`."""
        return list(self._aliases_by_name.get(name, ()))

    @cached_property
    def _aliases_by_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for alias, name in self.aliases.items():
            found.setdefault(name, []).append(alias)
        return found

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close_files()


def read_blocks(entry: TensorEntry, block_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """Read a tensor in blocks of its first dimension, each of about `block_bytes`.

    Yields:
        The index of the first row, and the block; a 0-d tensor is one block.
    """
    if not entry.shape or entry.nbytes <= block_bytes:
        yield 0, entry.stored.read()
        return
    rows = entry.shape[0]
    step = max(1, block_bytes * rows // entry.nbytes)
    for start in range(0, rows, step):
        yield start, entry.stored.read_rows(start, min(start + step, rows))


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


@dataclass(frozen=True, kw_only=True)
class Format:
    """A file format of checkpoints; `formats.open.FORMATS` lists all formats.

    Attributes:
        suffixes: suffixes of the files to search for in a folder.
        matches: returns whether a file has this format, given its path and its first 512 bytes.
        open: opens a file; raises CheckpointError if it is damaged.
    """

    suffixes: tuple[str, ...]
    matches: Callable[[Path, bytes], bool]
    open: Callable[[Path], Checkpoint]
