"""Bindings of the lookups in Triton, on NVIDIA GPUs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cqr_compress.errors import CqrCompressWarning, ShapeError
from cqr_compress.table.base_spec import TensorShape
from cqr_compress.table.hashing import hash_coefficients
from cqr_compress.table.spec import HASHED, STORED, AnySpec, CodebookSpec, TrellisSpec

_CAPABILITY = (7, 0)
"""Smallest compute capability that Triton compiles for."""
_VALUES_PER_PROGRAM = 512
_WARPS = 2
_MAX_DIM = 8192
"""A program holds all dimensions of a row."""


@functools.cache
def available(device: torch.device) -> bool:
    """Return whether Triton compiles and runs kernels on a device; tried once.

    Warns:
        CqrCompressWarning: it is installed and fails, such as without a C compiler for its launchers.
    """
    off = os.environ.get("CQR_COMPRESS_NATIVE", "1") == "0" or torch.version.cuda is None
    if off or torch.cuda.get_device_capability(device) < _CAPABILITY:
        return False
    try:
        ids = torch.zeros(1, dtype=torch.int64, device=device)
        codes = torch.ones(1, 1, dtype=torch.uint8, device=device)
        scale = torch.ones(1, dtype=torch.float32, device=device)
        rows = torch.empty(1, 1, dtype=torch.float32, device=device)
        _launch("integer_kernel", rows, ids, 1, codes, 1, scale, scale, N_BITS=8)
        return bool((rows == 2).item())
    except ImportError:
        return False
    except Exception as e:
        warnings.warn(
            f"lookups on {device} run in torch, slower: Triton fails with {type(e).__name__}: {str(e)[:500]}.",
            CqrCompressWarning,
            stacklevel=2,
        )
        return False


def supports(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> bool:
    """Return whether `lookup` supports a table: one in half or single precision, with the shapes of its spec."""
    if isinstance(spec, CodebookSpec):
        stored = spec.num_stored_levels
        known = spec.code_sources == (STORED,) * stored + (HASHED,) * (spec.num_levels - stored)
        if not known or spec.codebook_size >= 2**31:
            return False
    shapes = _body_shapes(spec)
    if spec.embedding_dim > _MAX_DIM:
        return False
    for short, shape in shapes.items():
        tensor = tensors.get(short)
        if tensor is None:
            continue  # the rotation and the mean may be left out
        if tensor.shape != shape.shape or tensor.device != ids.device or not tensor.is_contiguous():
            return False
        if shape.dtype.is_floating_point:
            if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
                return False
        elif tensor.dtype != shape.dtype:
            return False
    return shapes.keys() - tensors.keys() <= {"rotation", "row_mean"}


@functools.lru_cache(1024)
def _body_shapes(spec: AnySpec) -> dict[str, TensorShape]:
    return spec.body_shapes()


def lookup(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, values: Tensor | None = None) -> Tensor:
    """Look up rows before the rotation; with the mean, where the table has one and no rotation.

    Args:
        spec: a spec that `supports` accepts.
        tensors: `spec.body_shapes()` by name, contiguous, on the device of `ids`.
        ids: (B,) int32 or int64, contiguous; one outside [0, N) is a device-side assert.
        values: (2**window,) values of the states of a trellis.

    Returns:
        (B, width) float32.
    """
    codes = tensors.get("codes")
    if isinstance(spec, TrellisSpec):
        assert values is not None, "a trellis has values"
        return _trellis(spec, tensors, ids, values)
    if isinstance(spec, CodebookSpec):
        out = torch.empty(len(ids), spec.width, dtype=torch.float32, device=ids.device)
        bits, stored = spec.n_bits, spec.num_stored_levels
        code_bytes = 1 if bits in (1, 2, 4, 8) else 2 if bits <= 9 else 3
        hashed = stored < spec.num_levels
        _launch(
            "codebook_kernel", out, ids, spec.num_embeddings, codes, spec.codes_width, bits, spec.num_levels,
            stored, tensors["codebooks"], spec.codebook_size, spec.sub_dim,
            _coefficients(spec.seed, spec.num_columns * spec.num_levels, ids.device) if hashed else None,
            CODE_BYTES=code_bytes,
        )  # fmt: skip
        return out
    assert codes is not None, "integers are stored"
    out = torch.empty(len(ids), spec.embedding_dim, dtype=torch.float32, device=ids.device)
    scale, offset = tensors["row_scale"], tensors["row_offset"]
    _launch(
        "integer_kernel", out, ids, spec.num_embeddings, codes, codes.shape[1], scale, offset, N_BITS=spec.n_bits
    )
    return out


def trellis_states(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Read the states of trellis-coded rows: (B, P) int32; arguments as in `lookup`."""
    return _trellis(spec, tensors, ids, None)


def write_exact_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, rows: Tensor) -> None:
    """Replace decoded rows by the exact and zero rows of the table, in place.

    Args:
        spec: the table's spec.
        tensors: with `kept_ids`, and `kept_rows` if there are exact rows, contiguous.
        ids: (B,) int32 or int64, contiguous.
        rows: (B, D), contiguous.

    Raises:
        ShapeError: the tensors do not have the shapes of the spec.
    """
    kept, num_kept, num_zero = tensors["kept_ids"], spec.num_kept_rows, spec.num_zero_rows
    exact = tensors.get("kept_rows") if num_kept else None
    whole = num_kept == 0 or (
        exact is not None and exact.shape == (num_kept, rows.shape[1]) and exact.is_contiguous()
    )
    if not whole or kept.shape != (num_kept + num_zero,) or not kept.is_contiguous():
        raise ShapeError(
            f"kept_ids {tuple(kept.shape)} are not those of {num_kept} exact and {num_zero} zero rows"
        )
    _launch(
        "exact_kernel", rows, ids, spec.num_embeddings, kept, exact,
        num_kept, max(num_kept - 1, 0).bit_length(), num_zero, max(num_zero - 1, 0).bit_length(),
    )  # fmt: skip


def _trellis(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor, values: Tensor | None) -> Tensor:
    """Write rows, or states without values."""
    get, codes = tensors.get, tensors["codes"]
    dtype = torch.int32 if values is None else torch.float32
    out = torch.empty(len(ids), spec.width, dtype=dtype, device=ids.device)
    _launch(
        "trellis_kernel", out, ids, spec.num_embeddings, spec.window, codes, codes.numel(), tensors["dim_rates"],
        *(*spec.tier_nbytes, 0, 0, 0)[:4], get("row_tiers"), get("tier_starts"), values, tensors["dim_scale"],
        get("row_mean") if spec.rotation is None else None, get("row_gain"), get("gain_range"),
    )  # fmt: skip
    return out


def _launch(kernel: str, out: Tensor, ids: Tensor, num_rows: int, *args: Any, **constants: Any) -> None:
    """Run a kernel over the rows of `out` (B, P) that belong to ids (B,)."""
    B, dim = out.shape
    if B == 0:
        return
    block_dim = 1 << (dim - 1).bit_length()
    block_rows = max(1, _VALUES_PER_PROGRAM // block_dim)
    elsewhere = ids.is_cuda and torch.cuda.current_device() != ids.get_device()
    with torch.cuda.device(ids.device) if elsewhere else contextlib.nullcontext():
        _kernels()[kernel][(-(-B // block_rows),)](
            out, ids, B, num_rows, dim, *args, **constants, BLOCK_ROWS=block_rows, BLOCK_DIM=block_dim,
            num_warps=_WARPS, sanitize_overflow=False,
        )  # fmt: skip


@functools.cache
def _kernels() -> dict[str, Any]:
    return vars(importlib.import_module("cqr_compress.kernel.gpu_kernels"))


@functools.lru_cache(1024)
def _coefficients(seed: int, count: int, device: torch.device) -> Tensor:
    """Return the hash coefficients of all codebooks: (count, 3) int64."""
    return torch.tensor(hash_coefficients(seed, range(count)), dtype=torch.int64, device=device)
