"""Progress of long operations: bars on a terminal, plain lines in a log, or nothing.

Results are logged through `logging` (logger "cqr_compress"), and conditions that do not stop an operation are
issued as a `CqrCompressWarning` through `warnings`.
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
    """Receiver of the progress of an operation, which consists of consecutive stages."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a stage of `total` units (rows, bytes, steps); 0 if the number is unknown."""

    def advance(self, amount: int = 1) -> None:
        """Report the units completed since the last call."""

    def status(self, text: str) -> None:
        """Show a status text of the current stage next to its units."""


class NoProgress:
    """Discards all progress."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int = 1) -> None:
        """Ignore."""

    def status(self, text: str) -> None:
        """Ignore."""


class ProgressBars:
    """Context manager with bars on stderr if it is a terminal, else a plain line every ten seconds."""

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
            self._bars = RichProgress(
                *columns, console=Console(stderr=True), transient=True, redirect_stdout=False
            )
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a stage; its bar replaces the previous one."""
        label = "".join(letter if letter.isprintable() else "?" for letter in label)  # names of a file's tensors
        self._label, self._unit, self._done, self._total, self._status = label, unit, 0, total, ""
        self._began = time.monotonic()
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(label, total=total or None, rate="", status="")

    def advance(self, amount: int = 1) -> None:
        """Report completed units; update the bar or print a line."""
        self._done += amount
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, rate=f"{_short(rate)} {self._unit}/s")
        elif now - self._printed > _PLAIN_EVERY_S:
            self._printed = now
            of = f" of {_short(self._total)}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s left" if self._done < self._total else ""
            status = f", {self._status}" if self._status else ""
            print(
                f"{self._label}: {_short(self._done)}{of} {self._unit}, {_short(rate)}/s{left}{status}",
                file=sys.stderr,
                flush=True,
            )

    def status(self, text: str) -> None:
        """Show a status text of the current stage."""
        self._status = text
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, status=text)


@contextmanager
def shown(progress: Progress | None) -> Iterator[Progress]:
    """Yield the given progress; if None, bars if stderr is a terminal, else a `NoProgress`."""
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
            return (
                f"{value:.0f}{unit}"
                if unit == "" and (value >= 10 or value == int(value))
                else f"{value:.1f}{unit}"
            )
        value /= 1000
    return f"{value:.0f}T"
