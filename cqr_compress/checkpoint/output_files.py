"""Files that appear at their paths only when they are complete.

A file is written under a temporary name in the folder of its target, flushed to disk, and renamed. The temporary
file is locked while it is open: a later run on the same output removes what a killed run left, and refuses to
write while another run does.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import IO

from cqr_compress.errors import OutputError, OutputExistsError, brief

try:
    import fcntl
except ImportError:  # Windows: temporary files are not locked, and those of killed runs stay
    fcntl = None  # type: ignore[assignment]

_MAX_NAME_BYTES = 255 - len("..12345678.partial") - len("-12345678-00001-of-00001")
"""A file name has at most 255 bytes on common file systems; temporary files and shards have longer names."""

completed: list[Path] = []
"""Files that this process has renamed into place, for the message of an interrupted command."""


def check_outputs(paths: Sequence[Path], force: bool, sources: Sequence[Path] = ()) -> None:
    """Check output paths before any work is done.

    Args:
        paths: files to write.
        force: whether existing files may be replaced.
        sources: files that are read, which must not be replaced.

    Raises:
        OutputExistsError: a file exists, and `force` is False.
        OutputError: the folder does not exist, the path is one of the sources, or it is what is never replaced: a
            folder, a device, a pipe, a socket or a link to a file that does not exist.
    """
    reading = {source.resolve() for source in sources}
    for path in paths:
        if path.name in ("", "..") or "\0" in str(path):
            raise OutputError(f"{str(path)!r} does not name a file: give a path like small.safetensors")
        if len(os.fsencode(path.name)) > _MAX_NAME_BYTES:
            raise OutputError(f"the file name {brief(path.name)} has more than {_MAX_NAME_BYTES} bytes")
        with output_errors(path):
            if _is_link_to_itself(path):
                raise OutputError(f"{str(path)!r} is a link to itself: remove it first")
            if path.resolve() in reading:
                raise OutputError(f"{str(path)!r} is the checkpoint itself, or a part of it: give another output")
            if path.is_dir():
                raise OutputError(f"{str(path)!r} is a folder: give a file")
            if path.is_symlink() and not path.exists():
                raise OutputError(f"{str(path)!r} is a link to a file that does not exist: remove it first")
            if path.exists() and not path.is_file():
                raise OutputError(f"{str(path)!r} is a device, a pipe or a socket: give a file")
            if path.exists() and not force:
                raise OutputExistsError(f"{str(path)!r} already exists. Pass --force to replace it.")
            if not path.parent.is_dir():
                raise OutputError(
                    f"no such folder: {str(path.parent)!r}, to write {path.name!r} to. Create it first."
                )


def _is_link_to_itself(path: Path) -> bool:
    try:
        path.stat()
    except OSError as e:
        return e.errno == errno.ELOOP
    return False


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file for writing, which is renamed to `path` if the block ends without an error.

    Raises:
        OutputError: the file cannot be written, or another process is writing it.
    """
    with output_errors(path):
        partial, file = create_partial(path)
        try:
            with file:
                remove_abandoned(path.parent, [re.escape(path.name)], own=[partial])
                yield file
                sync(file)
            rename(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()


def create_partial(target: Path) -> tuple[Path, IO[bytes]]:
    """Create the temporary file of a target, locked until it is closed; return its path and the file."""
    path = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    file = path.open("xb")
    with contextlib.suppress(OSError):  # a file system without locks
        _lock(file)
    return path, file


@contextlib.contextmanager
def set_aside(path: Path, output: Path) -> Iterator[None]:
    """Rename a file that describes an output while the block replaces the output.

    The file is removed if the output is another one at the end of the block, and has its name again otherwise.

    Raises:
        OutputError: the file cannot be renamed; nothing has changed.
    """
    before = _identity(output)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    with output_errors(path), contextlib.suppress(FileNotFoundError):
        path.replace(aside)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            if _identity(output) == before:
                aside.replace(path)
            else:
                aside.unlink()


def _identity(path: Path) -> tuple[int, int] | None:
    """Identify a file, which another one has taken the place of if this differs; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def remove_abandoned(folder: Path, targets: Sequence[str], own: Collection[Path]) -> None:
    """Remove the temporary files of runs that were killed.

    Args:
        folder: the folder of the targets.
        targets: regular expressions of the names of the targets.
        own: temporary files of the caller, which exist already: of two runs that start at once, one at least sees
            the other.

    Raises:
        OutputError: another process is writing one of the targets.
    """
    pattern = re.compile(rf"\.({'|'.join(targets)})\.[0-9a-f]+\.partial")
    mine = {path.name for path in own}
    found = [entry.name for entry in os.scandir(folder) if pattern.fullmatch(entry.name)]
    for path in (folder / name for name in found if name not in mine):
        try:
            with path.open("r+b") as file:
                if _lock(file):
                    path.unlink()
        except BlockingIOError:
            raise OutputError(
                f"another process is writing the same output: {str(path)!r} is its temporary file. Wait for it, "
                "or give another output."
            ) from None
        except OSError:  # removed meanwhile, or not ours to remove
            continue


def _lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; return False where that is not possible at all.

    Raises:
        BlockingIOError: another process has locked it.
    """
    if fcntl is None:
        return False
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    return True


def sync(file: IO[bytes]) -> None:
    """Flush a file to disk."""
    file.flush()
    os.fsync(file.fileno())


def rename(partial: Path, target: Path) -> None:
    """Rename a complete temporary file to its target, and flush the folder to disk."""
    partial.replace(target)
    completed.append(target)
    with contextlib.suppress(OSError):
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def output_errors(path: Path, wanted: int | None = None) -> Iterator[None]:
    """Context manager that turns errors of the operating system into OutputError.

    Args:
        path: the file that is written.
        wanted: its size in bytes, if known.
    """
    try:
        yield
    except OSError as e:
        if isinstance(e, (OutputError, OutputExistsError)):
            raise
        need = f" of {wanted:,} bytes" if wanted is not None else ""
        hint = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is exceeded",
            errno.EFBIG: "the file size limit is exceeded (see ulimit -f)",
            errno.EACCES: "permission denied",
            errno.EROFS: "the file system is read-only",
        }.get(e.errno or 0, e.strerror or str(e))
        raise OutputError(f"cannot write {str(path)!r}{need}: {hint}. No partial file is left.") from e
