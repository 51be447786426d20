"""Bindings of the compiled lookups for the CPU.

Another thread may change the ids during a call: each value that is used has been checked.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from cqr_compress.errors import RowIndexError, ShapeError
from cqr_compress.kernel.build import native
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.hashing import hash_coefficients
from cqr_compress.table.spec import HASHED, CodebookSpec

_LANES = 16
_ROWS_PER_THREAD = 256
"""Minimum number of rows for each thread."""


def lookup_codewords(ids: Tensor, codes: Tensor, codebooks: Tensor, num_rows: int, n_bits: int) -> Tensor | None:
    """Look up rows with the codebook formula for stored codes.

    Args:
        ids: (B,) int32 or int64, contiguous, on the CPU.
        codes: (N, width) uint8, contiguous.
        codebooks: (C, L, K, S) floating point, contiguous.
        num_rows: N.
        n_bits: bits of a code, log2 K; or 32 for int32 codes in [0, K), viewed as bytes.

    Returns:
        (B, C * S) float32; None if an id is outside [0, N).

    Raises:
        ShapeError: the tensors do not form a table of N rows; checked before any out-of-bounds read.
    """
    C, L, K, S = codebooks.shape
    B, (N, width) = ids.shape[0], codes.shape
    in_range = n_bits == 32 or 1 << n_bits == K
    if num_rows > N or 8 * width < C * L * n_bits or not in_range or codes.dtype != torch.uint8:
        raise ShapeError(
            f"codes {tuple(codes.shape)} {codes.dtype} and codebooks {tuple(codebooks.shape)} do not form a table "
            f"of {num_rows} rows with codes of {n_bits} bits"
        )
    values, is_half = _readable(codebooks)
    out = torch.empty(B, C * S, **CPU_FLOAT)
    bad = library().lookup_codewords(
        out.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, num_rows,
        codes.data_ptr(), codes.shape[1], values.data_ptr(), is_half, C, L, K, S, n_bits, lookup_threads(B),
    )  # fmt: skip
    return out if bad < 0 else None


def lookup_backward(
    grad_rows: Tensor, ids: Tensor, codes: Tensor, shape: tuple[int, int, int, int], n_bits: int
) -> Tensor:
    """Sum the gradients of looked-up rows into their codewords.

    Args:
        grad_rows: (B, D) float32, contiguous.
        ids: (B,) as in `lookup_codewords`.
        codes: (N, width) uint8.
        shape: (C, L, K, S).
        n_bits: bits of a code.

    Returns:
        (C, L, K, S) float32; independent of the number of threads.

    Raises:
        RowIndexError: an id is outside the codes: another thread changed the ids after the lookup.
        ShapeError: the tensors do not form a table; checked before any out-of-bounds read or write.
    """
    C, L, K, S = shape
    B = ids.shape[0]
    in_range = n_bits == 32 or 1 << n_bits == K
    if grad_rows.shape != (B, C * S) or grad_rows.dtype != torch.float32 or not in_range:
        raise ShapeError(
            f"gradients {tuple(grad_rows.shape)} {grad_rows.dtype} do not belong to codebooks {shape}"
        )
    if 8 * codes.shape[1] < C * L * n_bits or codes.dtype != torch.uint8:
        raise ShapeError(f"codes {tuple(codes.shape)} {codes.dtype} do not belong to codebooks {shape}")
    grad = torch.zeros(shape, **CPU_FLOAT)
    bad = library().lookup_backward(
        grad.data_ptr(), grad_rows.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, len(codes),
        codes.data_ptr(), codes.shape[1], C, L, K, S, n_bits, min(lookup_threads(B), C * L),
    )  # fmt: skip
    if bad >= 0:
        raise RowIndexError(
            f"position {bad} of the ids is outside the table of {len(codes)} rows: the ids were changed between "
            "forward and backward"
        )
    return grad


def all_codes(spec: CodebookSpec, ids: Tensor, codes: Tensor | None) -> Tensor | None:
    """Compute `table.row_codes` in one pass, for stored and hashed levels.

    Args:
        spec: spec whose code sources are STORED or HASHED.
        ids: (B,) int32 or int64, contiguous, on the CPU.
        codes: (N, codes_width) uint8, contiguous; None if no level is stored.

    Returns:
        (B, C * L) int32; None if an id is outside [0, N).

    Raises:
        ShapeError: the codes do not match the spec.
    """
    B, N, n = ids.shape[0], spec.num_embeddings, spec.num_columns * spec.num_levels
    if codes is not None and (codes.shape != (N, spec.codes_width) or codes.dtype != torch.uint8):
        raise ShapeError(f"codes are {tuple(codes.shape)} {codes.dtype}, not {(N, spec.codes_width)} torch.uint8")
    all_ = torch.empty(B, n, dtype=torch.int32, device="cpu")
    coefficients = _coefficients(spec.seed, spec.num_columns, spec.code_sources)
    bad = library().all_codes(
        all_.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, N,
        0 if codes is None else codes.data_ptr(), spec.codes_width, spec.n_bits,
        coefficients.data_ptr(), n, spec.codebook_size, lookup_threads(B),
    )  # fmt: skip
    return all_ if bad < 0 else None


@functools.lru_cache(1024)
def _coefficients(seed: int, num_columns: int, sources: tuple[str, ...]) -> Tensor:
    """Return the hash coefficients of each column and level, zeros for stored levels: (C * L, 3) int64."""
    all_ = torch.tensor(
        hash_coefficients(seed, range(num_columns * len(sources))), dtype=torch.int64, device="cpu"
    )
    is_hashed = torch.tensor([source == HASHED for source in sources], device="cpu").repeat(num_columns)
    return all_ * is_hashed[:, None]


def lookup_integers(
    ids: Tensor, codes: Tensor, scale: Tensor, offset: Tensor, num_rows: int, dim: int, n_bits: int
) -> Tensor | None:
    """Look up rows of integers with a scale and an offset per row.

    Args:
        ids: (B,) int32 or int64, contiguous, on the CPU.
        codes: (N, width) uint8, contiguous.
        scale: (N,) float16 or float32, contiguous.
        offset: (N,) of the same dtype.
        num_rows: N.
        dim: D.
        n_bits: 8 or 4.

    Returns:
        (B, D) float32; None if an id is outside [0, N).

    Raises:
        ShapeError: the tensors do not form a table of N rows.
    """
    B, (N, width) = ids.shape[0], codes.shape
    if min(N, len(scale), len(offset)) < num_rows or 8 * width < dim * n_bits or codes.dtype != torch.uint8:
        raise ShapeError(
            f"codes {tuple(codes.shape)} {codes.dtype}, scale {tuple(scale.shape)} and offset "
            f"{tuple(offset.shape)} do not form a table of {num_rows} x {dim}"
        )
    out = torch.empty(B, dim, **CPU_FLOAT)
    bad = library().lookup_integers(
        out.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, num_rows,
        codes.data_ptr(), codes.shape[1], scale.data_ptr(), offset.data_ptr(), scale.dtype == torch.float16,
        dim, n_bits, lookup_threads(B),
    )  # fmt: skip
    return out if bad < 0 else None


def nearest(rows: Tensor, centroids: Tensor) -> Tensor:
    """Find the centroid nearest to each row; faster than a matrix product for rows of few dimensions.

    Args:
        rows: (n, S) float32, contiguous, on the CPU.
        centroids: (K, S) float32.

    Returns:
        (n,) int32, the first of equally near centroids; each is independent of the other rows.

    Raises:
        ShapeError: other dtypes, or dimensions that differ; checked before any read.
    """
    n, S = rows.shape
    if rows.dtype != torch.float32 or not rows.is_contiguous() or centroids.shape[1] != S:
        raise ShapeError(
            f"rows {tuple(rows.shape)} {rows.dtype} and centroids {tuple(centroids.shape)} are not contiguous "
            "float32 of equal dimensions"
        )
    K = -(-len(centroids) // _LANES) * _LANES
    columns = torch.zeros(S, K, **CPU_FLOAT)
    columns[:, : len(centroids)] = centroids.T
    halves = torch.full((K,), torch.inf, **CPU_FLOAT)
    halves[: len(centroids)] = centroids.square().sum(1) / 2
    codes = torch.empty(n, dtype=torch.int32, device="cpu")
    library().nearest(
        codes.data_ptr(), rows.data_ptr(), n, columns.data_ptr(), halves.data_ptr(), K, S, lookup_threads(n)
    )
    return codes


@functools.cache
def available() -> bool:
    """Return whether the compiled library is available."""
    return native().library is not None


@functools.cache
def has_half() -> bool:
    """Return whether the library reads float16 without conversion."""
    return bool(ctypes.c_int.in_dll(library(), "has_half").value)


def _readable(codebooks: Tensor) -> tuple[Tensor, bool]:
    """Return the codebooks in a dtype that the library reads, and whether that is float16."""
    is_half = codebooks.dtype == torch.float16 and has_half()
    return (codebooks, True) if is_half else (codebooks.float(), False)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled library; callers check `available()` first."""
    library = native().library
    assert library is not None, "callers check available() first"
    return library


def lookup_threads(rows: int) -> int:
    """Return the number of threads of a lookup."""
    return 1 if rows < 2 * _ROWS_PER_THREAD else min(torch.get_num_threads(), rows // _ROWS_PER_THREAD)
