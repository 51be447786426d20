"""Bytes of checkpoint files, and the tensors of torch files over them."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cqr_compress.checkpoint.formats.budget import MAX_SIZE
from cqr_compress.errors import CheckpointError, brief


def lies_in(path: Path, folder: Path) -> bool:
    """Return whether a file lies in a folder or, by links, in the store of a Hugging Face cache of the folder."""
    folder, target = folder.resolve(), path.resolve()
    stores = [parent.parent / "blobs" for parent in folder.parents if parent.name == "snapshots"]
    return any(target.is_relative_to(allowed) for allowed in (folder, *stores))


class SourceFile:
    """A file that is read in ranges, and refused once its size or time of modification has changed.

    Ranges are read rather than memory-mapped: touching a mapped page beyond the end of a file that was truncated
    after it was opened kills the process with SIGBUS.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb", buffering=0)
        self._opened = self._state()
        self._lock = threading.Lock()  # a read is a seek and a read

    def copy(self, offset: int, nbytes: int) -> Tensor:
        """Copy bytes to a new uint8 tensor.

        Raises:
            CheckpointError: the range is outside the file, the file was changed, or it cannot be read.
        """
        size = self._opened[0]
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise CheckpointError(
                f"{str(self.path)!r} is truncated: bytes {offset} to {offset + nbytes} are required, but the "
                f"file has {size}"
            )
        out = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        rest = out.numpy().data
        try:
            with self._lock:
                self._file.seek(offset)
                while len(rest) and (read := self._file.readinto(rest)):
                    rest = rest[read:]
            now = self._state()
        except OSError as e:
            raise CheckpointError(f"{str(self.path)!r} cannot be read: {e.strerror}") from e
        if len(rest) or now != self._opened:
            raise changed_error(self.path, size, now[0])
        return out

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _state(self) -> tuple[int, int]:
        about = os.fstat(self._file.fileno())
        return about.st_size, about.st_mtime_ns


def changed_error(path: Path, before: int, now: int) -> CheckpointError:
    """Return the error of a file that was changed, or replaced by another one, with its sizes in bytes."""
    return CheckpointError(
        f"{str(path)!r} was changed while it was read: it had {before} bytes and has {now}. Run the command again "
        "when the file is complete."
    )


@dataclass(eq=False)
class LazyStorage:
    """The bytes of one torch storage: a range of a file.

    Attributes:
        key: key of the storage within its file; tensors with equal keys share memory.
        num_elements: number of elements according to the pickle.
        file: the file.
        offset: first byte in the file; for a legacy file it is set after the pickles are read.
        nbytes: number of bytes.
    """

    key: str
    num_elements: int
    file: SourceFile
    offset: int
    nbytes: int

    def copy(self, start: int, nbytes: int) -> Tensor:
        """Copy bytes of the storage, as uint8."""
        if start + nbytes > self.nbytes:
            raise CheckpointError(
                f"storage {self.key!r} of {str(self.file.path)!r} has {self.nbytes} bytes, "
                f"but a tensor reads up to byte {start + nbytes}: the file is damaged"
            )
        return self.file.copy(self.offset + start, nbytes)


@dataclass(frozen=True)
class StridedTensor:
    """A `StoredTensor` over a storage, as torch pickles describe tensors."""

    storage: LazyStorage
    dtype: torch.dtype
    storage_offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __setstate__(self, state: object) -> None:
        raise CheckpointError("the pickle attempts to modify a tensor after describing it")

    def check(self) -> None:
        """Refuse a description that reads outside the storage.

        Raises:
            CheckpointError: invalid sizes, or sizes that exceed the storage.
        """
        numbers = (self.storage_offset, *self.shape, *self.stride)
        plain = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= MAX_SIZE for n in numbers)
        if not plain or len(self.shape) != len(self.stride):
            shape, stride = (", ".join(map(brief, sizes)) for sizes in (self.shape, self.stride))
            raise CheckpointError(
                f"a tensor has the invalid shape ({shape}), stride ({stride}) or offset "
                f"{brief(self.storage_offset)} in {str(self.storage.file.path)!r}"
            )
        if math.prod(max(n, 1) for n in self.shape) > MAX_SIZE:
            raise CheckpointError(
                f"a tensor of {str(self.storage.file.path)!r} has the impossible shape {self.shape}"
            )
        if self._span() and (self.storage_offset + self._span()) * self.dtype.itemsize > self.storage.nbytes:
            raise CheckpointError(
                f"a tensor of shape {self.shape} reads past the end of storage {self.storage.key!r} "
                f"({self.storage.nbytes} bytes) of {str(self.storage.file.path)!r}: the file is damaged"
            )

    @property
    def identity(self) -> tuple[object, ...]:
        """Identity of the tensor's memory: equal for tensors that share all of it."""
        path, key = self.storage.file.path, self.storage.key
        return (path, key, self.storage_offset, self.shape, self.stride, self.dtype)

    def read(self) -> Tensor:
        """Copy the whole tensor into memory."""
        return self._read(self.storage_offset, self.shape)

    def read_rows(self, start: int, stop: int) -> Tensor:
        """Copy rows start..stop into memory; for a transposed tensor, the whole span of the rows is read."""
        return self._read(self.storage_offset + start * self.stride[0], (stop - start, *self.shape[1:]))

    def _read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        span = StridedTensor(self.storage, self.dtype, offset, shape, self.stride)._span()
        if span == 0:
            return torch.empty(shape, dtype=self.dtype, device="cpu")
        size = self.dtype.itemsize
        flat = self.storage.copy(offset * size, span * size).view(self.dtype)
        return flat.as_strided(shape, self.stride).contiguous()

    def _span(self) -> int:
        """Return the number of elements from the first to the last one that is read."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
