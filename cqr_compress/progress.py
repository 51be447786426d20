"""How long work tells how far it is, without knowing who listens."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of each piece of work; the terminal's implementation draws bars."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a piece of work of `total` units (rows, bytes, steps)."""

    def advance(self, amount: int = 1) -> None:
        """Report units done since the last call."""

    def tell(self, state: str) -> None:
        """Show how the current piece of work stands, beside its units."""

    def say(self, line: str) -> None:
        """Tell the user what was found on the way."""

    def warn(self, message: str) -> None:
        """Tell the user something that does not stop the work."""


class Silent:
    """Listens to nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int = 1) -> None:
        """Ignore."""

    def tell(self, state: str) -> None:
        """Ignore."""

    def say(self, line: str) -> None:
        """Ignore."""

    def warn(self, message: str) -> None:
        """Ignore."""


class PrintProgress(Silent):
    """Prints what was found and warnings, one line each; for scripts and notebooks."""

    def say(self, line: str) -> None:
        """Print."""
        print(f"  {line}", flush=True)

    def warn(self, message: str) -> None:
        """Print."""
        print(f"  note: {message}", flush=True)
