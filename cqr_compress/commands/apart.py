"""Calls of a function in several processes at once, as many as memory has room for."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from cqr_compress.errors import SpecError

_CUDA_CONTEXT_BYTES = 2**29
_STOP_S = 5.0


def call_apart(
    function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], jobs: int
) -> Iterator[tuple[int, Any]]:
    """Call a function of a module once for each tuple of arguments, in new processes.

    The processes share the threads that torch has here. Their warnings are issued here, and none of them outlives
    the iteration or this process.

    Args:
        function: it and its arguments have to be picklable.
        arguments: of each call.
        jobs: largest number of processes at once.

    Yields:
        The index of a call and its result, or the exception that it raised, in the order in which they end.

    Raises:
        SpecError: arguments cannot be pickled.
        RuntimeError: a process ended without a result, such as for lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // max(1, min(jobs, len(arguments))))
    waiting, running = list(enumerate(arguments)), dict[Connection, tuple[int, BaseProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, given = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process: BaseProcess = context.Process(target=_call, args=(theirs, function, given, threads))
                running[ours] = index, process
                _start(process, threads)
                theirs.close()
            for ended in wait(list(running)):
                assert isinstance(ended, Connection)
                index, process = running.pop(ended)
                yield index, _result(ended, process)
    finally:
        for connection, (_, process) in running.items():
            _stop(process)
            connection.close()


def _start(process: BaseProcess, num_threads: int) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of libraries that read it when they are loaded
    try:
        process.start()
    except Exception as e:  # whatever pickling an object of the user raises
        raise SpecError(
            f"what other processes need cannot be pickled ({type(e).__name__}: {str(e)[:200]}): give the task as "
            "a file, or as a function of a module that makes it, or jobs=1"
        ) from e
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _result(connection: Connection, process: BaseProcess) -> Any:
    """Receive the result of a process that has one or has ended; its warnings are issued."""
    try:
        result, issued = connection.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"a process ended with exit code {process.exitcode} and without a result. If memory was short, use "
            "fewer jobs; a script that uses several needs `if __name__ == '__main__':` around its code."
        ) from None
    finally:
        connection.close()
    process.join()
    for text, category in issued:
        warnings.warn(text, category, stacklevel=3)
    return result


def _stop(process: BaseProcess) -> None:
    if process.pid is None:  # it did not start
        return
    process.terminate()
    process.join(_STOP_S)
    if process.is_alive():
        process.kill()
        process.join()


def _call(
    connection: Connection, function: Callable[..., Any], arguments: tuple[Any, ...], num_threads: int
) -> None:
    """Call the function in this new process, and send what it returns or raises, and the warnings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # temporary files are removed on the way
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    with warnings.catch_warnings(record=True) as caught:
        try:
            result = function(*arguments)
        except Exception as e:
            result = e
    issued = [(str(warning.message), warning.category) for warning in caught]
    try:
        connection.send((result, issued))
    except Exception:  # a result or an exception that cannot be pickled
        connection.send((RuntimeError(f"{type(result).__name__}: {result}"), []))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def fitting_jobs(jobs: int, device: torch.device) -> int:
    """Return how many processes that need as much memory as this one did fit into what is free: 1 to `jobs`."""
    fitting = [jobs]
    peak, free = _peak_bytes(), _free_bytes()
    if peak and free is not None:
        fitting.append(free // peak)
    if device.type == "cuda":
        needed = torch.cuda.max_memory_reserved(device) + _CUDA_CONTEXT_BYTES
        fitting.append(torch.cuda.mem_get_info(device)[0] // needed)
    return max(1, min(fitting))


def _peak_bytes() -> int:
    """Return the largest memory that this process has had; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _free_bytes() -> int | None:
    """Return the memory that Linux and the control group of this process have left; None where it is not known."""
    found = list[int]()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        group = Path("/sys/fs/cgroup")
        most, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        found += [int(most) - int(used)] if most != "max" else []
    except (OSError, ValueError, IndexError):
        pass  # another system, or an older kind of control groups
    return min(found, default=None)
