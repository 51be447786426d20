"""The compiled library and its functions, for programs with torch or without."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cqr_compress.kernel.compile import HEADER, cpu_flags, installed_name, levels

_MAX_TIERS = 4


class TrellisTable(ctypes.Structure):
    """The arguments of `trellis_lookup` that describe a table, as in trellis_rows.c."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("N", "size", "P", "D", "T", "L", "starts_are_int64", "is_half")],
        ("widths", ctypes.c_int64 * _MAX_TIERS),
        *[
            (name, ctypes.c_void_p)
            for name in (
                "codes", "rates", "row_tiers", "starts", "values", "scale", "mean", "gains", "gain_range",
                "rotation",
            )
        ],
    )  # fmt: skip


def installed_libraries(threads: Iterable[str]) -> Iterator[Path]:
    """Iterate over the libraries that came with the wheel and that this CPU can run, best first.

    Args:
        threads: keys of `compile.THREADS`, best first.
    """
    have = cpu_flags()
    for suffix in threads:
        for level, needed in levels().items():
            path = HEADER.with_name(installed_name(level, suffix))
            if needed <= have and path.exists():
                yield path


def load_library(path: Path) -> ctypes.CDLL:
    """Load a library and declare its functions.

    Raises:
        OSError: it cannot be loaded, such as without the OpenMP library that its symbols refer to.
        AttributeError: it lacks a function.
    """
    library = ctypes.CDLL(str(path))
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int
    long: Any = ctypes.c_int64
    for name in ("lookup_codewords", "lookup_backward", "all_codes", "lookup_integers", "trellis_lookup"):
        getattr(library, name).restype = long
    batch = [pointer, integer, long]  # ids, is_int64, B
    library.lookup_codewords.argtypes = [pointer, *batch, long, pointer, long, pointer, *[integer] * 7]
    library.lookup_backward.argtypes = [pointer, pointer, *batch, long, pointer, long, *[integer] * 6]
    library.all_codes.argtypes = [
        pointer, *batch, long, pointer, long, integer, pointer, integer, long, integer
    ]  # fmt: skip
    library.nearest.restype = None
    library.nearest.argtypes = [pointer, pointer, long, pointer, pointer, integer, integer, integer]
    library.lookup_integers.argtypes = [pointer, *batch, long, pointer, long, pointer, pointer, *[integer] * 4]
    library.trellis_search.argtypes = [
        pointer, pointer, pointer, long, integer, pointer, pointer, long, integer, pointer, integer, integer
    ]  # fmt: skip
    library.trellis_lookup.argtypes = [pointer, integer, *batch, ctypes.POINTER(TrellisTable), integer]
    return library
