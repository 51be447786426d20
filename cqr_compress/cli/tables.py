"""Tables that fit the terminal: names are folded at dots, columns are dropped, and a list is the fallback."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_WIDTH_OF_FILES = 160
"""Width of the output if it is not a terminal and COLUMNS is not set."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: heading, of one or more lines.
        right: whether cells are right-aligned.
        folds: whether cells may be folded, at dots, slashes and spaces.
        drop: priority for dropping columns on a narrow terminal, highest first; 0 is never dropped.
    """

    heading: str
    right: bool = False
    folds: bool = False
    drop: int = 0


def stdout() -> Console:
    """Create a console on stdout."""
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=_WIDTH_OF_FILES)


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table with as many columns as fit the console; if none do, a list."""
    dropped = sorted({column.drop for column in columns if column.drop}, reverse=True)
    for level in [len(columns) + 1_000, *dropped]:
        shown = [i for i, column in enumerate(columns) if column.drop < level]
        table = _fitted(console, [columns[i] for i in shown], [[row[i] for i in shown] for row in rows], title)
        if table is not None:
            console.print(table)
            return
    print_list(console, columns, rows, title)


def print_list(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print each row as a list: its first cell as a heading, and a line for each other cell."""
    if title:
        console.print(Text(title, style="bold"), soft_wrap=True)
    names = [" ".join(column.heading.split()) for column in columns]
    width = max(len(name) for name in names)
    for row in rows:
        console.print(Text(" ".join(row[0].split("\n")), style="bold"), soft_wrap=True)
        for name, cell in zip(names[1:], row[1:], strict=True):
            if cell.strip():
                console.print(Text(f"  {name:<{width}}  {' '.join(cell.split())}"), soft_wrap=True)


def fold(text: str, width: int) -> str:
    """Break lines after dots, slashes and spaces, so that each has at most `width` characters if possible."""
    lines = []
    for line in text.split("\n"):
        current = ""
        for piece in _pieces(line):
            if current and len(current) + len(piece.rstrip()) > width:
                lines.append(current.rstrip())
                current = "  " + piece if len(piece) + 2 <= width else piece
            else:
                current += piece
        lines.append(current.rstrip())
    return "\n".join(lines)


def _pieces(line: str) -> list[str]:
    return re.findall(r"[^./ ]*(?:[./]+ ?| +|$)", line)


def _fitted(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str
) -> Table | None:
    """Create the table with its cells folded as needed to fit the console; None if it does not fit."""
    widths = {i: max(_width(row[i]) for row in rows) for i, c in enumerate(columns) if c.folds and rows}
    least = {
        i: max(len(piece.rstrip()) for row in rows for line in row[i].split("\n") for piece in _pieces(line))
        for i in widths
    }
    while True:
        folded = [[fold(cell, widths[i]) if i in widths else cell for i, cell in enumerate(row)] for row in rows]
        table = _table(columns, folded, title)
        excess = Measurement.get(console, console.options.update(width=10_000), table).maximum - console.width
        if excess <= 0:
            return table
        able = [i for i in widths if widths[i] > least[i]]
        if not able:
            return None
        widest = max(able, key=lambda i: widths[i])
        widths[widest] = max(least[widest], widths[widest] - excess)


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1), show_edge=False,
        title=title or None, title_justify="left", title_style="bold",
    )  # fmt: skip
    for column in columns:
        table.add_column(column.heading, justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _width(cell: str) -> int:
    return max(len(line) for line in cell.split("\n"))
