"""Parts of an output: tensors whose shapes are known in advance, with functions that write their values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import TensorEntry, read_blocks
from cqr_compress.checkpoint.compressed_file import CompressedFile, stored_name, stored_shapes
from cqr_compress.errors import NonFiniteError
from cqr_compress.table.base_spec import TensorShape
from cqr_compress.table.blocks import BLOCK_BYTES
from cqr_compress.table.file_form import to_file
from cqr_compress.table.spec import AnySpec

Put = Callable[[str, Tensor], None]
"""Receives a stored name and values, which are appended to that tensor."""


@dataclass(frozen=True)
class Part:
    """A group of tensors of an output.

    Attributes:
        shapes: shapes by stored name.
        write: writes the values, in order for each tensor.
        check: verifies the finished file before it is renamed into place; raises VerificationError.
        shows_progress: whether `write` reports its own progress.
    """

    shapes: Mapping[str, TensorShape]
    write: Callable[[Put], None]
    check: Callable[[CompressedFile], None] = lambda opened: None
    shows_progress: bool = False


def copied_part(entry: TensorEntry, name: str | None = None, dtype: torch.dtype | None = None) -> Part:
    """Make a part that copies a tensor of another file block by block; under another name or dtype if given."""
    name, dtype = name or entry.name, dtype or entry.dtype

    def write(put: Put) -> None:
        for _, block in read_blocks(entry, BLOCK_BYTES):
            put(name, block if dtype == entry.dtype else _narrowed(name, block, dtype))

    return Part({name: TensorShape(entry.shape, dtype)}, write)


def tensor_part(name: str, tensor: Tensor, shape: TensorShape) -> Part:
    """Make a part that writes a tensor in memory, rounded to the dtype of `shape`; overflow is an error."""
    return Part({name: shape}, lambda put: put(name, _narrowed(name, tensor, shape.dtype)))


def trained_part(entry: TensorEntry, tensor: Tensor) -> Part:
    """Make a part that writes a model's tensor, or the file's tensor if equal in the model's dtype."""

    def write(put: Put) -> None:
        held = entry.stored.read()
        same = torch.equal(held.to(tensor.dtype), tensor.detach().cpu())
        put(entry.name, held if same else _narrowed(entry.name, tensor, entry.dtype))

    return Part({entry.name: TensorShape(entry.shape, entry.dtype)}, write)


def table_part(name: str, spec: AnySpec, tensors: Mapping[str, Tensor]) -> Part:
    """Make a part that writes a compressed table, whose tensors have the dtypes of the spec or wider ones."""

    def write(put: Put) -> None:
        held = to_file(spec, tensors)
        for short, shape in spec.file_shapes().items():
            stored = stored_name(name, short)
            put(stored, _narrowed(stored, held[short], shape.dtype))

    return Part(stored_shapes(name, spec), write)


def _narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if not bool(value.isfinite().all()) and bool(tensor.isfinite().all()):
        raise NonFiniteError(f"{name!r} has values outside the range of {dtype}: nothing was written")
    return value
