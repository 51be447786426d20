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
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from torch import Tensor

from cqr_compress.checkpoint.base import DTYPES
from cqr_compress.checkpoint.checksums import bytes_of, checksum, initial_checksum
from cqr_compress.checkpoint.output_files import create_partial, output_errors, rename, sync
from cqr_compress.errors import ShapeError
from cqr_compress.table.base_spec import TensorShape

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
        path: path of the file, which determines its temporary name.
        layout: layout from `lay_out`.
        checksums: CRC-32 of each tensor so far, see `checksums`.
        partial_path: path of the temporary file, once the context is entered.
    """

    path: Path
    layout: HeaderLayout
    checksums: dict[str, int] = field(init=False)
    partial_path: Path = Path()
    _file: IO[bytes] | None = None
    _written: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.checksums = {
            name: initial_checksum(shape.shape, shape.dtype) for name, shape in self.layout.shapes.items()
        }

    def __enter__(self) -> SafetensorsWriter:
        with output_errors(self.path, self.layout.file_bytes):
            self.partial_path, self._file = create_partial(self.path)
            try:
                self._reserve(self._file)
            except BaseException:
                self._discard()
                raise
        return self

    def _reserve(self, file: IO[bytes]) -> None:
        """Reserve the bytes of the file, so that a full disk is an error at once; else only set its size."""
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, self.layout.file_bytes)
                return
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        file.truncate(self.layout.file_bytes)

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
        content = bytes_of(values)
        assert self._file is not None
        with output_errors(self.path, self.layout.file_bytes):
            self._file.seek(8 + self.layout.header_bytes + self.layout.offsets[name] + start)
            self._file.write(content)
        self._written[name] = start + values.nbytes
        self.checksums[name] = checksum(values, self.checksums[name])

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
        with output_errors(self.path, self.layout.file_bytes):
            self._file.seek(0)
            self._file.write(struct.pack("<Q", self.layout.header_bytes) + header.ljust(self.layout.header_bytes))
            sync(self._file)

    def commit(self, target: Path | None = None) -> None:
        """Rename the finished file into place: to `path`, or to another name in its folder."""
        assert self._file is not None
        self._file.close()
        with output_errors(self.path, self.layout.file_bytes):
            rename(self.partial_path, target or self.path)

    def _discard(self) -> None:
        if self._file is not None:
            self._file.close()
        with contextlib.suppress(FileNotFoundError):
            self.partial_path.unlink()
