"""Python processes that have imported torch already: they are forked from one that has done nothing else.

Importing torch takes seconds, which tests of programs would spend in each process that they start. Where processes
cannot be forked safely, programs run in new ones.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any


class WarmPython:
    """Starts programs as `python ...` does."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._address = str(Path(self._folder.name) / "socket")
        self._starting = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None

    def __call__(
        self, *words: object, cwd: Path | None = None, env: Mapping[str, str] = os.environ, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        """Run `python` with words that begin with `-c`, `-m` or a script."""
        args = [str(word) for word in words]
        if not sys.platform.startswith("linux"):
            command = [sys.executable, *args]
            return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
        with self._starting:
            if self._server is None:
                command = [sys.executable, __file__, self._address]
                self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
                assert self._server.stdout is not None and self._server.stdout.readline() == b"ready\n"
        return request(self._address, args, cwd or Path.cwd(), env, timeout)

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate()
        self._folder.cleanup()


def request(
    address: str, args: list[str], cwd: Path, env: Mapping[str, str], timeout: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Ask the process that listens at an address to run `python` with arguments."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as connection:
        outputs = [Path(folder) / name for name in ("out", "err")]
        words = [args, str(cwd), dict(env), *map(str, outputs)]
        connection.settimeout(timeout)
        connection.connect(address)
        with connection.makefile("rw") as file:
            print(json.dumps(words), file=file, flush=True)
            pid = int(file.readline())
            try:
                code = int(file.readline())
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(args, timeout or 0, *(p.read_bytes() for p in outputs)) from None
        return subprocess.CompletedProcess(args, code, *(path.read_text() for path in outputs))


def serve(address: str) -> None:
    """Fork a process for each connection, until the standard input ends."""
    import torch

    with contextlib.suppress(ImportError):
        import torch._dynamo  # noqa: F401  (by optimizers)

    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    while select.select([listening, sys.stdin], [], [])[0] == [listening]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            subprocess.run = partial(run_python, address, subprocess.run)  # type: ignore[assignment]
            supervise(connection)
            os._exit(0)
        connection.close()


def run_python(address: str, run_program: Callable[..., Any], command: Any, **options: Any) -> Any:
    """Run a command as `subprocess.run` does, in a process that has imported torch if it is `python ...`."""
    if command[0] != sys.executable or options.keys() - {"check"}:
        return run_program(command, **options)
    done = request(address, command[1:], Path.cwd(), os.environ)
    print(done.stdout, end="", flush=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    if options.get("check"):
        done.check_returncode()
    return done


def supervise(connection: socket.socket) -> None:
    """Run a program in a process of its own, and send how that ends."""
    with contextlib.suppress(BrokenPipeError), connection, connection.makefile("rw") as file:
        request = json.loads(file.readline())
        pid = os.fork()
        if pid == 0:
            os._exit(run(*request))
        print(pid, file=file, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=file, flush=True)


def run(args: list[str], cwd: str, env: dict[str, str], *outputs: str) -> int:
    """Run a program as the interpreter does; its exit code."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    code = 0
    try:
        execute(*args)
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def execute(first: str, *rest: str) -> Any:
    if first == "-c":
        main = types.ModuleType("__main__")
        sys.modules["__main__"], sys.argv, sys.path[0] = main, [first, *rest[1:]], ""
        return exec(compile(rest[0], "<string>", "exec"), vars(main))
    if first == "-m":
        sys.argv, sys.path[0] = list(rest), str(Path.cwd())
        return runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
    return runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
    os._exit(0)  # torch's clean-up takes a second
