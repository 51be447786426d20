"""Progress of long work: bars on a terminal, plain lines in a log, or nothing.

Only progress: what was found is logged through `logging` (logger "cqr_compress"), and what a user should know
without being stopped by it is a `CqrCompressWarning`, through `warnings`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PLAIN_EVERY_S = 10.0


class Progress(Protocol):
    """Told of each piece of work."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a piece of work of `total` units (rows, bytes, steps); 0 where the number is not known."""

    def advance(self, amount: int = 1) -> None:
        """Report units done since the last call."""

    def status(self, text: str) -> None:
        """Show the state of the current piece of work next to its units."""


class NoProgress:
    """Shows nothing."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int = 1) -> None:
        """Ignore."""

    def status(self, text: str) -> None:
        """Ignore."""


class ProgressBars:
    """Bars on stderr where it is a terminal, else a plain line every ten seconds; used as a context manager."""

    def __init__(self) -> None:
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._label, self._unit, self._done, self._total, self._status = "", "", 0, 0, ""
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> ProgressBars:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[rate]}", markup=False),
                TextColumn("{task.fields[status]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bars = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a piece of work."""
        self._label, self._unit, self._done, self._total, self._status = label, unit, 0, total, ""
        self._began = time.monotonic()
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(label, total=total or None, rate="", status="")

    def advance(self, amount: int = 1) -> None:
        """Report units done."""
        self._done += amount
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, rate=f"{_short(rate)} {self._unit}/s")
        elif now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            of = f" of {_short(self._total)}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._total and rate else ""
            status = f", {self._status}" if self._status else ""
            print(
                f"{self._label}: {_short(self._done)}{of} {self._unit}, {_short(rate)}/s{left}{status}",
                file=sys.stderr,
                flush=True,
            )

    def status(self, text: str) -> None:
        """Show the state of the work."""
        self._status = text
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, status=text)


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """Give the progress that a caller handed over; if None, bars where stderr is a terminal, else nothing."""
    if progress is not None:
        yield progress
    elif sys.stderr is not None and sys.stderr.isatty():
        with ProgressBars() as bars:
            yield bars
    else:
        yield NoProgress()


def _short(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"
