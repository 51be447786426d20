"""Rows of data files, streamed in blocks: CSV, TSV, libfm and Parquet, plain or gzipped."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from cqr_compress.errors import TaskError

BLOCK_ROWS = 65_536
Column = str | int
"""A column by its name in the heading, or by its number from 0."""


@dataclass(frozen=True)
class Block:
    """Rows of a file.

    Attributes:
        path: the file.
        first_line: number of the first row's line, from 1 (of the row, in Parquet).
        columns: one array (B,) of strings or numbers for each column that was asked for.
    """

    path: Path
    first_line: int
    columns: list[np.ndarray[Any, Any]]

    def where(self, row: int) -> str:
        """Name a row for a message."""
        what = "row" if self.path.suffix == ".parquet" else "line"
        return f"{str(self.path)!r}, {what} {self.first_line + row}"

    def numbers(self, column: int) -> Tensor:
        """A column as float32; empty cells are NaN.

        Raises:
            TaskError: names the line of a cell that is no number.
        """
        values = self.columns[column]
        if values.dtype.kind in "US":
            values = np.where(values == values.dtype.type(), values.dtype.type("nan"), values)
        return torch.from_numpy(self._cast(values, float, np.float32))

    def ids(self, column: int, num_rows: int, table: str, first_id: int = 0) -> Tensor:
        """A column as ids of a table, int64.

        Args:
            column: which.
            num_rows: N of the table.
            table: its name, for messages.
            first_id: number in the file of the table's first row.

        Raises:
            TaskError: names the line of an id that is none, or outside of the table.
        """
        ids = torch.from_numpy(self._cast(self.columns[column], int, np.int64)) - first_id
        outside = ((ids < 0) | (ids >= num_rows)).nonzero()
        if len(outside):
            row = int(outside[0])
            raise TaskError(
                f"{self.where(row)}: id {int(ids[row]) + first_id} is outside of {table!r}, whose ids go from "
                f"{first_id} to {num_rows - 1 + first_id}"
            )
        return ids

    def _cast(self, values: np.ndarray[Any, Any], one: Callable[[Any], Any], dtype: Any) -> np.ndarray[Any, Any]:
        try:
            return np.ascontiguousarray(values.astype(dtype))
        except (ValueError, TypeError, OverflowError):
            for row, value in enumerate(values):
                try:
                    one(value)
                except (ValueError, TypeError) as e:
                    raise TaskError(f"{self.where(row)}: {str(value)!r} is not a number") from e
            raise


def read_blocks(path: Path, columns: Sequence[Column], block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Stream columns of a file.

    The kind of file is told by its name: `.csv`, `.parquet`, anything else is separated by tabs; with `.gz` behind
    it, it is unpacked. A heading is needed where columns are named ("name:type" counts as "name"), else skipped.

    Raises:
        TaskError: no such file, no such column, or a line that has other columns.
    """
    if not path.is_file():
        raise TaskError(f"there is no data file {str(path)!r}")
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".parquet":
        yield from _parquet_blocks(path, columns, block_rows)
        return
    with _open(path) as file:
        reader = csv.reader(file, delimiter="," if kind == ".csv" else "\t")
        try:
            yield from _rows_in_blocks(path, reader, columns, block_rows)
        except csv.Error as e:
            raise TaskError(f"{str(path)!r}, line {reader.line_num}: {e}") from e
        except UnicodeDecodeError as e:
            raise TaskError(f"{str(path)!r} is not a text file: {e}") from e


def heading(path: Path) -> list[str]:
    """The first line's cells, types behind a colon taken off; names of the columns of a Parquet file."""
    if path.suffix == ".parquet":
        return list(_parquet(path).schema_arrow.names)
    if not path.is_file():
        raise TaskError(f"there is no data file {str(path)!r}")
    with _open(path) as file:
        kind = Path(path.name.removesuffix(".gz")).suffix
        cells = next(csv.reader(file, delimiter="," if kind == ".csv" else "\t"), [])
    return [cell.split(":")[0].strip() for cell in cells]


def read_libfm(path: Path, block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Stream a file of lines `label id:1 id:1 ...`: columns are the label and the id of each field.

    Raises:
        TaskError: no such file, a value that is not 1, or lines with different numbers of fields.
    """
    if not path.is_file():
        raise TaskError(f"there is no data file {str(path)!r}")
    first_line, fields = 1, None
    with _open(path) as file:
        while lines := list(itertools.islice(file, block_rows)):
            rows = []
            for number, line in enumerate(lines, start=first_line):
                label, *pairs = line.split() or [""]
                split = [pair.partition(":") for pair in pairs]
                fields = len(split) if fields is None else fields
                if not split or len(split) != fields or not all(_is_one(v) for _, _, v in split):
                    raise TaskError(
                        f"{str(path)!r}, line {number}: {line.strip()[:60]!r} is not a label and {fields} ids, "
                        "each with the value 1"
                    )
                rows.append([label, *(id_ for id_, _, _ in split)])
            yield Block(path, first_line, list(np.array(rows).T))
            first_line += len(lines)


def _rows_in_blocks(path: Path, reader: Any, columns: Sequence[Column], block_rows: int) -> Iterator[Block]:
    first = next(reader, None)
    if first is None:
        raise TaskError(f"{str(path)!r} is empty")
    names = [cell.split(":")[0].strip() for cell in first]
    at = [_position(path, column, names) for column in columns]
    named = any(isinstance(column, str) for column in columns)
    rows = reader if named or not _is_number(first[at[0]]) else itertools.chain([first], reader)
    line = 2 if named or not _is_number(first[at[0]]) else 1
    width = len(first)
    while block := list(itertools.islice(rows, block_rows)):
        if any(len(row) != width for row in block):
            row = next(i for i, row in enumerate(block) if len(row) != width)
            raise TaskError(
                f"{str(path)!r}, line {line + row}: {len(block[row])} cells, and the first line has {width}"
            )
        yield Block(path, line, [np.array([row[i] for row in block]) for i in at])
        line += len(block)


def _position(path: Path, column: Column, names: list[str]) -> int:
    if isinstance(column, int):
        if column >= len(names):
            raise TaskError(f"{str(path)!r} has {len(names)} columns, and no column {column}")
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


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _parquet(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as e:
        raise TaskError(
            f"{str(path)!r} is a Parquet file, which pyarrow reads: pip install 'cqr-compress[parquet]'"
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
        yield Block(path, row, [batch.column(name).to_numpy(zero_copy_only=False) for name in wanted])
        row += batch.num_rows
