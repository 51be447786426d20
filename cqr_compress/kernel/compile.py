"""Compile the C files: at install time for several CPUs, at run time for this one.

The build backend loads this file by its path, so that it imports the standard library only.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

HEADER = Path(__file__).with_name("kernel.h")
SOURCES = tuple(HEADER.with_name(name) for name in ("lookup.c", "trellis_rows.c", "trellis_search.c"))
THREADS = {"": ("-fopenmp",), "-serial": ()}
"""Compiler flags by suffix of a library's name; the first that can be loaded is used."""

_FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-ffp-contract=off", "-Wno-psabi")
_MACHINE = platform.machine().lower()
_X86_64_V3 = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_X86_64_V4 = _X86_64_V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
_X86 = {"x86-64-v4": _X86_64_V4, "x86-64-v3": _X86_64_V3, "x86-64": frozenset[str]()}


class NoCompilerError(OSError):
    """There is no C compiler."""


def levels() -> dict[str, frozenset[str]]:
    """Return the CPU levels of a wheel's libraries, best first, with the flags in /proc/cpuinfo that each needs.

    The levels of x86-64 are those of the System V ABI supplement, "Micro-Architecture Levels".
    """
    return _X86 if _MACHINE in ("x86_64", "amd64") else {_MACHINE: frozenset()}


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets that the system reports; none where it is not Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith(("flags", "Features"))), ()))


def level_flags(level: str) -> tuple[str, ...]:
    """Return the compiler flags of a level of `levels()`."""
    if level == "x86-64-v4":  # gcc's generic tuning is 1.6 times as slow for codes of 4 bits
        return (f"-march={level}", "-mtune=icelake-server")
    return (f"-march={level}",) if level in _X86 else ()


def installed_name(level: str, threads: str) -> str:
    """Return the name of a wheel's library for a level of `levels()` and a key of THREADS."""
    return f"lookup-{level}{threads}.so"


def find_compiler() -> list[str]:
    """Return the command of the system's C compiler: $CC, cc, gcc or clang.

    Raises:
        NoCompilerError: none of them is on PATH.
    """
    try:
        named = shlex.split(os.environ.get("CC", "")) or ["cc"]
    except ValueError as e:
        raise NoCompilerError(f"the environment variable CC is no command: {e}") from e
    for command in (named, ["gcc"], ["clang"]):
        if os.name == "posix" and (found := shutil.which(command[0])):
            return [found, *command[1:]]
    raise NoCompilerError(f"no C compiler: none of {named[0]!r}, gcc and clang found")


def compile_library(compiler: list[str], flags: tuple[str, ...], output: Path, seconds: float) -> None:
    """Compile the library to a file.

    It is linked without an OpenMP library: its symbols resolve to the one that torch has loaded, so that both
    share one thread pool.

    Args:
        compiler: command of the compiler.
        flags: flags in addition to those that every library has.
        output: file to write.
        seconds: time limit.

    Raises:
        OSError: the compiler failed, or took too long (TimeoutError).
    """
    until = time.monotonic() + seconds
    compiled = [output.with_suffix(f".{source.stem}.o") for source in SOURCES]
    pairs = zip(SOURCES, compiled, strict=True)
    _run([[*compiler, *_FLAGS, *flags, "-c", str(source), "-o", str(made)] for source, made in pairs], until)
    _run([[*compiler, "-shared", "-s", *map(str, compiled), "-lm", "-o", str(output)]], until)
    for made in compiled:
        made.unlink()


def _run(commands: list[list[str]], until: float) -> None:
    """Run compilers at once until a time; their child processes end with them, and no pipe is waited for."""
    with contextlib.ExitStack() as stack:
        started = []
        for command in commands:
            messages = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=messages, stderr=messages, start_new_session=True
            )
            stack.callback(_kill, process)
            started.append((process, messages))
        for process, messages in started:
            try:
                code = process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise TimeoutError(f"{commands[0][0]} did not finish in time") from None
            if code:
                messages.seek(0)
                detail = messages.read().decode(errors="replace").strip()[-500:]
                raise OSError(f"{commands[0][0]} failed with code {code} {detail}".strip())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, with its children."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
