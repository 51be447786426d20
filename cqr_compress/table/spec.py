"""Specs of tables of codebooks and of row-wise integers, and the specs of all kinds by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from cqr_compress.errors import SpecError, brief
from cqr_compress.table.base_spec import CODEBOOK_DTYPES, FLOAT_DTYPES, TableSpec, TensorShape
from cqr_compress.table.bitpack import packed_width
from cqr_compress.table.trellis_spec import TrellisSpec as TrellisSpec

_MAX_LEVELS = 256
_MAX_DIVISOR = 4096
STORED, HASHED = "stored", "hashed"


QUOTIENT, REMAINDER, DIGIT = "quotient", "remainder", "digit"


CODE_SOURCES = (STORED, HASHED, QUOTIENT, REMAINDER, DIGIT)


@dataclass(frozen=True, kw_only=True)
class CodebookSpec(TableSpec):
    """row(i) = concat over columns of the sum over levels of codebooks[c, l][code(c, l, i)].

    Attributes:
        num_columns: C columns, each of sub_dim S = width // C dimensions.
        num_levels: L codewords, which are summed in each column.
        codebook_size: K codewords in each codebook; a power of two if codes are stored.
        code_sources: source of the codes of each level, one of CODE_SOURCES per level.
        codebook_dtype: dtype of the codebooks and the rotation; "int8" in a file is float32 in memory.
        rotation: "opq" or "pca" if decoded rows are multiplied by a (width, D) matrix, else None.
        rank: dimensions of all columns together before the rotation, fewer than D; None for D.
        seed: seed of the hash functions and the fit.
    """

    kind: ClassVar[str] = "codebook"
    dtype_sources: ClassVar[dict[str, str]] = {"codebook_dtype": "codebooks"}
    num_columns: int
    num_levels: int
    codebook_size: int
    code_sources: tuple[str, ...]
    codebook_dtype: str = "float16"
    rotation: str | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.num_columns, self.num_levels, self.codebook_size) < 1:
            raise SpecError(
                f"num_columns is {self.num_columns}, num_levels {self.num_levels} and codebook_size "
                f"{self.codebook_size}: give at least 1"
            )
        if self.rank is not None and not (self.rotation and 1 <= self.rank < self.embedding_dim):
            raise SpecError(
                f"rank is {self.rank}: it requires a rotation, and has to be from 1 to {self.embedding_dim - 1}"
            )
        if self.width % self.num_columns:
            divisors = [str(c) for c in range(1, min(self.width, _MAX_DIVISOR) + 1) if self.width % c == 0]
            raise SpecError(
                f"cannot split rows of {self.width} into {self.num_columns} columns: "
                f"{self.width} is not divisible by {self.num_columns}. "
                f"Choose num_columns from {', '.join(divisors)}."
            )
        known = all(source in CODE_SOURCES for source in self.code_sources)
        if len(self.code_sources) != self.num_levels or not known or self.num_levels > _MAX_LEVELS:
            raise SpecError(
                f"code_sources is {', '.join(map(brief, self.code_sources[:8]))}: give one of "
                f"{', '.join(CODE_SOURCES)} for each of {self.num_levels} levels"
            )
        if self.codebook_dtype not in CODEBOOK_DTYPES:
            raise SpecError(
                f"codebook_dtype {brief(self.codebook_dtype)} is not one of {', '.join(CODEBOOK_DTYPES)}"
            )
        if self.rotation not in (None, "opq", "pca"):
            raise SpecError(f"rotation {brief(self.rotation)} is neither 'opq' nor 'pca'")
        K = self.codebook_size
        if self.num_stored_levels and (K < 2 or K & (K - 1) or self.n_bits > 16):
            raise SpecError(f"codebook_size {K} is not a power of two from 2 to 65536")
        if QUOTIENT in self.code_sources and self.num_embeddings > self.codebook_size**2:
            raise SpecError(
                f"quotient and remainder with codebook_size {self.codebook_size} distinguish "
                f"{self.codebook_size**2} rows, fewer than the table's {self.num_embeddings}"
            )
        if DIGIT in self.code_sources and self.num_embeddings > self._num_digit_codes():
            raise SpecError(
                f"{self.num_columns} digits with codebook_size {self.codebook_size} distinguish "
                f"{self._num_digit_codes()} rows, fewer than the table's {self.num_embeddings}"
            )

    def _num_digit_codes(self) -> int:
        """Return K**C, or any number of at least N where that is greater."""
        digits = math.ceil(math.log2(self.num_embeddings)) if self.codebook_size > 1 else 1
        return int(self.codebook_size ** min(self.num_columns, max(digits, 1)))

    @property
    def n_bits(self) -> int:
        """Bits of one stored code: ceil(log2 K), at least 1."""
        return max(1, (self.codebook_size - 1).bit_length())

    @property
    def width(self) -> int:
        """Dimensions of a row before the rotation: the rank, or D."""
        return self.embedding_dim if self.rank is None else self.rank

    @property
    def sub_dim(self) -> int:
        """Dimensions of a column: S = width // C."""
        return self.width // self.num_columns

    @property
    def num_stored_levels(self) -> int:
        """Number of levels whose codes are stored."""
        return sum(source == STORED for source in self.code_sources)  # torch 2.6 cannot compile count()

    @property
    def codes_width(self) -> int:
        """Bytes of one row of packed codes."""
        return packed_width(self.num_columns * self.num_stored_levels, self.n_bits)

    def body_shapes(self) -> dict[str, TensorShape]:
        """Return `codes` (N, codes_width), `codebooks` (C, L, K, S) and `rotation` (width, D), where present."""
        shapes = {}
        if self.num_stored_levels:
            shapes["codes"] = TensorShape((self.num_embeddings, self.codes_width), torch.uint8)
        dtype = CODEBOOK_DTYPES[self.codebook_dtype]
        shapes["codebooks"] = TensorShape(
            (self.num_columns, self.num_levels, self.codebook_size, self.sub_dim), dtype
        )
        if self.rotation:
            shapes["rotation"] = TensorShape((self.width, self.embedding_dim), dtype)
        return shapes

    def file_shapes(self) -> dict[str, TensorShape]:
        """Return the tensors of a file: int8 codebooks with a `codebook_scale` (C, L, S), and an int8 rotation."""
        shapes = self.tensor_shapes()
        if self.codebook_dtype == "int8":
            for short in {"codebooks", "rotation"} & shapes.keys():
                shapes[short] = TensorShape(shapes[short].shape, torch.int8)
            scale = self.num_columns, self.num_levels, self.sub_dim
            shapes["codebook_scale"] = TensorShape(scale, torch.float16)
        return shapes

    @property
    def work_width(self) -> int:
        """Memory for decoding one row, codes included, in float32 values."""
        return self.embedding_dim + 4 * self.num_columns * self.num_levels

    @property
    def layout(self) -> str:
        """Short form of the layout: columns x levels x bits; columns x levels and codewords for hashed codes."""
        if not self.num_stored_levels:
            return f"{self.num_columns}x{self.num_levels}, {self.codebook_size} codewords"
        rotated = f" {self.rotation}" if self.rotation else ""
        rotated += f" rank {self.rank}" if self.rank else ""
        if self.method == "cqr":
            helper = self.code_sources[1:] and self.code_sources[1]
            return f"{self.num_columns}x{self.n_bits}b{rotated}, {helper or 'no'} helper"
        levels = f"x{self.num_levels}" if self.num_levels > 1 else ""
        return f"{self.num_columns}{levels}x{self.n_bits}b{rotated}"


@dataclass(frozen=True, kw_only=True)
class RowwiseSpec(TableSpec):
    """row(i) = row_offset[i] + row_scale[i] * codes[i]: integers with a scale and an offset per row.

    Attributes:
        n_bits: bits of each value, 8 or 4.
        scale_dtype: dtype of `row_scale` and `row_offset`.
    """

    kind: ClassVar[str] = "rowwise"
    dtype_sources: ClassVar[dict[str, str]] = {"scale_dtype": "row_scale"}
    n_bits: int
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_bits not in (4, 8):
            raise SpecError(f"n_bits is {self.n_bits}: give 4 or 8 for row-wise integers")
        if self.scale_dtype not in FLOAT_DTYPES:
            raise SpecError(f"scale_dtype {brief(self.scale_dtype)} is not one of {', '.join(FLOAT_DTYPES)}")

    def body_shapes(self) -> dict[str, TensorShape]:
        """Return `codes` (N, ceil(D * n_bits / 8)), `row_scale` (N,) and `row_offset` (N,)."""
        N, dtype = self.num_embeddings, FLOAT_DTYPES[self.scale_dtype]
        return {
            "codes": TensorShape((N, packed_width(self.embedding_dim, self.n_bits)), torch.uint8),
            "row_scale": TensorShape((N,), dtype),
            "row_offset": TensorShape((N,), dtype),
        }

    @property
    def work_width(self) -> int:
        """Memory for decoding one row, codes included, in float32 values."""
        return 3 * self.embedding_dim

    @property
    def layout(self) -> str:
        """Short form of the layout: bits per value."""
        return f"{self.n_bits}b per value"


AnySpec = CodebookSpec | RowwiseSpec | TrellisSpec
_KINDS: dict[str, type[AnySpec]] = {spec.kind: spec for spec in (CodebookSpec, RowwiseSpec, TrellisSpec)}


def spec_from_json(values: Mapping[str, Any]) -> AnySpec:
    """Restore a spec from `TableSpec.to_json`.

    Raises:
        SpecError: an unknown kind, a missing or unknown field, a field of the wrong type, or inconsistent values.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"a spec is a JSON object, not {brief(values)}")
    kind = values.get("kind")
    cls = _KINDS.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise SpecError(f"kind {brief(values.get('kind'))} is not one of {', '.join(_KINDS)}")
    known = {f.name: f for f in fields(cls)}
    given = {name: value for name, value in values.items() if name != "kind"}
    if unknown := sorted(set(given) - set(known)):
        raise SpecError(f"a {cls.kind} spec has no field {', '.join(unknown[:5])[:200]}")
    for name, value in list(given.items()):
        annotation = str(known[name].type)
        optional = annotation == "int | None" and value is None
        if (
            annotation in ("int", "int | None")
            and not optional
            and (not isinstance(value, int) or isinstance(value, bool))
        ):
            raise SpecError(f"field {name} is {brief(value)}, not an integer")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise SpecError(f"field {name} is {brief(value)}, which 64 bits cannot hold")
        optional = annotation == "str | None" and value is None
        if annotation in ("str", "str | None") and not optional and not isinstance(value, str):
            raise SpecError(f"field {name} is {brief(value)}, not a string")
        if annotation == "tuple[str, ...]":
            if not isinstance(value, (list, tuple)) or not all(isinstance(part, str) for part in value):
                raise SpecError(f"field {name} is {brief(value)}, not a list of strings")
            given[name] = tuple(value)
        if annotation == "tuple[int, ...]":
            whole = isinstance(value, (list, tuple)) and all(type(part) is int and part < 2**63 for part in value)
            if not whole:
                raise SpecError(f"field {name} is {brief(value)}, not a list of integers")
            given[name] = tuple(value)
    try:
        return cls(**given)
    except TypeError as e:
        raise SpecError(f"a {cls.kind} spec cannot be made of these fields: {e}") from e
