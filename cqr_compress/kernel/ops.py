"""Bindings of the compiled lookups for the CPU.

Another thread may change the ids during a call: each value that is used has been checked.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.errors import RowIndexError, ShapeError
from cqr_compress.kernel.build import native
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.hashing import hash_coefficients
from cqr_compress.table.spec import HASHED, CodebookSpec
from cqr_compress.table.trellis_spec import MAX_TIERS, TIER_BLOCK

_LANES = 16
_WRONG_RATES, _NO_MEMORY, _LOST_ROW = -2, -3, -4
_SEARCHES_PER_THREAD = 16
_SEARCH_BYTES = 2**30
"""Memory of the searches of all threads, if one thread needs no more."""
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
    bad = _library().lookup_codewords(
        out.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, num_rows,
        codes.data_ptr(), codes.shape[1], values.data_ptr(), is_half, C, L, K, S, n_bits, _threads(B),
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
    bad = _library().lookup_backward(
        grad.data_ptr(), grad_rows.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, len(codes),
        codes.data_ptr(), codes.shape[1], C, L, K, S, n_bits, min(_threads(B), C * L),
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
    bad = _library().all_codes(
        all_.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, N,
        0 if codes is None else codes.data_ptr(), spec.codes_width, spec.n_bits,
        coefficients.data_ptr(), n, spec.codebook_size, _threads(B),
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
    bad = _library().lookup_integers(
        out.data_ptr(), ids.data_ptr(), ids.dtype == torch.int64, B, num_rows,
        codes.data_ptr(), codes.shape[1], scale.data_ptr(), offset.data_ptr(), scale.dtype == torch.float16,
        dim, n_bits, _threads(B),
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
    _library().nearest(
        codes.data_ptr(), rows.data_ptr(), n, columns.data_ptr(), halves.data_ptr(), K, S, _threads(n)
    )
    return codes


def trellis_search(
    rows: Tensor, weights: Tensor, rates: Tensor, window: int, values: Tensor, around: int
) -> tuple[Tensor, Tensor]:
    """Find the path of least weighted squared error for each row; see `quantize.trellis_search`.

    Args:
        rows: (n, P) float32, contiguous, on the CPU.
        weights: (P,) float32 weights of the dimensions' squared errors.
        rates: (P,) uint8, 1 to 8, with a sum of 8 * row_nbytes.
        window: L, 8 to 16: a state holds all bits that a dimension adds.
        values: (2**window,) float32.
        around: dimensions on each side of the seam of the ring that the state at the seam is chosen by.

    Returns:
        The states (n, P) int32 and the codes (n, row_nbytes) uint8; each row is independent of the others.

    Raises:
        ShapeError: tensors that do not belong together; checked before any read.
        MemoryError: no memory for the costs of P * 2**window states.
    """
    n, P = rows.shape
    row_nbytes = int(rates.sum()) // 8
    fits = weights.shape == rates.shape == (P,) and values.shape == (1 << window,) and 8 * row_nbytes >= window
    in_range = P > 0 and int(rates.min()) >= 1 and int(rates.max()) <= 8 and int(rates.sum()) % 8 == 0
    dtypes = {rows.dtype, weights.dtype, values.dtype} == {torch.float32} and rates.dtype == torch.uint8
    if not (fits and in_range and dtypes and 8 <= window <= 16 and rows.is_contiguous()):
        raise ShapeError(
            f"rows {tuple(rows.shape)} {rows.dtype}, rates {tuple(rates.shape)} of {int(rates.sum())} bits and "
            f"values {tuple(values.shape)} do not form a trellis with windows of {window} bits"
        )
    weights, rates, values = weights.contiguous(), rates.contiguous(), values.contiguous()
    states = torch.empty(n, P, dtype=torch.int32, device="cpu")
    codes = torch.empty(n, row_nbytes, dtype=torch.uint8, device="cpu")
    status = _library().trellis_search(
        states.data_ptr(), codes.data_ptr(), rows.data_ptr(), n, P, weights.data_ptr(), rates.data_ptr(),
        row_nbytes, window, values.data_ptr(), max(1, around), search_threads(n, P, window),
    )  # fmt: skip
    if status:
        raise MemoryError(f"the search of a trellis with {P} x {1 << window} states")
    return states, codes


def search_threads(num_rows: int, num_dims: int, window: int) -> int:
    """Return the number of threads of a search, each of which holds the costs of all states of all dimensions."""
    fitting = _SEARCH_BYTES // (4 * (num_dims + 2) << window)
    return max(1, min(torch.get_num_threads(), num_rows // _SEARCHES_PER_THREAD, fitting))


@dataclass(frozen=True)
class TrellisCodes:
    """The codes of trellis-coded rows, and what locates them.

    Attributes:
        codes: (N, row_nbytes) uint8, contiguous; (n,) for several tiers.
        rates: (T, P) uint8, contiguous.
        window: L, 4 to 16.
        tier_nbytes: bytes of a row of each tier.
        row_tiers: (N / 4,) uint8, contiguous, for several tiers.
        starts: (N / 128,) int32 or int64, contiguous, for several tiers.
    """

    codes: Tensor
    rates: Tensor
    window: int
    tier_nbytes: tuple[int, ...]
    row_tiers: Tensor | None = None
    starts: Tensor | None = None

    def check(self, num_rows: int) -> None:
        """Refuse tensors that do not belong to a table of `num_rows` rows, without reading their values.

        Raises:
            ShapeError: the tensors do not form a table.
        """
        T, P = self.rates.shape
        if self.row_tiers is None or self.starts is None:
            located = T == 1 and self.codes.shape == (num_rows, *self.tier_nbytes)
        else:
            located = 1 < T <= MAX_TIERS and self.codes.ndim == 1 and self.row_tiers.dtype == torch.uint8
            located &= self.row_tiers.shape == (-(-num_rows // 4),)
            located &= self.starts.shape == (-(-num_rows // TIER_BLOCK),)
            located &= self.starts.dtype in (torch.int32, torch.int64)
        tensors = [t for t in (self.codes, self.rates, self.row_tiers, self.starts) if t is not None]
        bytes_ = self.codes.dtype == self.rates.dtype == torch.uint8 and all(t.is_contiguous() for t in tensors)
        in_range = 4 <= self.window <= 16 and 1 <= min(self.tier_nbytes) <= max(self.tier_nbytes) <= P
        if not (located and bytes_ and in_range and len(self.tier_nbytes) == T):
            raise self.mismatch()

    def mismatch(self) -> ShapeError:
        """Return the error of tensors that do not form a table."""
        bits, codes = ", ".join(map(str, self.rates.sum(1).tolist())), self.codes
        return ShapeError(
            f"codes {tuple(codes.shape)} {codes.dtype} and rates {tuple(self.rates.shape)} of {bits} bits "
            f"do not form a table with windows of {self.window} bits"
        )


def trellis_lookup(
    ids: Tensor, table: TrellisCodes, values: Tensor, scale: Tensor, mean: Tensor | None, num_rows: int,
    gain: Tensor | None, gains: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """Look up trellis-coded rows, before a rotation: gain * values[states] * scale + mean.

    Args:
        ids: (B,) int32 or int64, contiguous, on the CPU.
        table: the codes.
        values: (2**window,) float32, contiguous.
        scale: (T, P) float32, contiguous.
        mean: (P,) float32, contiguous, or None.
        num_rows: N.
        gain: (N,) uint8, contiguous, or None.
        gains: (256,) float32, contiguous: the gains of the codes `gain`, or None.

    Returns:
        (B, P) float32; None if an id is outside [0, N).

    Raises:
        ShapeError: the tensors do not form a table; checked before any out-of-bounds read.
    """
    return _trellis(ids, table, num_rows, values, scale, mean, gain, gains)


def trellis_states(ids: Tensor, table: TrellisCodes, num_rows: int) -> Tensor | None:
    """Read the states of trellis-coded rows: (B, P) int32; arguments, errors and None as in `trellis_lookup`."""
    return _trellis(ids, table, num_rows, None, None, None, None, None)


def _trellis(
    ids: Tensor, table: TrellisCodes, N: int, values: Tensor | None, scale: Tensor | None, mean: Tensor | None,
    gain: Tensor | None, gains: Tensor | None,
) -> Tensor | None:  # fmt: skip
    table.check(N)
    (T, P), B = table.rates.shape, ids.shape[0]
    expected = (
        (values, (1 << table.window,)), (scale, (T, P)), (mean, (P,)), (gain, (N,)), (gains, (256,)),
    )  # fmt: skip
    fits = all(t is None or (t.shape == shape and t.is_contiguous()) for t, shape in expected)
    floats = all(t is None or t.dtype == torch.float32 for t in (values, scale, mean, gains))
    if not (fits and floats and (gain is None or gain.dtype == torch.uint8)):
        raise table.mismatch()
    is_states = values is None
    out = torch.empty(B, P, dtype=torch.int32 if is_states else torch.float32, device="cpu")
    row_tiers, starts = table.row_tiers, table.starts
    bad = _library().trellis_lookup(
        out.data_ptr() if is_states else 0, 0 if is_states else out.data_ptr(),
        ids.data_ptr(), ids.dtype == torch.int64, B, N, table.codes.data_ptr(), table.codes.nbytes, T,
        (ctypes.c_int64 * T)(*table.tier_nbytes), 0 if row_tiers is None else row_tiers.data_ptr(),
        0 if starts is None else starts.data_ptr(), starts is not None and starts.dtype == torch.int64,
        table.rates.data_ptr(), P, table.window,
        *(0 if t is None else t.data_ptr() for t in (values, scale, mean, gain, gains)), _threads(B),
    )  # fmt: skip
    if bad in (_WRONG_RATES, _LOST_ROW):
        raise table.mismatch()
    if bad == _NO_MEMORY:
        raise MemoryError(f"the positions of {P} dimensions")
    return out if bad < 0 else None


@functools.cache
def available() -> bool:
    """Return whether the compiled library is available."""
    return native().library is not None


@functools.cache
def has_half() -> bool:
    """Return whether the library reads float16 without conversion."""
    return bool(ctypes.c_int.in_dll(_library(), "has_half").value)


def _readable(codebooks: Tensor) -> tuple[Tensor, bool]:
    """Return the codebooks in a dtype that the library reads, and whether that is float16."""
    is_half = codebooks.dtype == torch.float16 and has_half()
    return (codebooks, True) if is_half else (codebooks.float(), False)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native().library
    assert library is not None, "callers check available() first"
    return library


def _threads(rows: int) -> int:
    return 1 if rows < 2 * _ROWS_PER_THREAD else min(torch.get_num_threads(), rows // _ROWS_PER_THREAD)
