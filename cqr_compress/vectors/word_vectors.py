"""Word vectors: rows of a compressed table by the words that the file names."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from cqr_compress.errors import FormatError
from cqr_compress.vectors.subwords import Subwords
from cqr_compress.vectors.table_reader import TableReader

HEADER, TABLE, VOCABULARY, ABOUT = "cqr_compress", "vectors", "vocabulary", "word_vectors"
"""Keys of the metadata, and names of the tensors, of files of word vectors."""
_BLOCK_VALUES = 2**18
_MAX_WORD_BYTES = 256
"""Mean bytes of the words of a vocabulary, which zlib could make of few."""
Vector = NDArray[np.float32]


def load_vectors(path: str | Path) -> WordVectors:
    """Open the word vectors of a compressed file.

        vectors = cqr.load_vectors("small.safetensors")
        vectors["king"], vectors.most_similar("king", topn=10)

    Args:
        path: a file that `convert` made of word vectors.

    Raises:
        FormatError: not such a file, or a damaged one.
    """
    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            names = set(file.keys())
            if HEADER not in metadata or VOCABULARY not in names or ABOUT not in metadata:
                raise FormatError(
                    f"{str(path)!r} has no word vectors: give what `convert` made of a .txt, .bin or .npy file"
                )
            spec = json.loads(metadata[HEADER])["tables"][TABLE]["spec"]
            tensors = {
                name.removeprefix(f"{TABLE}."): file.get_tensor(name)
                for name in names
                if name.startswith(f"{TABLE}.")
            }
            table = TableReader(spec, tensors)
            limit = 2**24 + _MAX_WORD_BYTES * table.shape[0]
            text = zlib.decompressobj().decompress(file.get_tensor(VOCABULARY).tobytes(), limit).decode()
            words, about = text.split("\n")[:-1], json.loads(metadata[ABOUT])
            subwords = Subwords.of(about)
            if len(words) != about["words"] or len(words) + about.get("buckets", 0) > table.shape[0]:
                raise FormatError(f"it has {len(words)} words for {table.shape[0]} rows")
    except (
        SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError, zlib.error,
    ) as e:  # fmt: skip
        raise FormatError(f"{str(path)!r} has no readable word vectors: {e}") from e
    return WordVectors(words, table, subwords)


class WordVectors:
    """Words with vectors, which are decoded when they are asked for.

    Attributes:
        words: the words, in the order of the source.
        subwords: the rows of n-grams of letters that words consist of (fastText), or None.
    """

    def __init__(self, words: list[str], table: TableReader, subwords: Subwords | None = None) -> None:
        """Hold words and the table of their rows."""
        self.words, self.subwords, self._table = words, subwords, table

    @property
    def vector_size(self) -> int:
        """D, dimensions of a vector."""
        return self._table.shape[1]

    @cached_property
    def _ids(self) -> dict[str, int]:
        last = len(self.words) - 1
        return dict(zip(reversed(self.words), range(last, -1, -1), strict=True))  # the first of equal words

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        """Return whether a word has a vector: it is in the vocabulary, or consists of known n-grams."""
        return word in self._ids or (
            isinstance(word, str) and self.subwords is not None and bool(self.subwords.rows_of(word))
        )

    def __getitem__(self, words: str | Sequence[str]) -> Vector:
        """Return the vector (D,) of a word, or (n, D) of several.

        Raises:
            KeyError: a word that has none, or no word.
        """
        if isinstance(words, str) and self.subwords is None:
            id = self._ids.get(words)
            if id is not None:
                return self._table.row(id)
        found = self._vectors([words] if isinstance(words, str) else list(words))
        one: Vector = found[0]
        return one if isinstance(words, str) else found

    def _vectors(self, words: list[str]) -> Vector:
        if not words:
            raise KeyError("give at least one word")
        if self.subwords is None:
            try:
                ids = [self._ids[word] for word in words]
            except KeyError as e:
                raise KeyError(f"{e.args[0]!r} is not in the vocabulary") from None
            return self._table.rows(np.array(ids, np.int64))
        rows, owner = [], []
        for i, word in enumerate(words):
            mine = [self._ids[word]] if word in self._ids else []
            mine += self.subwords.rows_of(word)
            if not mine:
                raise KeyError(f"{word!r} is not in the vocabulary")
            rows += mine
            owner += [i] * len(mine)
        decoded = self._table.rows(np.array(rows, np.int64))
        if len(rows) == len(words):
            return decoded
        starts = np.searchsorted(owner, np.arange(len(words)))
        counts = np.bincount(np.array(owner), minlength=len(words)).astype(np.float32)
        sums: Vector = np.add.reduceat(decoded, starts, axis=0)
        return sums / counts[:, None]

    def all_vectors(self) -> Iterator[tuple[int, Vector]]:
        """Iterate over blocks of the vectors of all words: the first word's index, and (n, D)."""
        step = max(1, _BLOCK_VALUES // self.vector_size)
        for start in range(0, len(self.words), step):
            stop = min(start + step, len(self.words))
            if self.subwords is None:
                yield start, self._table.rows(np.arange(start, stop))
            else:
                yield start, self._vectors(self.words[start:stop])

    def most_similar(
        self, positive: str | Sequence[str], negative: str | Sequence[str] = (), topn: int = 10
    ) -> list[tuple[str, float]]:
        """Find the words of the largest cosine with the mean of unit vectors; those that are given are left out.

        Args:
            positive: a word, or several.
            negative: a word, or several, whose vectors are subtracted.
            topn: number of words.

        Returns:
            Words with their cosines, best first.

        Raises:
            KeyError: a word that has no vector, or no word.
        """
        positive = [positive] if isinstance(positive, str) else list(positive)
        negative = [negative] if isinstance(negative, str) else list(negative)
        total: Vector = _unit(self[positive]).sum(0, keepdims=True, dtype=np.float32)
        if negative:
            total -= _unit(self[negative]).sum(0, keepdims=True, dtype=np.float32)
        query = _unit(total)[0]
        cosines = np.concatenate([_unit(rows) @ query for _, rows in self.all_vectors()])
        given = [self._ids[word] for word in (*positive, *negative) if word in self._ids]
        cosines[given] = -np.inf
        topn = min(topn, len(cosines) - len(set(given)))
        best = np.argpartition(-cosines, topn - 1)[:topn] if topn > 0 else np.empty(0, np.int64)
        return [(self.words[i], float(cosines[i])) for i in best[np.argsort(-cosines[best], kind="stable")]]

    def similarity(self, a: str, b: str) -> float:
        """Return the cosine of two words."""
        return float(np.dot(*_unit(self[[a, b]])))

    def n_similarity(self, a: Sequence[str], b: Sequence[str]) -> float:
        """Return the cosine of the means of two lists of words."""
        means = np.stack([self[list(a)].mean(0), self[list(b)].mean(0)])
        return float(np.dot(*_unit(means)))


def _unit(rows: Vector) -> Vector:
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Vector = rows / np.maximum(length, np.finfo(np.float32).tiny)
    return unit
