"""Compile `lookup.c` with the system's C compiler on first use, and load it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SOURCE = Path(__file__).with_name("lookup.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-ffp-contract=off")


@dataclass(frozen=True)
class Native:
    """The compiled library, if it is available.

    Attributes:
        library: the loaded library, or None.
        reason: path of the library, or why it is not available.
    """

    library: ctypes.CDLL | None
    reason: str


@functools.cache
def native() -> Native:
    """Load the library, compiling it if it is not cached; failures are reported in `reason`, not raised."""
    if os.environ.get("CQR_COMPRESS_NATIVE", "1") == "0":
        return Native(None, "disabled by CQR_COMPRESS_NATIVE=0")
    named = os.environ.get("CC", "cc")
    compiler = shutil.which(named) or shutil.which("gcc") or shutil.which("clang")
    if os.name != "posix" or compiler is None:
        return Native(None, f"no C compiler: none of {named!r}, gcc and clang found")
    try:
        path = _build(compiler, ("-fopenmp",))
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # torch uses another OpenMP library than this compiler
            path = _build(compiler, ())
            library = ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError) as e:
        detail = getattr(e, "stderr", b"") or b""
        return Native(None, f"{compiler} failed: {e} {detail.decode(errors='replace')[-500:]}")
    _declare(library)
    return Native(library, str(path))


def _declare(library: ctypes.CDLL) -> None:
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int
    long: Any = ctypes.c_int64
    for name in ("lookup_codewords", "lookup_backward", "all_codes", "lookup_integers"):
        getattr(library, name).restype = long
    batch = [pointer, integer, long]  # ids, is_int64, B
    library.lookup_codewords.argtypes = [pointer, *batch, long, pointer, long, pointer, *[integer] * 7]
    library.lookup_backward.argtypes = [pointer, pointer, *batch, long, pointer, long, *[integer] * 6]
    library.all_codes.argtypes = [
        pointer, *batch, long, pointer, long, integer, pointer, integer, long, integer
    ]  # fmt: skip
    library.lookup_integers.argtypes = [pointer, *batch, long, pointer, long, pointer, pointer, *[integer] * 4]


def _build(compiler: str, more_flags: tuple[str, ...]) -> Path:
    """Compile the library, unless it is cached.

    It is linked without an OpenMP library: its symbols resolve to the one that torch has loaded, so that both
    share one thread pool.
    """
    source = _SOURCE.read_bytes()
    flags = (*_FLAGS, *more_flags)
    key = hashlib.sha256(b"\0".join([source, compiler.encode(), " ".join(flags).encode(), _processor()]))
    folder = _cache_folder()
    path = folder / f"lookup-{key.hexdigest()[:16]}.so"
    if path.exists():
        return path
    with tempfile.TemporaryDirectory(dir=folder) as work:
        compiled, linked = Path(work, "lookup.o"), Path(work, "lookup.so")
        for command in (
            [compiler, *flags, "-c", str(_SOURCE), "-o", str(compiled)],
            [compiler, "-shared", str(compiled), "-o", str(linked)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        linked.replace(path)  # atomic, also if several processes build at the same time
    return path


def _cache_folder() -> Path:
    """Return a cache folder that only this user can write to; a temporary folder if the cache is not suitable."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "cqr-compress"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
        if about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="cqr-compress-"))


def _processor() -> bytes:
    """Return a description of the processor's instruction sets, as a part of the cache key."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "".join(line for line in lines if line.startswith(("flags", "Features")))[:8192].encode()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
