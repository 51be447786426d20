"""Archives of arrays that `numpy.savez` and `savez_compressed` write: tensors by name, or word vectors."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray

from cqr_compress.checkpoint.base import Checkpoint, Format, TensorEntry
from cqr_compress.checkpoint.formats.mapped_storage import SourceFile
from cqr_compress.checkpoint.formats.safetensors_files import SafetensorsSlice
from cqr_compress.checkpoint.formats.word_vectors import HeldTensor, vectors_checkpoint
from cqr_compress.errors import CheckpointError, brief

_FREE_BYTES, _MAX_EXPANSION = 2**30, 200
"""Decompressed bytes per stored byte beyond the first GiB: of a damaged or hostile archive."""
_ERRORS = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, OSError, EOFError, ValueError, TypeError,
    LookupError, NotImplementedError, MemoryError, RecursionError, RuntimeError,
)  # fmt: skip
_LOCAL_HEADER = 30


def open_numpy_archive(path: Path) -> Checkpoint:
    """Open an archive of arrays; nothing in it is executed.

    A matrix alone, or with as many words in another array, is word vectors. In other archives each numeric array
    is a tensor with its name, and other arrays are left out.

    Raises:
        CheckpointError: a damaged archive, or one without numbers.
    """
    where = repr(str(path))
    source = SourceFile(path)
    try:
        try:
            with zipfile.ZipFile(path) as archive:
                arrays, texts = _read(archive, source)
        except _ERRORS as e:
            raise CheckpointError(f"{where} is no archive of numpy that can be read: {brief(str(e))}") from e
        if not arrays:
            raise CheckpointError(f"{where} has no array of numbers")
        words = _words(arrays, texts)
        if words is not None:
            (rows,) = arrays.values()
            return vectors_checkpoint(path, "numpy", rows, words, source.close)
        return Checkpoint(path=path, format="numpy", entries=arrays, files=(path,), close_files=source.close)
    except BaseException:
        source.close()
        raise


def _read(
    archive: zipfile.ZipFile, source: SourceFile
) -> tuple[dict[str, TensorEntry], dict[str, NDArray[np.str_]]]:
    """Read the headers of all arrays, and the values of those that are compressed."""
    arrays: dict[str, TensorEntry] = {}
    texts: dict[str, NDArray[np.str_]] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy")
        if name in arrays or name in texts or name == info.filename:
            raise ValueError(f"it has {'two arrays' if name != info.filename else 'a file'} named {brief(name)}")
        if info.file_size > _FREE_BYTES + _MAX_EXPANSION * info.compress_size:
            raise ValueError(f"{brief(name)} would have {info.file_size} bytes, out of proportion to the archive")
        with archive.open(info) as file:
            shape, in_columns, dtype = _header(file)
            begin, nbytes = file.tell(), math.prod(shape) * dtype.itemsize
            if begin + nbytes != info.file_size:
                raise ValueError(f"{brief(name)} has not the bytes of an array {shape} {dtype}")
            if dtype.kind in "SU" and len(shape) == 1:
                texts[name] = np.frombuffer(file.read(nbytes), dtype).astype(np.str_)
            elif dtype.kind in "fiub" and hasattr(torch, dtype.newbyteorder("=").name):
                if info.compress_type == zipfile.ZIP_STORED and dtype.str[0] in "<|" and not in_columns:
                    offset = _data_offset(archive, info) + begin
                    stored: Any = SafetensorsSlice(source, offset, shape, getattr(torch, dtype.name))
                else:
                    values = np.frombuffer(file.read(nbytes), dtype).reshape(
                        shape, order="F" if in_columns else "C"
                    )
                    stored = HeldTensor(torch.from_numpy(values.astype(dtype.newbyteorder("="), order="C")))
                arrays[name] = TensorEntry(name, stored)
    return arrays, texts


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Read the header of an array: shape, whether columns come first, and dtype."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    if not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array has the shape {brief(shape)}")
    return shape, in_columns, dtype


def _data_offset(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Return the first byte of a member, behind its header in the archive."""
    assert archive.fp is not None
    archive.fp.seek(info.header_offset)
    name_bytes, extra_bytes = struct.unpack("<2H", archive.fp.read(_LOCAL_HEADER)[26:])
    return int(info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes)


def _words(arrays: dict[str, TensorEntry], texts: dict[str, NDArray[np.str_]]) -> list[bytes] | None:
    """Return the words of an archive of word vectors, numbers if it has none; None for other archives."""
    if len(arrays) != 1:
        return None
    (rows,) = arrays.values()
    if len(rows.shape) != 2 or not rows.dtype.is_floating_point or not min(rows.shape):
        return None
    for text in texts.values():
        if len(text) == rows.shape[0]:
            return [word.encode(errors="replace") for word in text.tolist()]
    return [str(i).encode() for i in range(rows.shape[0])]


def _is_archive(path: Path, head: bytes) -> bool:
    name_bytes = int.from_bytes(head[26:28], "little")
    return head.startswith(b"PK\3\4") and head[_LOCAL_HEADER : _LOCAL_HEADER + name_bytes].endswith(b".npy")


NUMPY_ARCHIVE = Format(suffixes=(), matches=_is_archive, open=open_numpy_archive)
