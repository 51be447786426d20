"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each piece of work; the terminal's implementation draws bars."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a piece of work of `total` units (rows, bytes, steps)."""

    def advance(self, amount: int = 1) -> None:
        """Report units done since the last call."""

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the work."""


class Silent:
    """Listens to nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int = 1) -> None:
        """Ignore."""

    def warn(self, message: str) -> None:
        """Ignore."""
