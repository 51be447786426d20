"""Streaming readers of data files in blocks of rows: CSV, TSV, libfm and Parquet, text optionally gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from cqr_compress.errors import TaskError

BLOCK_ROWS = 65_536
Column = str | int
"""A column, by its name in the heading or by its index from 0."""


@dataclass(frozen=True)
class Block:
    """A block of rows of a file.

    Attributes:
        path: the file.
        lines: line number of each row, from 1 (row number in Parquet).
        columns: one array (B,) of strings or numbers for each requested column.
    """

    path: Path
    lines: Sequence[int]
    columns: list[np.ndarray[Any, Any]]

    def where(self, row: int) -> str:
        """Describe the location of a row, for a message."""
        what = "row" if self.path.suffix == ".parquet" else "line"
        return f"{str(self.path)!r}, {what} {self.lines[row]}"

    def numbers(self, column: int) -> Tensor:
        """Convert a column to float32; empty cells are NaN.

        Raises:
            TaskError: a cell is not a number; the message has its line.
        """
        values = self.columns[column]
        if values.dtype.kind in "US":
            values = np.where(values == values.dtype.type(), values.dtype.type("nan"), values)
        return torch.from_numpy(self._cast(values, float, np.float32))

    def ids(self, column: int, num_rows: int, table: str, first_id: int = 0) -> Tensor:
        """Convert a column to ids of a table, int64.

        Args:
            column: index of the column.
            num_rows: N of the table.
            table: name of the table, for messages.
            first_id: id of the table's first row in the file.

        Raises:
            TaskError: an id is not a number, or outside the table; the message has its line.
        """
        ids = torch.from_numpy(self._cast(self.columns[column], int, np.int64)) - first_id
        outside = ((ids < 0) | (ids >= num_rows)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise TaskError(
                f"{self.where(row)}: id {int(ids[row]) + first_id} is outside {table!r}, whose ids are "
                f"{first_id} to {num_rows - 1 + first_id}"
            )
        return ids

    def _cast(self, values: np.ndarray[Any, Any], one: Callable[[Any], Any], dtype: Any) -> np.ndarray[Any, Any]:
        try:
            return np.ascontiguousarray(values.astype(dtype))
        except (ValueError, TypeError, OverflowError):
            for row, value in enumerate(values):
                try:
                    number = one(value)
                except (ValueError, TypeError) as e:
                    raise TaskError(f"{self.where(row)}: {str(value)!r} is not a number") from e
                if abs(number) > 2**63 - 1:
                    raise TaskError(f"{self.where(row)}: {str(value)!r} exceeds 64 bits") from None
            raise


def read_blocks(path: Path, columns: Sequence[Column], block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Stream columns of a file.

    The suffix determines the format: `.csv`, `.parquet`, or tab-separated for any other; `.gz` after it is
    decompressed. A heading is required if columns are given by name ("name:type" is read as "name"), and skipped
    otherwise. Comma-separated cells may be quoted; in tab-separated files quotes are literal.

    Raises:
        TaskError: no such file, no such column, or a line with another number of columns.
    """
    if _kind(path) == ".parquet":
        yield from _parquet_blocks(path, columns, block_rows)
        return
    with opened_text(path) as file:
        yield from _rows_in_blocks(path, _cells(path, file), columns, block_rows)


def heading(path: Path) -> list[str]:
    """Return the cells of the first line, without types after a colon; the column names of a Parquet file."""
    if _kind(path) == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    with opened_text(path) as file:
        _, cells = next(_cells(path, file), (0, []))
    return [cell.split(":")[0].strip() for cell in cells]


def read_libfm(path: Path, block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Stream a file of lines `label id:1 id:1 ...`; the columns are the label and the id of each field.

    Raises:
        TaskError: no such file, a value that is not 1, or lines with different numbers of fields.
    """
    fields = None
    with opened_text(path) as file:
        filled = ((number, words) for number, line in enumerate(file, start=1) if (words := line.split()))
        while lines := list(itertools.islice(filled, block_rows)):
            rows = []
            for number, (label, *pairs) in lines:
                split = [pair.partition(":") for pair in pairs]
                fields = len(split) if fields is None else fields
                if not split or len(split) != fields or not all(_is_one(v) for _, _, v in split):
                    raise TaskError(
                        f"{str(path)!r}, line {number}: {' '.join((label, *pairs))[:60]!r} is not a label and "
                        f"{fields} ids, each with the value 1"
                    )
                rows.append([label, *(id_ for id_, _, _ in split)])
            yield Block(path, [number for number, _ in lines], list(np.array(rows).T))
    if fields is None:
        raise TaskError(f"{str(path)!r} is empty")


def _rows_in_blocks(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns: Sequence[Column], block_rows: int
) -> Iterator[Block]:
    top, first = next(rows, (0, []))
    if not first:
        raise TaskError(f"{str(path)!r} is empty")
    names = [cell.split(":")[0].strip() for cell in first]
    at = [_position(path, column, names) for column in columns]
    named = any(isinstance(column, str) for column in columns)
    if not named and _is_number(first[at[0]]):
        rows = itertools.chain([(top, first)], rows)
    width = len(first)
    while block := list(itertools.islice(rows, block_rows)):
        for line, row in block:
            if len(row) != width:
                raise TaskError(f"{str(path)!r}, line {line}: {len(row)} cells, but the first line has {width}")
        yield Block(path, [line for line, _ in block], [np.array([row[i] for _, row in block]) for i in at])


def _cells(path: Path, file: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Iterate over the cells of each non-empty line, with its number."""
    comma = _kind(path) == ".csv"
    reader = csv.reader(file) if comma else csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as e:
        raise TaskError(f"{str(path)!r}, line {reader.line_num}: {e}") from e


def _position(path: Path, column: Column, names: list[str]) -> int:
    if isinstance(column, int):
        if column >= len(names):
            raise TaskError(f"{str(path)!r} has {len(names)} columns, but no column {column}: columns start at 0")
        return column
    if column not in names:
        raise TaskError(f"{str(path)!r} has no column {column!r}: it has {', '.join(names)}")
    return names.index(column)


def _is_one(value: str) -> bool:
    try:
        return not value or float(value) == 1
    except ValueError:
        return False


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return cell == ""
    return True


def _kind(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix


@contextmanager
def opened_text(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 text file, gzipped if its name ends in `.gz`.

    Raises:
        TaskError: the file cannot be opened, or read inside the context.
    """
    if not path.is_file():
        raise TaskError(f"no such data file: {str(path)!r}")
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8-sig", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8-sig", newline="")
        ) as file:
            yield file
    except UnicodeDecodeError as e:
        raise TaskError(f"{str(path)!r} is not a UTF-8 text file: {e}") from e
    except (OSError, EOFError, zlib.error) as e:
        raise TaskError(f"{str(path)!r} cannot be read: {e}") from e


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise TaskError(
            f"{str(path)!r} is a Parquet file, which requires pyarrow: pip install 'cqr-compress[parquet]'"
        ) from e
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as e:
        raise TaskError(f"{str(path)!r} cannot be read as Parquet: {e}") from e


def _parquet_blocks(path: Path, columns: Sequence[Column], block_rows: int) -> Iterator[Block]:
    file = _parquet(path)
    names = list(file.schema_arrow.names)
    wanted = [names[_position(path, column, names)] for column in columns]
    row = 1
    for batch in file.iter_batches(block_rows, columns=wanted):
        lines = range(row, row + batch.num_rows)
        yield Block(path, lines, [batch.column(name).to_numpy(zero_copy_only=False) for name in wanted])
        row += batch.num_rows
