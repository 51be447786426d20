"""The tensors of a table as a file stores them, where they differ from those in memory.

A file has codebooks of codebook_dtype "int8" as integers with a scale for each dimension of each level, and their
rotation, like that of a trellis, as integers whose rows are normalized. In memory they are floating-point tensors,
which can be trained. `from_file` and `to_file` are inverses for tensors that were read from a file.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cqr_compress.errors import NonFiniteError
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec

_LARGEST = 127


def to_file(spec: AnySpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert tensors of a table to those of a file; floating-point tensors keep their dtypes.

    Args:
        spec: the table's spec.
        tensors: some of `spec.tensor_shapes()`, with the rotation if the spec has one.

    Returns:
        The same of `spec.file_shapes()`.
    """
    made = dict(tensors)
    if not _differs(spec) or not _has_values(tensors):
        return made
    norm: Tensor | None = None
    if "rotation" in made:
        rotation = _wide(made["rotation"])
        norm = rotation.norm(dim=1)
        made["rotation"] = _integers(rotation, rotation.abs().amax(1, keepdim=True) / _LARGEST)
    if isinstance(spec, TrellisSpec):
        if norm is not None:
            made["dim_scale"] = _wide(made["dim_scale"]) * norm
    elif isinstance(spec, CodebookSpec):
        codebooks = _wide(made["codebooks"])  # (C, L, K, S)
        if norm is not None:
            codebooks = codebooks * norm.view(spec.num_columns, 1, 1, spec.sub_dim)
        scale = made["codebook_scale"] = codebooks.abs().amax(2) / _LARGEST
        made["codebooks"] = _integers(codebooks, scale[:, :, None])
    return made


def from_file(spec: AnySpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `to_file`: convert tensors of a file to those in memory.

    Args:
        spec: the table's spec.
        tensors: some of `spec.file_shapes()`.

    Returns:
        The same of `spec.tensor_shapes()`, in its dtypes.
    """
    made = dict(tensors)
    if _differs(spec) and _has_values(tensors):
        if "rotation" in made:
            rotation = made["rotation"].double()
            made["rotation"] = rotation / rotation.norm(dim=1, keepdim=True).clamp_min(1)
        if isinstance(spec, CodebookSpec):
            made["codebooks"] = made["codebooks"].float() * made.pop("codebook_scale").float()[:, :, None]
    shapes = spec.tensor_shapes()
    return {short: tensor.to(shapes[short].dtype) for short, tensor in made.items()}


def rounded(spec: AnySpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Round tensors of a table in memory to values that a file can hold; infinite on overflow."""
    shapes = spec.file_shapes()
    held = {short: tensor.detach().to(shapes[short].dtype) for short, tensor in to_file(spec, tensors).items()}
    return from_file(spec, held)


def as_in_file(spec: AnySpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Do the same as `rounded`.

    Raises:
        NonFiniteError: a value outside the range of its dtype in the file.
    """
    made = rounded(spec, tensors)
    for short, tensor in made.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"values of {short} are outside the range of {spec.file_shapes()[short].dtype}")
    return made


def _differs(spec: AnySpec) -> bool:
    if isinstance(spec, TrellisSpec):
        return spec.rotation is not None
    return isinstance(spec, CodebookSpec) and spec.codebook_dtype == "int8"


def _has_values(tensors: Mapping[str, Tensor]) -> bool:
    return "codebooks" in tensors or "dim_scale" in tensors


def _wide(tensor: Tensor) -> Tensor:
    detached = tensor.detach()
    return detached if detached.dtype == torch.float64 else detached.float()


def _integers(values: Tensor, scale: Tensor) -> Tensor:
    return (
        (values / scale.clamp_min(torch.finfo(values.dtype).tiny))
        .round()
        .clamp(-_LARGEST, _LARGEST)
        .to(torch.int8)
    )
