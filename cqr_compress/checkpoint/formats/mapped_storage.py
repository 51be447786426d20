"""Tensors of torch files, copied from a memory-mapped file."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cqr_compress.checkpoint.formats.budget import MAX_SIZE
from cqr_compress.errors import CheckpointError, brief


class MappedFile:
    """A read-only memory map of a file, whose pages are released after each copy."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def copy(self, offset: int, nbytes: int) -> Tensor:
        """Copy bytes to a new uint8 tensor, and release the mapped pages.

        Raises:
            CheckpointError: the range is outside the file.
        """
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self._map):
            raise CheckpointError(
                f"{str(self.path)!r} is truncated: bytes {offset} to {offset + nbytes} are required, but the "
                f"file has {len(self._map)}"
            )
        out = torch.empty(nbytes, dtype=torch.uint8)
        view = np.frombuffer(self._map, np.uint8, nbytes, offset)
        np.copyto(out.numpy(), view)
        del view
        first_page = offset - offset % mmap.PAGESIZE
        if nbytes and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, first_page, offset + nbytes - first_page)
        return out

    def close(self) -> None:
        """Unmap the file."""
        self._map.close()


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
    file: MappedFile
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
            return torch.empty(shape, dtype=self.dtype)
        size = self.dtype.itemsize
        flat = self.storage.copy(offset * size, span * size).view(self.dtype)
        return flat.as_strided(shape, self.stride).contiguous()

    def _span(self) -> int:
        """Return the number of elements from the first to the last one that is read."""
        if 0 in self.shape:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
