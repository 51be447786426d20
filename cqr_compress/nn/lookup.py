"""Lookups by compiled kernels, on the CPU or a GPU, where they support a table."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cqr_compress.kernel import gpu
from cqr_compress.nn.autograd import lookup_cpu
from cqr_compress.table.decode import decode_rows, gather_rows, rotated, with_exact_rows
from cqr_compress.table.spec import AnySpec, TrellisSpec
from cqr_compress.table.tiers import tiers_of
from cqr_compress.table.tracing import is_intercepted, is_tracing
from cqr_compress.table.trellis import value_table, values_of_states


def lookup_compiled(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """Compute rows with a compiled kernel, in eager mode, if one supports the tensors.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name, with all rows.
        ids: (B,) ids.

    Returns:
        (B, D) float32, without exact rows, differentiable; None if torch operations have to be used, also for an
        id outside a table on the CPU, for which they raise the error. On a GPU such an id is a device-side assert.
    """
    if type(ids) is not Tensor or ids.dtype not in (torch.int32, torch.int64) or is_tracing() or is_intercepted():
        return None
    ids = ids.contiguous()
    return _lookup_gpu(spec, tensors, ids) if ids.is_cuda else lookup_cpu(spec, tensors, ids)


def unrotated_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Decode rows before rotation and mean, and without rows that are stored apart: (B, width) float32 or float64.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name, with all rows.
        ids: (B,) int32 or int64 in [0, N).
    """
    centered = {short: t for short, t in tensors.items() if short not in ("row_mean", "rotation")}
    rows = lookup_compiled(spec, centered, ids)
    return decode_rows(spec, gather_rows(spec, centered, ids), ids) if rows is None else rows


def replace_exact_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, rows: Tensor) -> Tensor:
    """Replace rows from `lookup_compiled` by exact and zero rows; see `table.decode.with_exact_rows`."""
    if "kept_ids" not in tensors:
        return rows
    if not rows.is_cuda or _trains(tensors):
        return with_exact_rows(spec, tensors, ids, rows)
    gpu.write_exact_rows(spec, tensors, ids.contiguous(), rows)
    return rows


def _lookup_gpu(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """Compute rows on a GPU; arguments and result as in `lookup_compiled`."""
    trains = _trains(tensors)
    if trains and not isinstance(spec, TrellisSpec):
        return None  # gradients of codebooks are those of torch's operations
    if not gpu.supports(spec, tensors, ids) or not gpu.available(ids.device):
        return None
    if not isinstance(spec, TrellisSpec):
        return rotated(tensors, gpu.lookup(spec, tensors, ids))
    if not trains:
        rows = gpu.lookup(spec, tensors, ids, value_table(spec, tensors))
        return rows if spec.rotation is None else rotated(tensors, rows)  # without a rotation, it added the mean
    gain, states = tensors.get("row_gain"), gpu.trellis_states(spec, tensors, ids)
    tiers = tiers_of(tensors, ids) if spec.has_tiers else None
    gain = None if gain is None else gain.index_select(0, ids)
    return rotated(tensors, values_of_states(spec, tensors, states, gain, tiers))


def _trains(tensors: Mapping[str, Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
