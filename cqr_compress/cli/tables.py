"""Tables that fit the terminal: names are folded at dots, columns are left out, and a list is the last resort."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cqr_compress.cli.printable import printable

_WIDTH_OF_FILES = 160
"""Columns where the output is no terminal and COLUMNS does not say."""
_LITTLE_WEIGHT = 3
"""Columns of this drop or more are left out before names are folded."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        heading: may have several lines.
        right: whether cells are aligned to the right.
        folds: whether cells may be folded, at dots, slashes and spaces.
        drop: columns of higher numbers are left out first where the terminal is narrow; 0 never is.
    """

    heading: str
    right: bool = False
    folds: bool = False
    drop: int = 0


def stdout() -> Console:
    """A console on stdout."""
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=_WIDTH_OF_FILES)


def print_table(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a table, in the richest form that fits the console.

    Empty columns are left out. Names in the first column stay whole while columns of little weight can be left
    out; then they are folded.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    columns = [replace(column, heading=printable(column.heading)) for column in columns]
    title = printable(title)
    filled = [i for i in range(len(columns)) if not rows or any(row[i].strip() for row in rows)]
    columns, rows = [columns[i] for i in filled], [[row[i] for i in filled] for row in rows]
    drops = sorted({column.drop for column in columns if column.drop}, reverse=True)
    everything = len(columns) + max(drops, default=0)
    attempts = [(level, False) for level in (everything, *drops) if level >= _LITTLE_WEIGHT]
    attempts += [(level, True) for level in (everything, *drops)]
    for level, fold_names in attempts:
        shown = [i for i, column in enumerate(columns) if column.drop < level]
        part = [columns[i] if i or fold_names else replace(columns[i], folds=False) for i in shown]
        table = _fitted(console, part, [[row[i] for i in shown] for row in rows], title)
        if table is not None:
            console.print(table)
            return
    print_list(console, columns, rows, title)


def print_list(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str = ""
) -> None:
    """Print a row as a heading, the first cell, and a line for each other cell."""
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
    """Break lines after dots, slashes and spaces, so that each has at most `width` letters if that is possible."""
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
    return [piece for piece in re.split(r"(?<=[./])(?![\d./])|(?<=[a-z_]\.)(?=\d)|(?<= )(?! )", line) if piece]


def _fitted(
    console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str]], title: str
) -> Table | None:
    """The table with its cells folded as far as needed; None where that does not make it fit."""
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
        title=Text(title, style="bold") if title else None, title_justify="left",
    )  # fmt: skip
    for column in columns:
        table.add_column(Text(column.heading), justify="right" if column.right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _width(cell: str) -> int:
    return max(len(line) for line in cell.split("\n"))
