"""Load the compiled lookups: the library of the wheel, or one that is compiled on first use and cached."""

from __future__ import annotations

import ctypes
import logging
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (loads the OpenMP library that the compiled ones refer to)

from cqr_compress.errors import CqrCompressWarning
from cqr_compress.kernel.cache import FOLDER, cached_library, temporary_folder, user_folder
from cqr_compress.kernel.compile import (
    HEADER,
    SOURCES,
    THREADS,
    NoCompilerError,
    compile_library,
    cpu_flags,
    find_compiler,
    installed_name,
    levels,
)
from cqr_compress.table.trellis_spec import MAX_TIERS

_SECONDS = 10.0
"""Time limit of the compiler, which needs about one.

Lookups wait for it: were they to change from torch to C while a program runs, its results would depend on when.
"""
_log = logging.getLogger(__name__)


class TrellisTable(ctypes.Structure):
    """The arguments of `trellis_lookup` that describe a table, as in trellis_rows.c."""

    _fields_ = (
        *[(name, ctypes.c_int64) for name in ("N", "size", "P", "D", "T", "L", "starts_are_int64", "is_half")],
        ("widths", ctypes.c_int64 * MAX_TIERS),
        *[
            (name, ctypes.c_void_p)
            for name in (
                "codes", "rates", "row_tiers", "starts", "values", "scale", "mean", "gains", "gain_range",
                "rotation",
            )
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class Native:
    """The compiled library, if it is available.

    Attributes:
        library: the loaded library, or None.
        reason: path of the library, or why it is not available.
    """

    library: ctypes.CDLL | None
    reason: str


@cache
def native() -> Native:
    """Load the library; failures are reported in `reason`, not raised.

    Warns:
        CqrCompressWarning: a compiler failed, or its library could not be cached or loaded.
    """
    if os.environ.get("CQR_COMPRESS_NATIVE", "1") == "0":
        return Native(None, "disabled by CQR_COMPRESS_NATIVE=0")
    for path in _installed():
        try:
            return _loaded(path)
        except (OSError, AttributeError) as e:
            _log.debug("%s: %s", path, e)
    return _compiled()


def _installed() -> Iterator[Path]:
    """Iterate over the libraries that came with the wheel and that this CPU can run, best first."""
    have = cpu_flags()
    for threads in THREADS:
        for level, needed in levels().items():
            path = HEADER.with_name(installed_name(level, threads))
            if needed <= have and path.exists():
                yield path


def _compiled() -> Native:
    """Load a library from the cache, or compile it."""
    if os.name != "posix":
        return Native(None, "libraries are compiled on Linux and macOS only")
    try:
        folder = _folder()
        for threads in THREADS.values():
            try:
                return _loaded(cached_library(folder, _key(threads), partial(_build, threads), _note))
            except (NoCompilerError, TimeoutError):
                raise
            except (OSError, AttributeError) as e:  # such as symbols of another OpenMP library than torch's
                problem = str(e)
    except NoCompilerError as e:
        return Native(None, str(e))
    except OSError as e:
        problem = str(e)
    _note(f"lookups on the CPU run in torch, slower: {problem}")
    return Native(None, problem)


def _folder() -> Path:
    """Return the cache folder, or a temporary folder if the cache is not suitable."""
    try:
        return user_folder()
    except OSError as e:
        find_compiler()
        _note(f"{e}: each program compiles its lookups again. Set {FOLDER} to a folder that only you can write to")
        return temporary_folder()


def _key(threads: tuple[str, ...]) -> str:
    """Return what a library depends on; not the compiler, so that a cached library is used without one."""
    texts = [path.read_text() for path in (HEADER, *SOURCES)]
    return "\0".join([*texts, *threads, sysconfig.get_platform(), *sorted(cpu_flags())])


def _build(threads: tuple[str, ...], output: Path) -> None:
    compile_library(find_compiler(), ("-march=native", *threads), output, _SECONDS)


def _loaded(path: Path) -> Native:
    library = ctypes.CDLL(str(path))
    _declare(library)
    _log.debug("lookups run in %s", path)
    return Native(library, str(path))


def _note(message: str) -> None:
    warnings.warn(f"{message}.", CqrCompressWarning, stacklevel=2)


def _declare(library: ctypes.CDLL) -> None:
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
