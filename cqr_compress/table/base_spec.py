"""Base class of the specs of compressed tables: immutable, serialized as JSON in the file's header.

A spec determines the name, shape and dtype of every tensor of a table, so its size is known before a row is read.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch

from cqr_compress.errors import SpecError, brief

_MAX_SIZE = 2**48
FLOAT_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
CODEBOOK_DTYPES = {**FLOAT_DTYPES, "int8": torch.float32}
"""Dtypes in memory of codebooks, by their dtype in a file."""


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a spec: `float32`, not `torch.float32`."""
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
    """Base class of specs: the source's shape and dtype, and the rows stored apart.

    Attributes:
        method: name of the method that fitted the table.
        num_embeddings: N, number of rows of the source.
        embedding_dim: D, dimensions of a row of the source.
        dtype: dtype of the source, restored on export.
        num_kept_rows: number of exact rows, stored verbatim in the source's dtype.
        num_zero_rows: number of all-zero rows, of which only the ids are stored.
    """

    kind: ClassVar[str]
    dtype_sources: ClassVar[dict[str, str]]
    """Fields with the dtype of stored tensors, and a tensor that has it: `codebook_dtype` and `codebooks`."""
    method: str
    num_embeddings: int
    embedding_dim: int
    dtype: str = "float32"
    num_kept_rows: int = 0
    num_zero_rows: int = 0

    def __post_init__(self) -> None:
        if self.num_embeddings < 1 or self.embedding_dim < 1:
            raise SpecError(f"a table of {self.num_embeddings} x {self.embedding_dim} is empty")
        if self.num_embeddings * self.embedding_dim > _MAX_SIZE:
            rows, columns = brief(self.num_embeddings), brief(self.embedding_dim)
            raise SpecError(f"a table of {rows} x {columns} has more than 2^48 values")
        if self.dtype not in FLOAT_DTYPES:
            raise SpecError(f"dtype {brief(self.dtype)} is not one of {', '.join(FLOAT_DTYPES)}")
        special = self.num_kept_rows + self.num_zero_rows
        if min(self.num_kept_rows, self.num_zero_rows) < 0 or special > self.num_embeddings:
            raise SpecError(
                f"{self.num_kept_rows} exact and {self.num_zero_rows} zero rows do not fit a table of "
                f"{self.num_embeddings} rows"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """Dtype of the source."""
        return FLOAT_DTYPES[self.dtype]

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the source: N * D * itemsize."""
        return self.num_embeddings * self.embedding_dim * self.torch_dtype.itemsize

    def body_shapes(self) -> dict[str, TensorShape]:
        """Return the tensors of the method, without the rows stored apart."""
        raise NotImplementedError

    def tensor_shapes(self) -> dict[str, TensorShape]:
        """Return all tensors of the table in memory, by short name (`codes`, `codebooks`, ...)."""
        shapes = self.body_shapes()
        special = self.num_kept_rows + self.num_zero_rows
        if special:
            ids = torch.int32 if self.num_embeddings < 2**31 else torch.int64
            shapes["kept_ids"] = TensorShape((special,), ids)
            shapes["kept_rows"] = TensorShape((self.num_kept_rows, self.embedding_dim), self.torch_dtype)
        return shapes

    def file_shapes(self) -> dict[str, TensorShape]:
        """Return the tensors of the table as a file has them, see `file_form`."""
        return self.tensor_shapes()

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: codes, codebooks and everything else needed to decode the table."""
        return sum(shape.nbytes for shape in self.file_shapes().values())

    @property
    def num_parameters(self) -> int:
        """Number of parameters: floating-point values in the stored tensors."""
        shapes = self.tensor_shapes().values()
        return sum(math.prod(s.shape) for s in shapes if s.dtype.is_floating_point)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object, from which `spec_from_json` restores an equal spec."""
        return {"kind": self.kind, **asdict(self)}
