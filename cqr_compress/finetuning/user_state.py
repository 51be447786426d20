"""Settings of the process that a user's code may change: they hold for that code only."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class _Settings:
    """The working directory (None if it was removed), and torch's default dtype and device."""

    folder: str | None
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def current(cls) -> _Settings:
        folder = None
        with suppress(FileNotFoundError):
            folder = str(Path.cwd())
        return cls(folder, torch.get_default_dtype(), torch.get_default_device())

    def set(self) -> None:
        now = _Settings.current()
        if self.folder is not None and self.folder != now.folder:
            with suppress(FileNotFoundError):  # removed meanwhile
                os.chdir(self.folder)
        if self.dtype != now.dtype:
            torch.set_default_dtype(self.dtype)
        if self.device != now.device:  # None removes the mode that a device adds to every call of torch
            torch.set_default_device(None if self.device.type == "cpu" else self.device)


class UserState:
    """The settings of a user's code: each `active` context continues with those that the last one ended with."""

    def __init__(self) -> None:
        self._settings = _Settings.current()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Use the user's settings inside the context; those of the caller are restored afterwards."""
        before = _Settings.current()
        self._settings.set()
        try:
            yield
        finally:
            self._settings = _Settings.current()
            before.set()
