"""The compiled lookup for the CPU, with its gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from cqr_compress.kernel import ops, trellis_ops
from cqr_compress.kernel.trellis_ops import TrellisCodes, TrellisValues
from cqr_compress.table.codes import row_codes
from cqr_compress.table.decode import rotated
from cqr_compress.table.spec import HASHED, STORED, AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.tiers import tiers_of
from cqr_compress.table.trellis import value_table, values_of_states

_FLOATS = (torch.float16, torch.float32)


def lookup_cpu(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """Compute rows with the compiled lookup, if it supports the tensors.

    It supports codebooks in float16 or float32.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name, with all rows.
        ids: (B,) int32 or int64, contiguous.

    Returns:
        (B, D) float32, without exact rows, differentiable; None if torch operations have to be used, also for an
        id outside the table, for which they raise the error.
    """
    if not ids.is_cpu:
        return None
    if isinstance(spec, TrellisSpec):
        return _trellis_rows(spec, tensors, ids)
    codes, N = tensors.get("codes"), spec.num_embeddings
    trains = torch.is_grad_enabled()
    if isinstance(spec, CodebookSpec):
        codebooks = tensors["codebooks"]
        if not _usable(codes, codebooks):
            return None
        n_bits = spec.n_bits
        if codes is None or spec.num_stored_levels != spec.num_levels:
            codes, N, n_bits = _computed(spec, codes, ids), len(ids), 32
            if codes is None:
                return None
            ids = torch.arange(N, device="cpu")
        if trains and codebooks.requires_grad:
            rows: Tensor | None = _CodebookRows.apply(codebooks, codes, ids, N, n_bits)  # type: ignore
        else:
            rows = ops.lookup_codewords(ids, codes, codebooks, N, n_bits)
        return None if rows is None else rotated(tensors, rows)
    assert codes is not None, "integers are stored"
    scale, offset = tensors["row_scale"], tensors["row_offset"]
    if trains and (scale.requires_grad or offset.requires_grad):
        return None
    if not _usable(codes, scale) or scale.dtype != offset.dtype or not offset.is_contiguous():
        return None
    if scale.dtype == torch.float16 and not ops.has_half():
        return None
    return ops.lookup_integers(ids, codes, scale, offset, N, spec.embedding_dim, spec.n_bits)


def _trellis_rows(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor | None:
    """Compute trellis-coded rows; arguments and result as in `lookup_cpu`."""
    scale, N, get = tensors["dim_scale"], spec.num_embeddings, tensors.get
    found = tensors["codes"], tensors["dim_rates"], spec.window, spec.tier_nbytes, N
    codes = TrellisCodes(*found, get("row_tiers"), get("tier_starts"))
    row_gain = get("row_gain")
    integers = (codes.codes, codes.rates, codes.row_tiers, codes.starts, row_gain)
    if not _usable(codes.codes, scale) or not all(t is None or (t.is_cpu and t.is_contiguous()) for t in integers):
        return None
    if not spec.has_tiers and len(codes.codes) != N:
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        states = trellis_ops.trellis_states(ids, codes)
        if states is None:
            return None
        row_gain = None if row_gain is None else row_gain.index_select(0, ids)
        tiers = tiers_of(tensors, ids) if spec.has_tiers else None
        return rotated(tensors, values_of_states(spec, tensors, states, row_gain, tiers))
    mean, gain_range, rotation = get("row_mean"), get("gain_range"), get("rotation")
    dtype = scale.dtype if scale.dtype == torch.float32 or ops.has_half() else torch.float32
    by = TrellisValues(
        value_table(spec, tensors),
        _in(dtype, scale),
        None if mean is None else _in(dtype, mean),
        row_gain,
        None if gain_range is None else _in(dtype, gain_range),
        None if rotation is None else _in(torch.float32, rotation),
    )
    return trellis_ops.trellis_lookup(ids, codes, by)


def _computed(spec: CodebookSpec, codes: Tensor | None, ids: Tensor) -> Tensor | None:
    """Return all codes of ids, including computed ones, as bytes of int32; None if an id is outside the table.

    Args:
        spec: the table's spec.
        codes: (N, codes_width) uint8, the stored levels; None if no level is stored.
        ids: (B,) contiguous.

    Returns:
        (B, 4 * C * L) uint8.
    """
    N = spec.num_embeddings
    if set(spec.code_sources) <= {STORED, HASHED} and spec.codebook_size < 2**31:
        found = ops.all_codes(spec, ids, codes)
        return None if found is None else found.view(torch.uint8)
    ids = ids.clone()  # another thread must not change them after the check
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= N):
        return None
    packed = None if codes is None else codes.index_select(0, ids)
    width = spec.num_columns * spec.num_levels
    return row_codes(spec, packed, ids).to(torch.int32).view(len(ids), width).view(torch.uint8)


class _CodebookRows(torch.autograd.Function):
    """The codebook formula for stored codes; gradients of the codebooks are accumulated in float32."""

    @staticmethod
    def forward(
        ctx: Any, codebooks: Tensor, codes: Tensor, ids: Tensor, num_rows: int, n_bits: int
    ) -> Tensor | None:
        """Look up rows (B, D)."""
        ctx.save_for_backward(codes, ids)
        ctx.shape, ctx.dtype, ctx.sizes = tuple(codebooks.shape), codebooks.dtype, (num_rows, n_bits)
        return ops.lookup_codewords(ids, codes, codebooks, num_rows, n_bits)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Sum the gradients of the rows that use each codeword."""
        codes, ids = ctx.saved_tensors
        grad: Tensor = _CodewordSums.apply(grad_rows, codes, ids, ctx.shape, *ctx.sizes)  # type: ignore
        return grad.to(ctx.dtype), None, None, None, None


class _CodewordSums(torch.autograd.Function):
    """The transpose of the lookup: add rows (B, D) to the codewords that they consist of."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, codes: Tensor, ids: Tensor, shape: tuple[int, int, int, int], N: int, n_bits: int
    ) -> Tensor:
        """Sum into (C, L, K, S) float32."""
        ctx.save_for_backward(codes, ids)
        ctx.dtype, ctx.sizes = rows.dtype, (N, n_bits)
        return ops.lookup_backward(rows.float().contiguous(), ids, codes, shape, n_bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        """Look up the gradients of the codewords: the lookup is linear."""
        codes, ids = ctx.saved_tensors
        rows: Tensor = _CodebookRows.apply(grad.contiguous(), codes, ids, *ctx.sizes)  # type: ignore
        return rows.to(ctx.dtype), None, None, None, None, None


def _in(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _usable(codes: Tensor | None, values: Tensor) -> bool:
    """Return whether the compiled lookup is available and supports these tensors."""
    return (
        ops.available()
        and type(values) in (Tensor, Parameter)
        and (codes is None or (codes.is_cpu and codes.is_contiguous()))
        and values.is_cpu
        and values.dtype in _FLOATS
        and values.is_contiguous()
    )
