"""Elements of a page, which the template lays out: each holds text and numbers, never markup."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Stat:
    """A headline number.

    Attributes:
        label: what it is.
        before: value before, or "" if there is one value only.
        after: value after, or the only one.
        detail: a line below it.
    """

    label: str
    before: str
    after: str
    detail: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and whether its cells are numbers."""

    heading: str
    is_number: bool = False


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        columns: its columns; the first one names the row.
        rows: cells as text; columns whose cells are all empty are left out by `filled`.
        marked: indices of rows to emphasize.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()

    def filled(self) -> Table:
        """Return the table without its empty columns."""
        kept = [i for i in range(len(self.columns)) if i == 0 or any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Table([self.columns[i] for i in kept], rows, self.marked)


@dataclass(frozen=True)
class Record:
    """A row of `Records`: a name with a line on it, numbers, and a remark."""

    name: str
    detail: str
    cells: Sequence[str]
    note: str


@dataclass(frozen=True)
class Records:
    """Rows with names and remarks too long for a table: aligned numbers, which wrap on a phone.

    Attributes:
        headings: headings of the cells.
        rows: the rows; columns whose cells are all empty are left out by `filled`.
    """

    headings: Sequence[str]
    rows: Sequence[Record]

    def filled(self) -> Records:
        """Return the rows without their empty columns."""
        kept = [i for i in range(len(self.headings)) if any(row.cells[i] for row in self.rows)]
        rows = [Record(row.name, row.detail, [row.cells[i] for i in kept], row.note) for row in self.rows]
        return Records([self.headings[i] for i in kept], rows)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        name: name of its files, unique on the page: lower-case letters, digits and dashes.
        title: what it shows.
        draw: draws it, for a width in pixels.
        caption: how to read it.
        wide: whether it takes the width of the page; otherwise two stand side by side where there is room.
    """

    name: str
    title: str
    draw: Callable[[int], Figure]
    caption: str = ""
    wide: bool = True


@dataclass(frozen=True)
class Section:
    """A section.

    Attributes:
        heading: its heading.
        lead: the first paragraph.
        charts: charts.
        table: a table, or None.
        records: rows with remarks, or None.
        notes: remarks, a line each.
        code: code to copy.
        queries: neighbours before and after, see `commands.nearest`.
    """

    heading: str
    lead: str = ""
    charts: Sequence[Chart] = ()
    table: Table | None = None
    records: Records | None = None
    notes: Sequence[str] = ()
    code: str = ""
    queries: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Page:
    """A page.

    Attributes:
        title: its title.
        subtitle: a line below it.
        summary: sentences on what was done.
        stats: headline numbers.
        sections: sections.
        footer: a line at the end.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    stats: Sequence[Stat]
    sections: Sequence[Section] = field(default_factory=tuple)
    footer: str = ""
