"""Frequencies of ids: read from files and checked against the tables of a checkpoint."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import require_file
from cqr_compress.errors import CheckpointError, ShapeError, SpecError, TableNotFoundError, brief

_SMALLEST_COUNT, _LARGEST_COUNT = 1e-20, 1e30

Frequencies = Mapping[str, Tensor] | str | Path | Sequence[str | Path]


def read_frequencies(given: Frequencies, num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    """Read the counts of ids for tables.

    Args:
        given: counts (N,) by table; or files, each a path, or a table's name, "=" and a path:

            - `.npy`: (N,) numbers, for the only table of N rows if no name is given;
            - `.safetensors`: (N,) tensors under the names of tables;
            - `.csv`: columns `id,count`, or `table,id,count`; ids that are not listed have count 0.
        num_rows: N of each table that counts are allowed for.

    Returns:
        (N,) float32 counts, at least 0 and not all 0, by table.

    Raises:
        TableNotFoundError: an unknown table, or counts that match several tables.
        ShapeError: counts that do not match the rows of their table.
        CheckpointError: a file that cannot be read.
        SpecError: a table with counts from two files, or an unknown file extension.
    """
    if isinstance(given, Mapping):
        return {
            name: check_counts(name, c, _rows_of(name, num_rows, "the counts given")) for name, c in given.items()
        }
    files = [given] if isinstance(given, (str, Path)) else list(given)
    found: dict[str, Tensor] = {}
    for file in files:
        name, path = _split(str(file))
        for table, counts in _read(path, name, num_rows).items():
            if table in found:
                raise SpecError(
                    f"table {table!r} has frequencies from two files, the second of which is {str(path)!r}"
                )
            where = repr(str(path))
            found[table] = check_counts(table, counts, _rows_of(table, num_rows, where), where)
    return found


def _split(text: str) -> tuple[str | None, Path]:
    name, _, rest = text.partition("=")
    return (name, Path(rest)) if rest and not os.path.exists(text) else (None, Path(text))  # noqa: PTH110  # no errors


def _read(path: Path, name: str | None, num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    if not os.path.exists(path):  # noqa: PTH110  # False for a name that the system refuses
        raise CheckpointError(f"no such file of frequencies: {brief(str(path))}")
    require_file(path)
    if path.suffix == ".npy":
        try:
            # a map, so that an array is as large as its file, whatever its header says
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
                raise TypeError("it is no array of numbers")
            counts = torch.from_numpy(array.astype(np.float64))
        except Exception as e:  # numpy evaluates the header, which can raise almost anything
            raise CheckpointError(f"cannot read numbers from {str(path)!r}: {e}") from e
        return {name or _only_table(path, num_rows, len(counts) if counts.ndim == 1 else None): counts}
    if path.suffix == ".safetensors":
        with open_checkpoint(path) as opened:
            read = {key: entry.stored.read() for key, entry in opened.entries.items()}
        if name is None:
            return read
        if len(read) != 1:
            raise TableNotFoundError(
                f"{str(path)!r} has {len(read)} tensors, each named after its table: omit {name}= before the path"
            )
        return {name: next(iter(read.values()))}
    if path.suffix == ".csv":
        return _read_csv(path, name, num_rows)
    raise SpecError(f"frequencies are read from .npy, .safetensors or .csv files, not from {str(path)!r}")


def _only_table(path: Path, num_rows: Mapping[str, int], count: int | None) -> str:
    names = [name for name, N in num_rows.items() if count in (None, N)]
    if len(names) == 1:
        return names[0]
    tables = ", ".join(f"{name} ({N} rows)" for name, N in num_rows.items())
    what = "it matches none of the tables" if not names else f"it matches {', '.join(names)}"
    number = "" if count is None else f" of {count} numbers"
    raise TableNotFoundError(f"{str(path)!r}{number}: {what}. Pass TABLE={path}. The tables are {tables}")


def _read_csv(path: Path, name: str | None, num_rows: Mapping[str, int]) -> dict[str, Tensor]:
    ids: dict[str, list[int]] = {}
    counts: dict[str, list[float]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            heading = [cell.strip() for cell in next(reader, [])]
            if heading not in (["id", "count"], ["table", "id", "count"]):
                raise CheckpointError(
                    f"{str(path)!r} begins with {','.join(heading)!r}: its first line has to be id,count or "
                    "table,id,count"
                )
            only = "" if len(heading) == 3 else name or _only_table(path, num_rows, None)
            for row in reader:
                if row:
                    if len(row) != len(heading):
                        raise ValueError(f"line {reader.line_num} has {len(row)} cells, the first {len(heading)}")
                    *names, id_, count = row
                    to = names[0].strip() if names else only
                    ids.setdefault(to, []).append(_id(id_))
                    counts.setdefault(to, []).append(float(count))
    except (ValueError, csv.Error, OSError) as e:
        raise e if isinstance(e, CheckpointError) else CheckpointError(f"cannot read {str(path)!r}: {e}") from e
    found = {}
    for table in ids:
        N = _rows_of(table, num_rows, repr(str(path)))
        at = torch.tensor(ids[table], device="cpu")
        if int(at.min()) < 0 or int(at.max()) >= N:
            raise ShapeError(
                f"{str(path)!r} has ids from {int(at.min())} to {int(at.max())}, but {table!r} has {N} rows"
            )
        found[table] = torch.zeros(N, dtype=torch.float64, device="cpu").index_add_(
            0, at, torch.tensor(counts[table], dtype=torch.float64, device="cpu")
        )
    if not found:
        raise CheckpointError(f"{str(path)!r} contains no counts")
    return found


def _id(text: str) -> int:
    number = int(text)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"the id {brief(number)} does not fit in 64 bits")
    return number


def _rows_of(table: str, num_rows: Mapping[str, int], where: str) -> int:
    if table not in num_rows:
        raise TableNotFoundError(
            f"frequencies of {table!r} in {where}: no such table. The tables are {', '.join(num_rows)}"
        )
    return num_rows[table]


def check_counts(table: str, counts: Tensor, N: int, where: str = "the counts given") -> Tensor:
    """Check the counts of a table's N ids; return (N,) float32.

    Raises:
        ShapeError: another shape, or values that are not finite, negative, or all 0.
    """
    if counts.shape != (N,):
        raise ShapeError(
            f"frequencies of {table!r} in {where} have shape {tuple(counts.shape)}: the table has {N} rows"
        )
    counts = counts.double()
    largest = float(counts.max()) if N else 1.0
    if largest and not _SMALLEST_COUNT < largest < _LARGEST_COUNT:  # for float32; only ratios of counts matter
        counts = counts / largest
    if not bool(counts.isfinite().all()) or bool((counts < 0).any()) or not bool((counts > 0).any()):
        raise ShapeError(
            f"frequencies of {table!r} in {where} are invalid: give finite numbers of at least 0, not all 0"
        )
    return counts.float()
