"""What a compressed table is made of: frozen, sized in advance, and readable from the file's JSON.

A spec fixes every tensor of a table by name, shape and dtype, so the bytes are known before a row is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch

from cqr_compress.errors import SpecError
from cqr_compress.table.bitpack import packed_width

STORED, HASHED = "stored", "hashed"


QUOTIENT, REMAINDER, DIGIT = "quotient", "remainder", "digit"


CODE_SOURCES = (STORED, HASHED, QUOTIENT, REMAINDER, DIGIT)
FLOAT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as the spec does: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class TensorShape:
    """Shape and dtype of one stored tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """What every kind of compressed table has: its source's shape and dtype, and rows kept verbatim.

    Attributes:
        method: name of the method that made the table.
        num_embeddings: N, the rows of the source.
        embedding_dim: D, the columns of the source.
        dtype: dtype of the source, restored on export.
        num_kept_rows: rows stored verbatim, in the source's dtype.
        num_zero_rows: all-zero rows, stored as their ids alone.
    """

    kind: ClassVar[str]
    method: str
    num_embeddings: int
    embedding_dim: int
    dtype: str = "float32"
    num_kept_rows: int = 0
    num_zero_rows: int = 0

    def __post_init__(self) -> None:
        if self.num_embeddings < 1 or self.embedding_dim < 1:
            raise SpecError(f"a table of {self.num_embeddings} x {self.embedding_dim} has no values")
        if self.dtype not in FLOAT_DTYPES:
            raise SpecError(f"dtype {self.dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
        special = self.num_kept_rows + self.num_zero_rows
        if min(self.num_kept_rows, self.num_zero_rows) < 0 or special > self.num_embeddings:
            raise SpecError(f"{special} kept rows in a table of {self.num_embeddings}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the source."""
        return FLOAT_DTYPES[self.dtype]

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the source: N * D * itemsize."""
        return self.num_embeddings * self.embedding_dim * self.torch_dtype.itemsize

    def body_shapes(self) -> dict[str, TensorShape]:
        """Tensors of the method itself, without the kept rows."""
        raise NotImplementedError

    def tensor_shapes(self) -> dict[str, TensorShape]:
        """Every stored tensor of the table by its short name (`codes`, `codebooks`, ...)."""
        shapes = self.body_shapes()
        special = self.num_kept_rows + self.num_zero_rows
        if special:
            ids = torch.int32 if self.num_embeddings < 2**31 else torch.int64
            shapes["kept_ids"] = TensorShape((special,), ids)
            shapes["kept_rows"] = TensorShape((self.num_kept_rows, self.embedding_dim), self.torch_dtype)
        return shapes

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: codes, codebooks and everything else needed to read the table."""
        return sum(shape.nbytes for shape in self.tensor_shapes().values())

    @property
    def num_parameters(self) -> int:
        """Trainable scalars: floating-point values in the stored tensors."""
        shapes = self.tensor_shapes().values()
        return sum(math.prod(s.shape) for s in shapes if s.dtype.is_floating_point)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `spec_from_json` turns back into an equal spec."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class CodebookSpec(TableSpec):
    """row(i) = concat over columns of the sum over levels of codebooks[c, l][code(c, l, i)].

    Attributes:
        num_columns: C; each has sub_dim S = width // C dimensions.
        num_levels: L codewords are summed in each column.
        codebook_size: K codewords of each codebook; a power of two where codes are stored.
        code_sources: where the code of each level comes from, one of CODE_SOURCES per level.
        codebook_dtype: dtype of the codebooks and the rotation.
        rotation: "opq" or "pca" when a (width, D) matrix is on_matmul onto the decoded rows, else None.
        rank: dimensions that the columns make together, fewer than D, before the rotation; None for D.
        seed: seeds the hashes and the fit.
    """

    kind: ClassVar[str] = "codebook"
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
            raise SpecError("num_columns, num_levels and codebook_size are at least 1")
        if self.rank is not None and not (self.rotation and 1 <= self.rank < self.embedding_dim):
            raise SpecError(
                f"rank {self.rank} goes with a rotation, and is less than the {self.embedding_dim} dimensions"
            )
        if self.width % self.num_columns:
            divisors = [str(c) for c in range(1, self.width + 1) if self.width % c == 0]
            raise SpecError(
                f"cannot split rows of {self.width} into {self.num_columns} columns: "
                f"{self.width} is not divisible by {self.num_columns}. "
                f"Choose num_columns from {', '.join(divisors)}."
            )
        if len(self.code_sources) != self.num_levels or not set(self.code_sources) <= set(CODE_SOURCES):
            raise SpecError(f"code_sources {self.code_sources!r} do not name {self.num_levels} levels")
        if self.codebook_dtype not in FLOAT_DTYPES:
            raise SpecError(f"codebook_dtype {self.codebook_dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")
        if self.rotation not in (None, "opq", "pca"):
            raise SpecError(f"rotation {self.rotation!r} is neither 'opq' nor 'pca'")
        K = self.codebook_size
        if self.num_stored_levels and (K < 2 or K & (K - 1) or self.n_bits > 16):
            raise SpecError(f"codebook_size {K} is not a power of two from 2 to 65536")
        if QUOTIENT in self.code_sources and self.num_embeddings > self.codebook_size**2:
            raise SpecError(
                f"quotient and remainder of {self.codebook_size} name {self.codebook_size**2} rows, "
                f"fewer than the table's {self.num_embeddings}"
            )
        if DIGIT in self.code_sources and self.num_embeddings > self.codebook_size**self.num_columns:
            raise SpecError(
                f"{self.num_columns} digits of {self.codebook_size} name "
                f"{self.codebook_size**self.num_columns} rows, fewer than the table's {self.num_embeddings}"
            )

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
        """S = width // C."""
        return self.width // self.num_columns

    @property
    def num_stored_levels(self) -> int:
        """Levels whose codes take bytes."""
        return sum(source == STORED for source in self.code_sources)  # torch 2.6 compiles this, and not count()

    @property
    def codes_width(self) -> int:
        """Bytes of one row of packed codes."""
        return packed_width(self.num_columns * self.num_stored_levels, self.n_bits)

    def body_shapes(self) -> dict[str, TensorShape]:
        """`codes` (N, codes_width), `codebooks` (C, L, K, S) and `rotation` (width, D)."""
        shapes = {}
        if self.num_stored_levels:
            shapes["codes"] = TensorShape((self.num_embeddings, self.codes_width), torch.uint8)
        dtype = FLOAT_DTYPES[self.codebook_dtype]
        shapes["codebooks"] = TensorShape(
            (self.num_columns, self.num_levels, self.codebook_size, self.sub_dim), dtype
        )
        if self.rotation:
            shapes["rotation"] = TensorShape((self.width, self.embedding_dim), dtype)
        return shapes

    @property
    def work_width(self) -> int:
        """Float32 values that decoding one row takes, codes included."""
        return self.embedding_dim + 4 * self.num_columns * self.num_levels

    @property
    def layout(self) -> str:
        """The layout in short: columns x levels x bits, or the codewords where codes are hashed."""
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
    """row(i) = row_offset[i] + row_scale[i] * codes[i]: integers with a scale and a zero point per row.

    Attributes:
        n_bits: 8 or 4 bits for each value.
        scale_dtype: dtype of `row_scale` and `row_offset`.
    """

    kind: ClassVar[str] = "rowwise"
    n_bits: int
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_bits not in (4, 8):
            raise SpecError(f"row-wise integers take 4 or 8 bits, not {self.n_bits}")
        if self.scale_dtype not in FLOAT_DTYPES:
            raise SpecError(f"scale_dtype {self.scale_dtype!r} is not one of {', '.join(FLOAT_DTYPES)}")

    def body_shapes(self) -> dict[str, TensorShape]:
        """`codes` (N, ceil(D * n_bits / 8)), `row_scale` (N,) and `row_offset` (N,)."""
        N, dtype = self.num_embeddings, FLOAT_DTYPES[self.scale_dtype]
        return {
            "codes": TensorShape((N, packed_width(self.embedding_dim, self.n_bits)), torch.uint8),
            "row_scale": TensorShape((N,), dtype),
            "row_offset": TensorShape((N,), dtype),
        }

    @property
    def work_width(self) -> int:
        """Float32 values that decoding one row takes, codes included."""
        return 3 * self.embedding_dim

    @property
    def layout(self) -> str:
        """The layout in short."""
        return f"{self.n_bits}b per value"


_KINDS: dict[str, type[CodebookSpec] | type[RowwiseSpec]] = {
    spec.kind: spec for spec in (CodebookSpec, RowwiseSpec)
}


AnySpec = CodebookSpec | RowwiseSpec


def spec_from_json(values: Mapping[str, Any]) -> AnySpec:
    """Read a spec back from `TableSpec.to_json`.

    Raises:
        SpecError: an unknown kind, a field that is missing, unknown or of the wrong type, or values that
            contradict each other.
    """
    if not isinstance(values, Mapping):
        raise SpecError(f"a spec is a JSON object, not {values!r}")
    cls = _KINDS.get(str(values.get("kind")))
    if cls is None:
        raise SpecError(f"kind {values.get('kind')!r} is not one of {', '.join(_KINDS)}")
    known = {f.name: f for f in fields(cls)}
    given = {name: value for name, value in values.items() if name != "kind"}
    if unknown := sorted(set(given) - set(known)):
        raise SpecError(f"a {cls.kind} spec has no field {', '.join(unknown)}")
    for name, value in given.items():
        annotation = str(known[name].type)
        optional = annotation == "int | None" and value is None
        if "int" in annotation and not optional and (not isinstance(value, int) or isinstance(value, bool)):
            raise SpecError(f"field {name} is {value!r}, not an integer")
        if annotation == "str" and not isinstance(value, str):
            raise SpecError(f"field {name} is {value!r}, not a string")
    if isinstance(given.get("code_sources"), list):
        given["code_sources"] = tuple(given["code_sources"])
    try:
        return cls(**given)
    except TypeError as e:
        raise SpecError(f"a {cls.kind} spec cannot be made of {given!r}: {e}") from e
