"""Write files of torch.save atomically."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import torch

from cqr_compress.checkpoint.output_files import atomic_file

if TYPE_CHECKING:
    from typing_extensions import Buffer


def save_torch(value: object, path: Path) -> None:
    """Write a file by torch.save, which replaces an error of the operating system by one of its zip writer.

    Raises:
        OutputError: the file cannot be written.
    """
    with atomic_file(path) as file:
        recording = _Recording(file)
        try:
            torch.save(value, cast(IO[bytes], recording))
        except RuntimeError as e:
            raise recording.error or e from None


class _Recording:
    """A file that keeps the error of a failed write."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, content: Buffer) -> int:
        try:
            return self._file.write(content)
        except OSError as e:
            self.error = e
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._file.flush()
