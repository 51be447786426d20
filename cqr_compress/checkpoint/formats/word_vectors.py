"""Files of word vectors: text of word2vec, GloVe and fastText, their binary forms, and arrays of numpy.

Each is a checkpoint of a table `vectors` and the words, compressed, in `vocabulary`. Nothing in them is executed.
"""

from __future__ import annotations

import codecs
import json
import re
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, Format, TensorEntry
from cqr_compress.checkpoint.formats.budget import Budget, Meter
from cqr_compress.checkpoint.formats.mapped_storage import LazyStorage, SourceFile, lies_in
from cqr_compress.checkpoint.formats.safe_pickle import Placeholder, load_structure
from cqr_compress.checkpoint.formats.safetensors_files import SafetensorsSlice
from cqr_compress.errors import CheckpointError, brief

TABLE, VOCABULARY, ABOUT = "vectors", "vocabulary", "word_vectors"
_IN_MEMORY = 2**30
"""Values of more bytes are kept in a temporary file."""
_FASTTEXT_MAGIC, _FASTTEXT_VERSION = 793712314, 12
_MAX_WORD_BYTES, _MAX_NUMBER_BYTES = 2**16, 2**10
_FLOATS = {"<f2": torch.float16, "<f4": torch.float32, "<f8": torch.float64}
_COUNTS = re.compile(rb"(\d{1,12})[ \t](\d{1,6})[ \t]*\r?\n")
_NUMBER = rb"[ \t]-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_ROW = re.compile(rb"\S+(" + _NUMBER + rb"){2,}")


@dataclass(frozen=True)
class HeldTensor:
    """A `StoredTensor` over values that were read."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def read(self) -> Tensor:
        return self.values.clone()

    def read_rows(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].clone()


class _Rows:
    """Room for N x D float32 values, in memory or in a temporary file without a name."""

    def __init__(self, num_rows: int, dim: int, where: str) -> None:
        if min(num_rows, dim) < 1 or num_rows * dim >= 2**40:
            raise CheckpointError(
                f"{where} says that it has {num_rows} vectors of {dim} dimensions: it is damaged"
            )
        shape = num_rows, dim
        if 4 * num_rows * dim <= _IN_MEMORY:
            self.values: NDArray[np.float32] = np.empty(shape, np.float32)
        else:
            with tempfile.TemporaryFile() as file:
                self.values = np.memmap(file, np.float32, "w+", shape=shape)

    def entry(self) -> TensorEntry:
        return TensorEntry(TABLE, HeldTensor(torch.from_numpy(self.values)))


def vectors_checkpoint(
    path: Path,
    form: str,
    rows: TensorEntry,
    words: list[bytes],
    close: Callable[[], None] = lambda: None,
    **about: object,
) -> Checkpoint:
    """Make a checkpoint of word vectors.

    Args:
        path: the file.
        form: name of its format.
        rows: the vectors, (N, D).
        words: the words of the first rows, in UTF-8.
        close: closes the file.
        **about: more of the format.
    """
    rows = TensorEntry(TABLE, rows.stored)
    text = b"".join(word.replace(b"\n", b" ") + b"\n" for word in words)
    text = text.decode(errors="replace").encode()
    packed = torch.from_numpy(np.frombuffer(bytearray(zlib.compress(text, 9)), np.uint8))
    metadata = {ABOUT: json.dumps({"format": form, "words": len(words), **about})}
    entries = {TABLE: rows, VOCABULARY: TensorEntry(VOCABULARY, HeldTensor(packed))}
    return Checkpoint(path=path, format=form, entries=entries, files=(path,), metadata=metadata, close_files=close)


def _open_text(path: Path) -> Checkpoint:
    """Open lines of a word and its numbers; a first line may have the numbers of words and dimensions."""
    where = repr(str(path))
    with path.open("rb") as file:
        first = file.readline()
        counts = _COUNTS.fullmatch(first)
        if counts:
            num_rows, dim = int(counts[1]), int(counts[2])
            first = b""
        else:
            dim = len(first.split()) - 1
            num_rows = 1 + sum(1 for _ in _lines(file))
        if num_rows * dim * 2 > path.stat().st_size:
            raise CheckpointError(
                f"{where} is too short for {num_rows} vectors of {dim} dimensions: it is truncated"
            )
        rows = _Rows(num_rows, dim, where)
        words: list[bytes] = []
        file.seek(0 if first else len(counts[0]) if counts else 0)
        for number, line in enumerate(_lines(file)):
            word, row = _parsed(line, dim)
            if row is None or number == num_rows:
                place = f"line {number + 1 + bool(counts)} of {where}"
                raise CheckpointError(
                    f"{place} is no word with {dim} numbers: {brief(line[:60].decode(errors='replace'))}"
                )
            rows.values[number] = row
            words.append(word if words else word.removeprefix(codecs.BOM_UTF8))
    if len(words) != num_rows:
        raise CheckpointError(f"{where} has {len(words)} vectors, not {num_rows} as it says: it is truncated")
    return vectors_checkpoint(path, "word2vec text" if counts else "glove", rows.entry(), words)


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    for line in file:
        stripped = line.rstrip(b" \t\r\n")
        if stripped:
            yield stripped


def _parsed(line: bytes, dim: int) -> tuple[bytes, NDArray[np.float32] | None]:
    """Split a line into a word, which may contain spaces, and its numbers; None if they are others."""
    parts = line.replace(b"\t", b" ").rsplit(b" ", dim)
    if len(parts) != dim + 1 or max(map(len, parts[1:])) > _MAX_NUMBER_BYTES:
        return line, None
    try:
        return parts[0], np.array(parts[1:]).astype(np.float32)
    except ValueError:
        return line, None


def _open_binary(path: Path) -> Checkpoint:
    """Open the binary form of word2vec: counts, then words with a space and their float32 values."""
    where = repr(str(path))
    with path.open("rb") as file:
        counts = _COUNTS.fullmatch(file.readline())
        assert counts is not None, "the format matches"
        num_rows, dim = int(counts[1]), int(counts[2])
        if num_rows * (4 * dim + 2) > path.stat().st_size:
            raise CheckpointError(
                f"{where} is too short for {num_rows} vectors of {dim} dimensions: it is truncated"
            )
        rows, words = _Rows(num_rows, dim, where), []
        for number in range(num_rows):
            word = _until(file, b" ", where).lstrip(b"\n")
            rows.values[number] = np.frombuffer(_exactly(file, 4 * dim, where), "<f4")
            words.append(word)
    return vectors_checkpoint(path, "word2vec binary", rows.entry(), words)


def _until(file: IO[bytes], end: bytes, where: str) -> bytes:
    """Read up to a byte, which is not returned."""
    word = bytearray()
    while (byte := file.read(1)) != end:
        if not byte or len(word) > _MAX_WORD_BYTES:
            raise CheckpointError(f"{where} ends within a word, or is damaged")
        word += byte
    return bytes(word)


def _exactly(file: IO[bytes], nbytes: int, where: str) -> bytes:
    content = file.read(nbytes)
    if len(content) != nbytes:
        raise CheckpointError(f"{where} is truncated: {nbytes} bytes are required, but {len(content)} are left")
    return content


def _open_fasttext(path: Path) -> Checkpoint:
    """Open a model of fastText, of which the rows of words and n-grams are read.

    The form is that of `saveModel` of the fastText library, version 12.
    """
    where = repr(str(path))

    def numbers(file: IO[bytes], dtype: str, count: int) -> list[int]:
        return np.frombuffer(_exactly(file, np.dtype(dtype).itemsize * count, where), dtype).tolist()  # type: ignore

    with path.open("rb") as file:
        magic, version = numbers(file, "<i4", 2)
        if magic != _FASTTEXT_MAGIC or version != _FASTTEXT_VERSION:
            raise CheckpointError(f"{where} is a fastText model of version {version}, not {_FASTTEXT_VERSION}")
        dim, _, _, _, _, _, _, _, buckets, minn, maxn, _ = numbers(file, "<i4", 12)
        numbers(file, "<f8", 1)
        num_entries, num_words, num_labels = numbers(file, "<i4", 3)
        _, num_pruned = numbers(file, "<i8", 2)
        if not 0 <= num_words <= num_entries <= path.stat().st_size // 10 or num_labels < 0:
            raise CheckpointError(f"{where} says that it has {num_entries} words: it is damaged")
        words = []
        for _ in range(num_entries):
            word = _until(file, b"\0", where)
            _exactly(file, 9, where)
            words.append(word)
        (is_quantized,) = _exactly(file, 1, where) if num_pruned <= 0 else b"\1"
        if is_quantized:
            raise CheckpointError(f"{where} is a quantized model of fastText: give the one it was made of")
        num_rows, columns = numbers(file, "<i8", 2)
        if columns != dim or num_rows * dim * 4 > path.stat().st_size or num_rows < num_words:
            raise CheckpointError(f"{where} has {num_rows} rows of {columns} dimensions, not {dim}: it is damaged")
        rows = _Rows(num_rows, dim, where)
        step = max(1, 2**22 // dim)
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            block = np.frombuffer(_exactly(file, 4 * dim * (stop - start), where), "<f4")
            rows.values[start:stop] = block.reshape(stop - start, dim)
    buckets = num_rows - num_words if maxn > 0 else 0
    return vectors_checkpoint(
        path, "fasttext", rows.entry(), words[:num_words], buckets=buckets, minn=minn, maxn=maxn
    )


def _open_gensim(path: Path) -> Checkpoint:
    """Open KeyedVectors, or a model with them, that gensim has saved: a pickle, which is not executed.

    Large arrays are in files next to it, as `.vectors.npy`.
    """
    where = repr(str(path))
    with path.open("rb") as file:
        meter = Meter(Budget.for_file(path.stat().st_size), str(path))
        root = load_structure(file, _refuse_storage, meter)
    held = _contents(root)
    prefix = ""
    if "wv" in held:
        held, prefix = _contents(held["wv"]), "wv."
    words = held.get("index_to_key") or held.get("index2word")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{where} has no list of words: it is no KeyedVectors of gensim")
    values, beside = _array(held.get("vectors")), path.with_name(f"{path.name}.{prefix}vectors.npy")
    encoded = [word.encode(errors="replace") for word in words]
    if values is None and beside.is_file():
        if not lies_in(beside, path.parent):
            raise CheckpointError(f"{str(beside)!r} is a link out of its folder: copy the file if you trust it")
        opened = _open_numpy(beside)
        rows = opened.entries[TABLE]
        checkpoint = vectors_checkpoint(path, "gensim", rows, encoded)
        checkpoint = replace(checkpoint, files=(path, beside), close_files=opened.close_files)
    elif values is not None:
        rows = TensorEntry(TABLE, HeldTensor(torch.from_numpy(values)))
        checkpoint = vectors_checkpoint(path, "gensim", rows, encoded)
    else:
        raise CheckpointError(f"{where} has no vectors, and there is no {beside.name!r} next to it")
    if rows.shape[0] != len(words):
        checkpoint.close_files()
        raise CheckpointError(f"{where} has {rows.shape[0]} vectors for {len(words)} words: it is damaged")
    return checkpoint


def _contents(value: object) -> dict[object, object]:
    return value.contents if isinstance(value, Placeholder) else {}


def _array(value: object) -> NDArray[np.float32] | None:
    """Make an array of the state that numpy pickles (version, shape, dtype, order, bytes); None of another."""
    state = value.__dict__.get("_state") if isinstance(value, Placeholder) else None
    if not isinstance(state, tuple) or len(state) != 5:
        return None
    _, shape, dtype, in_columns, content = state
    held = dtype.__dict__ if isinstance(dtype, Placeholder) else {}
    kind, order = (_string(held.get(key), at) for key, at in (("_args", 0), ("_state", 1)))
    sizes = isinstance(shape, tuple) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if kind not in ("f2", "f4", "f8") or order not in ("<", ">") or not sizes or in_columns:
        return None
    if not isinstance(content, bytes) or len(content) != shape[0] * shape[1] * int(kind[1]):
        return None
    values: NDArray[np.float32] = np.frombuffer(content, order + kind).reshape(shape).astype(np.float32)
    return values


def _string(values: object, at: int) -> str:
    """Return the string at a place of a tuple; "" if there is none."""
    return values[at] if isinstance(values, tuple) and len(values) > at and isinstance(values[at], str) else ""


def _refuse_storage(pid: tuple[object, ...]) -> LazyStorage:
    raise CheckpointError("a file of gensim refers to a torch storage")


def _open_numpy(path: Path) -> Checkpoint:
    """Open a 2-D array of numpy; its words are the lines of a .words.txt or .txt file of the same name, if any."""
    where = repr(str(path))
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version[0] == 1 else np.lib.format.read_array_header_2_0
            shape, in_columns, dtype = read(file)
            offset = file.tell()
    except (ValueError, OSError, LookupError, TypeError, MemoryError, RecursionError, tokenize.TokenError) as e:
        raise CheckpointError(f"{where} is no array of numpy that can be read: {e}") from e
    sizes = len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
    if not sizes or in_columns or dtype.str not in _FLOATS:
        raise CheckpointError(f"{where} is an array {shape} {dtype}, not rows of floating-point numbers")
    if offset + shape[0] * shape[1] * dtype.itemsize != path.stat().st_size:
        raise CheckpointError(f"{where} has not the bytes of an array {shape} {dtype}: it is truncated or damaged")
    source = SourceFile(path)
    rows = TensorEntry(TABLE, SafetensorsSlice(source, offset, shape, _FLOATS[dtype.str]))
    words = [str(i).encode() for i in range(shape[0])]
    for names in (path.with_suffix(".words.txt"), path.with_suffix(".txt")):
        if names.is_file() and lies_in(names, path.parent):
            found = names.read_bytes().replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
            is_list = len(found) == shape[0] and not _ROW.match(found[0])  # else text of the same vectors
            words = found if is_list else words
            break
    return vectors_checkpoint(path, "numpy", rows, words, source.close)


def _is_text(path: Path, head: bytes) -> bool:
    line = head.partition(b"\n")[0] + b"\n"
    if path.suffix not in (".txt", ".vec", ".glove") or b"\0" in head:
        return False
    return bool(_COUNTS.fullmatch(line) or _ROW.match(head))


def _is_binary(path: Path, head: bytes) -> bool:
    return path.suffix == ".bin" and _COUNTS.match(head) is not None


WORD_VECTOR_FORMATS = (
    Format(suffixes=(), matches=_is_text, open=_open_text),
    Format(suffixes=(), matches=_is_binary, open=_open_binary),
    Format(
        suffixes=(),
        matches=lambda path, head: head.startswith(_FASTTEXT_MAGIC.to_bytes(4, "little")),
        open=_open_fasttext,
    ),
    Format(suffixes=(), matches=lambda path, head: head.startswith(b"\x93NUMPY"), open=_open_numpy),
)
GENSIM = Format(
    suffixes=(),
    matches=lambda path, head: head.startswith(b"\x80") and b"gensim.models" in head,
    open=_open_gensim,
)
