"""Rows of the n-grams of letters of a word (fastText: Bojanowski et al. 2017, arXiv:1607.04606, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cqr_compress.errors import FormatError

_END_OF_LINE = "</s>"


@dataclass(frozen=True)
class Subwords:
    """Which rows n-grams have: those after the words, by a hash.

    Attributes:
        num_words: number of words, which have the first rows.
        num_buckets: number of rows of n-grams.
        shortest: letters of the shortest n-grams.
        longest: letters of the longest ones.
    """

    num_words: int
    num_buckets: int
    shortest: int
    longest: int

    @classmethod
    def of(cls, about: Mapping[str, Any]) -> Subwords | None:
        """Restore it from what a file says of its word vectors; None without n-grams.

        Raises:
            FormatError: fields that are no integers.
        """
        if not about.get("buckets"):
            return None
        fields = [about[name] for name in ("words", "buckets", "minn", "maxn")]
        if not all(type(field) is int for field in fields) or min(fields[:2]) < 0:
            raise FormatError("its n-grams are not described by integers")
        return cls(*fields)

    def rows_of(self, word: str) -> list[int]:
        """Return the rows of the n-grams of a word, which is put in angle brackets first."""
        letters, rows = f"<{word}>", []
        if word == _END_OF_LINE:
            return []
        for start in range(len(letters)):
            for length in range(max(1, self.shortest), min(self.longest, len(letters) - start) + 1):
                part = letters[start : start + length]
                if not (length == 1 and start in (0, len(letters) - 1)):
                    rows.append(self.num_words + _hash(part.encode()) % self.num_buckets)
        return rows


def _hash(text: bytes) -> int:
    """FNV-1a of 32 bits, of signed bytes as fastText computes it."""
    value = 2166136261
    for byte in text:
        value = (value ^ (byte if byte < 128 else byte | 0xFFFFFF00)) * 16777619 & 0xFFFFFFFF
    return value
