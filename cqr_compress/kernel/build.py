"""Load the compiled lookups: the library of the wheel, or one that is compiled on first use and cached."""

from __future__ import annotations

import ctypes
import logging
import os
import sysconfig
import warnings
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

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
)
from cqr_compress.kernel.library import installed_libraries, load_library

_SECONDS = 10.0
"""Time limit of the compiler, which needs about one.

Lookups wait for it: were they to change from torch to C while a program runs, its results would depend on when.
"""
_log = logging.getLogger(__name__)


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
    for path in installed_libraries(THREADS):
        try:
            return _loaded(path)
        except (OSError, AttributeError) as e:
            _log.debug("%s: %s", path, e)
    return _compiled()


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
    library = load_library(path)
    _log.debug("lookups run in %s", path)
    return Native(library, str(path))


def _note(message: str) -> None:
    warnings.warn(f"{message}.", CqrCompressWarning, stacklevel=2)
