"""Rows decoded by the compiled library of the wheel, without torch."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cqr_compress.kernel.library import TrellisTable, installed_libraries, load_library

Array = NDArray[Any]
Decode = Callable[[int, int, int], int]
"""Write rows of so many int64 ids, both at addresses; return -1, or the place of an id outside the table."""


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the library of the wheel without threads; None without one."""
    if os.environ.get("CQR_COMPRESS_NATIVE", "1") == "0":
        return None
    for path in installed_libraries(["-serial"]):
        try:
            return load_library(path)
        except (OSError, AttributeError):
            continue
    return None


class CompiledRows:
    """Decodes rows before the rotation of codebooks, which of other kinds is done.

    Attributes:
        width: dimensions of these rows.
    """

    def __init__(self, decode: Decode, width: int) -> None:
        """Hold what decodes rows; see `of`."""
        self._decode, self.width = decode, width
        self._row_type: Any = ctypes.c_float * width

    @classmethod
    def of(cls, spec: Mapping[str, Any], tensors: Mapping[str, Array]) -> CompiledRows | None:
        """Prepare the tensors of a table.

        Args:
            spec: the table's spec as in the header of the file.
            tensors: its checked tensors and no others, floating-point ones in float32 except `row_scale` and
                `row_offset`.

        Returns:
            None if there is no library, or it does not support the dtypes.
        """
        library = _library()
        if library is None or not all(tensor.flags.c_contiguous for tensor in tensors.values()):
            return None
        kind, N = spec["kind"], spec["num_embeddings"]
        addresses = {short: tensor.ctypes.data for short, tensor in tensors.items()}
        if kind == "codebook":
            return cls(
                _codebook(library, N, tensors, addresses),
                tensors["codebooks"].shape[0] * tensors["codebooks"].shape[3],
            )
        if kind == "trellis":
            if len(spec["tier_nbytes"]) > 1 and tensors["tier_starts"].dtype not in (np.int32, np.int64):
                return None
            return cls(_trellis(library, spec, tensors, addresses), spec["embedding_dim"])
        decode = _rowwise(library, spec, tensors, addresses)
        return None if decode is None else cls(decode, spec["embedding_dim"])

    def row(self, id: int) -> NDArray[np.float32]:
        """Decode one row: (width,)."""
        out, one = self._row_type(), ctypes.c_int64(id)  # the address of an array of numpy takes a microsecond
        if self._decode(ctypes.addressof(out), ctypes.addressof(one), 1) >= 0:
            raise IndexError(f"id {id} is outside the table")
        return np.frombuffer(out, np.float32)

    def rows(self, ids: Array) -> NDArray[np.float32]:
        """Decode rows: ids (B,) integers to (B, width)."""
        ids = np.ascontiguousarray(ids, np.int64)
        out = np.empty((len(ids), self.width), np.float32)
        bad = self._decode(out.ctypes.data, ids.ctypes.data, len(ids))
        if bad >= 0:
            raise IndexError(f"id {ids[bad]} is outside the table")
        return out


def _codebook(library: ctypes.CDLL, N: int, tensors: Mapping[str, Array], addresses: Mapping[str, int]) -> Decode:
    C, L, K, S = tensors["codebooks"].shape
    rest = (
        N,
        addresses["codes"],
        tensors["codes"].shape[1],
        addresses["codebooks"],
        0,
        C,
        L,
        K,
        S,
        K.bit_length() - 1,
        1,
    )
    function = library.lookup_codewords
    return lambda out, ids, count: function(out, ids, 1, count, *rest)


def _trellis(
    library: ctypes.CDLL, spec: Mapping[str, Any], tensors: Mapping[str, Array], addresses: Mapping[str, int]
) -> Decode:
    starts = tensors.get("tier_starts")
    tiers, P = tensors["dim_rates"].shape
    names = (
        "row_tiers",
        "tier_starts",
        "state_values",
        "dim_scale",
        "row_mean",
        "row_gain",
        "gain_range",
        "rotation",
    )
    table = TrellisTable(
        spec["num_embeddings"], tensors["codes"].nbytes, P, spec["embedding_dim"], tiers, spec["window"],
        starts is not None and starts.dtype == np.int64, 0, tuple(spec["tier_nbytes"]), addresses["codes"],
        addresses["dim_rates"], *[addresses.get(name, 0) for name in names],
    )  # fmt: skip
    function, reference = library.trellis_lookup, ctypes.pointer(table)
    return lambda out, ids, count: function(out, 0, ids, 1, count, reference, 1)


def _rowwise(
    library: ctypes.CDLL, spec: Mapping[str, Any], tensors: Mapping[str, Array], addresses: Mapping[str, int]
) -> Decode | None:
    dtype = tensors["row_scale"].dtype
    is_half = dtype == np.float16
    has_half = bool(ctypes.c_int.in_dll(library, "has_half").value)
    if spec["n_bits"] not in (4, 8):
        return None
    if dtype != tensors["row_offset"].dtype or dtype not in (
        (np.float16, np.float32) if has_half else (np.float32,)
    ):
        return None
    rest = (
        spec["num_embeddings"], addresses["codes"], tensors["codes"].shape[1], addresses["row_scale"],
        addresses["row_offset"], is_half, spec["embedding_dim"], spec["n_bits"], 1,
    )  # fmt: skip
    function = library.lookup_integers
    return lambda out, ids, count: function(out, ids, 1, count, *rest)
