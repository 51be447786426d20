"""Stream tensors into safetensors files, given their shapes in advance.

The layout is computed first, the payload is written in any order, and the header is written last: until `finish`
the file cannot be parsed, and `commit` renames it into place.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import DTYPES
from cqr_compress.errors import OutputError, OutputExistsError, ShapeError
from cqr_compress.table.spec import TensorShape

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class HeaderLayout:
    """The layout of one safetensors file.

    Attributes:
        offsets: offset of each tensor within the payload, in bytes.
        shapes: shape and dtype of each tensor.
        header_bytes: length of the JSON header, padded; the payload starts at 8 + header_bytes.
    """

    offsets: Mapping[str, int]
    shapes: Mapping[str, TensorShape]
    header_bytes: int

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return 8 + self.header_bytes + sum(shape.nbytes for shape in self.shapes.values())


def lay_out(shapes: Mapping[str, TensorShape], metadata: Mapping[str, str]) -> HeaderLayout:
    """Lay out tensors, widest dtype first so that each is aligned, with a header sized for `metadata`."""
    order = sorted(shapes, key=lambda name: (-shapes[name].dtype.itemsize, name))
    offsets, end = {}, 0
    for name in order:
        offsets[name] = end
        end += shapes[name].nbytes
    placed = {name: shapes[name] for name in order}
    length = len(_header_json(offsets, placed, metadata))
    return HeaderLayout(offsets, placed, -(-length // 8) * 8)


def _header_json(
    offsets: Mapping[str, int], shapes: Mapping[str, TensorShape], metadata: Mapping[str, str]
) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for name, shape in shapes.items():
        span = [offsets[name], offsets[name] + shape.nbytes]
        header[name] = {"dtype": _NAMES[shape.dtype], "shape": list(shape.shape), "data_offsets": span}
    return json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()


@dataclass
class SafetensorsWriter:
    """Writer of one file, to be used as a context manager, which removes a file that was not committed.

    Attributes:
        path: final path of the file.
        layout: layout from `lay_out`.
        checksums: CRC-32 of the bytes written to each tensor.
    """

    path: Path
    layout: HeaderLayout
    checksums: dict[str, int] = field(default_factory=dict)
    _file: IO[bytes] | None = None
    _written: dict[str, int] = field(default_factory=dict)

    @property
    def partial_path(self) -> Path:
        """Path of the temporary file, in the folder of the target."""
        return self.path.with_name(f".{self.path.name}.{os.getpid()}.partial")

    def __enter__(self) -> SafetensorsWriter:
        with _output_errors(self.path, self.layout.file_bytes):
            self._file = self.partial_path.open("wb")
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, self.layout.file_bytes)
                else:
                    self._file.truncate(self.layout.file_bytes)
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    self._discard()
                    raise
                self._file.truncate(self.layout.file_bytes)
        return self

    def __exit__(self, *exc: object) -> None:
        self._discard()

    def write(self, name: str, values: Tensor) -> None:
        """Append values to a tensor: its rows in order, in blocks of any size.

        Raises:
            ShapeError: the dtype differs from the layout, or the values exceed the size of the tensor.
            OutputError: the disk is full, or another error of the operating system.
        """
        shape = self.layout.shapes[name]
        start = self._written.get(name, 0)
        if values.dtype != shape.dtype or start + values.nbytes > shape.nbytes:
            raise ShapeError(
                f"{name!r} has {shape}: {values.nbytes} bytes of {values.dtype} do not fit at offset {start}"
            )
        content = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        assert self._file is not None
        with _output_errors(self.path, self.layout.file_bytes):
            self._file.seek(8 + self.layout.header_bytes + self.layout.offsets[name] + start)
            self._file.write(content)
        self._written[name] = start + values.nbytes
        self.checksums[name] = zlib.crc32(content, self.checksums.get(name, 0))

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header and flush to disk, which completes the temporary file.

        Raises:
            ShapeError: a tensor is incomplete, or the header is larger than the space reserved for it.
        """
        for name, shape in self.layout.shapes.items():
            if self._written.get(name, 0) != shape.nbytes:
                raise ShapeError(f"{name!r} has {self._written.get(name, 0)} of its {shape.nbytes} bytes")
        header = _header_json(self.layout.offsets, self.layout.shapes, metadata)
        if len(header) > self.layout.header_bytes:
            raise ShapeError(f"a header of {len(header)} bytes does not fit in {self.layout.header_bytes}")
        assert self._file is not None
        with _output_errors(self.path, self.layout.file_bytes):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self.layout.header_bytes) + header.ljust(self.layout.header_bytes))
            self._file.flush()
            os.fsync(self._file.fileno())

    def commit(self) -> None:
        """Rename the finished file into place."""
        assert self._file is not None
        self._file.close()
        with _output_errors(self.path, self.layout.file_bytes):
            self.partial_path.replace(self.path)
            _sync_folder(self.path.parent)

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.partial_path.unlink()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, which is renamed to `path` if the block ends without an error."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with _output_errors(path, None):
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            partial.unlink()


def check_outputs(paths: list[Path], force: bool, sources: Sequence[Path] = ()) -> None:
    """Check output paths before any work is done.

    Args:
        paths: files to write.
        force: whether existing files may be replaced.
        sources: files that are read, which must not be replaced.

    Raises:
        OutputExistsError: a file exists, and `force` is False.
        OutputError: the folder does not exist, the path is a folder, or it is one of the sources.
    """
    reading = {source.resolve() for source in sources}
    for path in paths:
        if path.resolve() in reading:
            raise OutputError(f"{str(path)!r} is the checkpoint itself, or a part of it: give another output")
        if path.is_dir():
            raise OutputError(f"{str(path)!r} is a folder: give a file")
        if path.exists() and not force:
            raise OutputExistsError(f"{str(path)!r} already exists. Pass --force to replace it.")
        if not path.parent.is_dir():
            raise OutputError(f"no such folder: {str(path.parent)!r}, to write {path.name!r} to. Create it first.")


@contextlib.contextmanager
def _output_errors(path: Path, wanted: int | None) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if isinstance(e, OutputError):
            raise
        need = f" of {wanted:,} bytes" if wanted is not None else ""
        hint = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is exceeded",
            errno.EFBIG: "the file size limit is exceeded (see ulimit -f)",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }.get(e.errno or 0, e.strerror or str(e))
        raise OutputError(f"cannot write {str(path)!r}{need}: {hint}. No partial file is left.") from e


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
