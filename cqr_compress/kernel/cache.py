"""Libraries compiled at run time, kept in a folder that only this user can write to."""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = "CQR_COMPRESS_CACHE"
"""Environment variable that names the folder; `temporary_folder` sets it for processes that this one starts."""
_PAUSE = 3600.0
"""Seconds until a compiler that took too long is tried again."""


def user_folder() -> Path:
    """Return the folder in the user's cache; it is created if it does not exist.

    Raises:
        OSError: the folder is not suitable.
    """
    folder = _user_folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_folder(folder)
    return folder


def temporary_folder() -> Path:
    """Create a folder that is removed when this process exits; processes that it starts use it too.

    Raises:
        OSError: the temporary folder is not suitable.
    """
    folder, creator = Path(tempfile.mkdtemp(prefix="cqr-compress-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == creator else None)
    _check_folder(folder)
    os.environ[FOLDER] = str(folder)
    return folder


def _user_folder() -> Path:
    if named := os.environ.get(FOLDER):
        return Path(named).absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # the XDG base directory specification: relative paths are ignored
        try:
            base = Path.home() / ".cache"
        except RuntimeError as e:  # HOME is not set, and the user id has no name
            raise OSError("there is no home folder for a cache") from e
    if not base.is_absolute():
        raise OSError("there is no home folder for a cache")
    return base / "cqr-compress"


def _check_folder(folder: Path) -> None:
    """Refuse a folder that others can write to, and one whose files cannot be executed.

    Raises:
        OSError: the folder is not suitable.
    """
    about = folder.stat()
    if not _is_own(about):
        raise PermissionError(f"others can write to the cache folder {folder}")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the cache folder {folder} is read-only")
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        raise PermissionError(f"the cache folder {folder} is mounted noexec")


def cached_library(folder: Path, key: str, build: Callable[[Path], None], note: Callable[[str], None]) -> Path:
    """Return the library of a key, compiling it if it is not cached.

    The name of a library has the digest of its content; owner, mode and digest are verified before it is returned,
    and a library that fails is compiled again.

    Args:
        folder: folder that only this user can write to.
        key: whatever the library depends on.
        build: writes the library to a path.
        note: called with the reason why a cached library is not used.

    Raises:
        OSError: the library cannot be compiled or stored.
    """
    stem = f"lookup-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with _Lock(folder):
        for path in sorted(folder.glob(f"{stem}-*.so")):
            if problem := _problem(path):
                note(f"{path} {problem}: it is removed")
                path.unlink()
            else:
                return path
        stamp = folder / f"{stem}.timeout"
        if stamp.exists() and 0 <= time.time() - stamp.stat().st_mtime < _PAUSE:
            raise TimeoutError(f"the compiler did not finish in time; it is tried again later, or without {stamp}")
        with tempfile.TemporaryDirectory(dir=folder) as work:
            built = Path(work, "lookup.so")
            try:
                build(built)
            except TimeoutError:
                stamp.touch()
                raise
            built.chmod(0o700)
            path = folder / f"{stem}-{_digest(built.read_bytes())}.so"
            with built.open("rb") as file:
                os.fsync(file.fileno())
            built.replace(path)
        stamp.unlink(missing_ok=True)
        return path


class _Lock:
    """Lock a folder, so that one of several processes compiles; none where the file system has no locks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> None:
        import fcntl  # not on Windows, where nothing is compiled

        self._file = os.open(self._folder, os.O_RDONLY)
        for _ in range(150):  # the compiler's time limit, and a little more
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:
                break

    def __exit__(self, *exc: object) -> None:
        os.close(self._file)


def _problem(path: Path) -> str | None:
    """Return why a library must not be loaded, or None."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with os.fdopen(file, "rb") as opened:
            about = os.fstat(file)
            if not stat.S_ISREG(about.st_mode) or not _is_own(about):
                return "can be written to by others"
            return None if path.stem.endswith(f"-{_digest(opened.read())}") else "is damaged"
    except OSError as e:
        return f"cannot be read ({e.strerror})"


def _is_own(about: os.stat_result) -> bool:
    return about.st_uid == os.geteuid() and not about.st_mode & 0o022


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
