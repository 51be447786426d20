"""Bindings of the compiled search and lookup of trellis-coded rows on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cqr_compress.errors import ShapeError
from cqr_compress.kernel import ops
from cqr_compress.kernel.library import TrellisTable
from cqr_compress.table.trellis_spec import MAX_TIERS, TIER_BLOCK

_WRONG_RATES, _NO_MEMORY, _LOST_ROW = -2, -3, -4
_SEARCHES_PER_THREAD = 16
_SEARCH_BYTES = 2**30
"""Memory of the searches of all threads, if one thread needs no more."""


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
    status = ops.library().trellis_search(
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


class TrellisCodes(NamedTuple):
    """The codes of trellis-coded rows, and what locates them.

    Attributes:
        codes: (N, row_nbytes) uint8; (n,) for several tiers.
        rates: (T, P) uint8.
        window: L, 4 to 16.
        tier_nbytes: bytes of a row of each tier.
        num_rows: N.
        row_tiers: (N / 4,) uint8, for several tiers.
        starts: (N / 128,) int32 or int64, for several tiers.
    """

    codes: Tensor
    rates: Tensor
    window: int
    tier_nbytes: tuple[int, ...]
    num_rows: int
    row_tiers: Tensor | None = None
    starts: Tensor | None = None

    def check(self) -> None:
        """Refuse tensors that do not belong to one table, without reading their values.

        Raises:
            ShapeError: the tensors do not form a table.
        """
        (T, P), N, row_tiers, starts = self.rates.shape, self.num_rows, self.row_tiers, self.starts
        if row_tiers is None or starts is None:
            located = T == 1 and self.codes.shape == (N, *self.tier_nbytes)
        else:
            located = 1 < T <= MAX_TIERS and self.codes.ndim == 1 and row_tiers.dtype == torch.uint8
            located &= row_tiers.shape == (-(-N // 4),) and row_tiers.is_contiguous()
            located &= starts.shape == (-(-N // TIER_BLOCK),) and starts.is_contiguous()
            located &= starts.dtype in (torch.int32, torch.int64)
        bytes_ = self.codes.dtype == self.rates.dtype == torch.uint8
        bytes_ &= self.codes.is_contiguous() and self.rates.is_contiguous()
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


class TrellisValues(NamedTuple):
    """What decodes the states of trellis-coded rows.

    Attributes:
        values: (2**window,) float32.
        scale: (T, P) float32, or float16 where `ops.has_half()`.
        mean: (D,) in the dtype of `scale`, or None.
        gain: (N,) uint8, or None.
        gain_range: (2,) in the dtype of `scale`, as in `table.trellis.gain_table`; None without `gain`.
        rotation: (P, D) float32, or None.
    """

    values: Tensor
    scale: Tensor
    mean: Tensor | None = None
    gain: Tensor | None = None
    gain_range: Tensor | None = None
    rotation: Tensor | None = None

    def fit(self, codes: TrellisCodes) -> bool:
        """Return whether the tensors belong to these codes."""
        (T, P), dtype = codes.rates.shape, self.scale.dtype
        D = P if self.rotation is None else self.rotation.shape[1]
        expected = (
            (self.values, torch.float32, (1 << codes.window,)),
            (self.scale, dtype, (T, P)),
            (self.mean, dtype, (D,)),
            (self.gain, torch.uint8, (codes.num_rows,)),
            (self.gain_range, dtype, (2,)),
            (self.rotation, torch.float32, (P, D)),
        )
        for tensor, its_dtype, shape in expected:
            if tensor is None:
                continue
            if tensor.shape != shape or tensor.dtype != its_dtype or not tensor.is_contiguous():
                return False
        return dtype in (torch.float16, torch.float32) and (self.gain is None) == (self.gain_range is None)


def trellis_lookup(ids: Tensor, codes: TrellisCodes, by: TrellisValues) -> Tensor | None:
    """Look up trellis-coded rows: gain * values[states] * scale, multiplied by the rotation, plus the mean.

    Args:
        ids: (B,) int32 or int64, contiguous, on the CPU.
        codes: the codes; contiguous.
        by: the values; contiguous.

    Returns:
        (B, D) float32, each row independent of the others; None if an id is outside [0, N).

    Raises:
        ShapeError: the tensors do not form a table; checked before any out-of-bounds read.
    """
    codes.check()
    if not by.fit(codes):
        raise codes.mismatch()
    D = codes.rates.shape[1] if by.rotation is None else by.rotation.shape[1]
    out = torch.empty(ids.shape[0], D, dtype=torch.float32, device="cpu")
    return _call(out, ids, codes, by)


def trellis_states(ids: Tensor, codes: TrellisCodes) -> Tensor | None:
    """Read the states of trellis-coded rows: (B, P) int32; arguments, errors and None as in `trellis_lookup`."""
    codes.check()
    out = torch.empty(ids.shape[0], codes.rates.shape[1], dtype=torch.int32, device="cpu")
    return _call(out, ids, codes, None)


def _call(out: Tensor, ids: Tensor, codes: TrellisCodes, by: TrellisValues | None) -> Tensor | None:
    """Write rows, or states without values, to `out`."""
    (T, P), (B, D), starts = codes.rates.shape, out.shape, codes.starts
    values, scale, mean, gain, gain_range, rotation = by or (None,) * 6
    table = TrellisTable(
        codes.num_rows, codes.codes.nbytes, P, D, T, codes.window,
        starts is not None and starts.dtype == torch.int64, scale is not None and scale.dtype == torch.float16,
        codes.tier_nbytes, codes.codes.data_ptr(), codes.rates.data_ptr(),
        *[0 if t is None else t.data_ptr() for t in (
            codes.row_tiers, starts, values, scale, mean, gain, gain_range, rotation,
        )],
    )  # fmt: skip
    bad = ops.library().trellis_lookup(
        out.data_ptr(), by is None, ids.data_ptr(), ids.dtype == torch.int64, B, table, ops.lookup_threads(B)
    )
    if bad in (_WRONG_RATES, _LOST_ROW):
        raise codes.mismatch()
    if bad == _NO_MEMORY:
        raise MemoryError(f"the positions of {P} dimensions")
    return out if bad < 0 else None
