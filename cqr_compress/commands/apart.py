"""Calls of a function in several processes at once, as many as memory has room for."""

from __future__ import annotations

import multiprocessing
import os
import pickle
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

from cqr_compress.errors import ProcessError, SpecError

_CUDA_CONTEXT_BYTES = 2**29
_POLL_S, _STOP_S = 1.0, 5.0
_TERMINATED = 128 + signal.SIGTERM
_shown: dict[Any, Any] = {}
"""The warnings of processes that were issued here."""


def check_apart(*values: object) -> None:
    """Check before the work that other processes can be started, and get these values.

    Raises:
        SpecError: this is a process that a program without `if __name__ == "__main__":` started, a program that is
            no file, or a value that cannot be pickled.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing itself finds out
        raise SpecError(
            "a script that uses several jobs needs `if __name__ == '__main__':` around its code, because each of "
            "their processes imports it"
        )
    main = sys.modules["__main__"]
    program = getattr(main, "__file__", None)
    if program is not None and main.__spec__ is None and not Path(program).exists():
        raise SpecError(f"other processes cannot read the program {program!r}: write it to a file, or give jobs=1")
    _pickled(values)


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
        The index of a call and its result, or the exception that it raised, in the order in which they end; a
        `ProcessError` of a process that ended without a result.

    Raises:
        SpecError: arguments cannot be pickled.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // max(1, min(jobs, len(arguments))))
    waiting, running = list(enumerate(arguments)), dict[Connection, tuple[int, BaseProcess]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                index, given = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                work = theirs, _pickled((function, given)), threads
                process: BaseProcess = context.Process(target=_call, args=work)
                running[ours] = index, process
                _start(process, threads)
                theirs.close()
            ready = wait(list(running), _POLL_S)
            for connection, (index, process) in list(running.items()):
                # programs that a process has started can hold its end of the pipe when it is gone
                if connection in ready or process.exitcode is not None:
                    del running[connection]
                    yield index, _result(connection, process)
    finally:
        _stop([process for _, process in running.values()])
        for connection in running:
            connection.close()


def _pickled(values: object) -> bytes:
    try:
        return pickle.dumps(values)
    except Exception as e:  # whatever an object of the user raises
        raise SpecError(
            f"what other processes need cannot be pickled ({type(e).__name__}: {str(e)[:200]}): give the task as "
            "a file, or as a function of a module that makes it, or jobs=1"
        ) from e


def _start(process: BaseProcess, num_threads: int) -> None:
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # of libraries that read it when they are loaded
    try:
        process.start()
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _result(connection: Connection, process: BaseProcess) -> Any:
    """Receive the result of a process that has one or has ended; its warnings are issued."""
    try:
        result, issued = connection.recv() if connection.poll() else (None, None)
    except EOFError:
        issued = None
    finally:
        connection.close()
    process.join()
    if issued is None:
        return ProcessError(f"its process {_end_of(process.exitcode or 0)}, without a result")
    for text, category, file, line in issued:
        warnings.warn_explicit(text, category, file, line, registry=_shown)
    return result


def _end_of(code: int) -> str:
    """Describe how a process ended."""
    if code >= 0:
        return f"ended with exit code {code}"
    known = {each.value: each.name for each in signal.Signals}
    memory = ": memory may have been short, use fewer jobs" if -code == signal.SIGKILL else ""
    return f"was ended by {known.get(-code, f'signal {-code}')}{memory}"


def _stop(processes: Sequence[BaseProcess]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.terminate()
    for process in started:
        process.join(_STOP_S)
        if process.is_alive():
            process.kill()
            process.join()


def _call(connection: Connection, work: bytes, num_threads: int) -> None:
    """Call the function in this new process, and send what it returns or raises, and the warnings."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started this one ends it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # temporary files are removed on the way
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(num_threads)
    with warnings.catch_warnings(record=True) as caught:
        try:
            function, arguments = _unpickled(work)
            result = function(*arguments)
        except SystemExit as e:
            if e.code == _TERMINATED:
                raise
            result = ProcessError(f"its process called sys.exit({e.code!r})")
        except Exception as e:
            result = e
    issued = [(str(each.message), each.category, each.filename, each.lineno) for each in caught]
    try:
        pickle.loads(pickle.dumps((result, issued)))
    except Exception:  # of a class with other arguments, for instance
        result, issued = ProcessError(f"{type(result).__name__}: {result}"), []
    connection.send((result, issued))


def _unpickled(work: bytes) -> Any:
    try:
        return pickle.loads(work)
    except Exception as e:
        raise SpecError(
            f"the task cannot be made in another process ({type(e).__name__}: {str(e)[:200]}): give it as a file, "
            "or as a function of a module that makes it, or jobs=1"
        ) from e


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
