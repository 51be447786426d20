"""Names of ids: words of a vocabulary, tokens of a tokenizer, or titles of items."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import read_json, require_file
from cqr_compress.errors import CheckpointError, ShapeError, SpecError, TableNotFoundError, brief

Labels = str | Path | Sequence[str | Path]
_MAX_BYTES = 2**28


def read_labels(given: Labels, num_rows: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Read the names of ids for tables.

    Args:
        given: files, each a path, or a table's name, "=" and a path. Without a name, the table is the one whose
            number of rows is the closest to the number of names, and not below it:

            - `.txt`: a name a line, in the order of ids;
            - `.json`: a tokenizer.json of Hugging Face tokenizers, or an object of ids by name;
            - `.csv`: columns `id,name`.
        num_rows: N of each table.

    Returns:
        Names by id, by table.

    Raises:
        TableNotFoundError: an unknown table, or names that match several tables.
        ShapeError: an id that the table does not have.
        CheckpointError: a file that cannot be read.
        SpecError: a table with names from two files, or an unknown file extension.
    """
    found: dict[str, dict[int, str]] = {}
    for file in [given] if isinstance(given, (str, Path)) else given:
        table, path = _split(str(file))
        names = read_names(path)
        if table is None:
            table = _closest(path, max(names) + 1, num_rows)
        if table not in num_rows:
            raise TableNotFoundError(f"{str(path)!r} names ids of {table!r}; the tables are {', '.join(num_rows)}")
        if table in found:
            raise SpecError(f"table {table!r} has names from two files, the second of which is {str(path)!r}")
        if max(names) >= num_rows[table]:
            raise ShapeError(f"{str(path)!r} names id {max(names)}, but {table!r} has {num_rows[table]} rows")
        found[table] = names
    return found


def check_labels(given: Labels, original: str | Path) -> None:
    """Check before any work is done that files of names can be read, and have ids of rows of a checkpoint.

    Raises:
        ShapeError: an id that no table of the checkpoint has.
        CheckpointError: a file that cannot be read.
        SpecError: an unknown file extension.
    """
    with open_checkpoint(original) as checkpoint:
        shapes = [entry.stored.shape for entry in checkpoint.entries.values()]
    largest = max((shape[0] for shape in shapes if len(shape) == 2), default=0)
    for file in [given] if isinstance(given, (str, Path)) else given:
        _, path = _split(str(file))
        last = max(read_names(path))
        if last >= largest:
            raise ShapeError(f"{str(path)!r} names id {last}, but the largest table has {largest} rows")


def read_names(path: Path) -> dict[int, str]:
    """Read names by id from a file.

    Raises:
        CheckpointError: no such file, no name in it, or a negative id.
        SpecError: an unknown file extension.
    """
    readers = {".txt": _read_lines, ".json": _read_tokenizer, ".csv": _read_csv}
    if path.suffix not in readers:
        raise SpecError(f"names of ids are read from {', '.join(readers)} files, not from {str(path)!r}")
    if require_file(path).st_size > _MAX_BYTES:
        raise CheckpointError(f"{str(path)!r} has more than {_MAX_BYTES >> 20} MiB: names are read into memory")
    try:
        names = readers[path.suffix](path)
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError, csv.Error) as e:
        raise CheckpointError(f"cannot read names of ids from {str(path)!r}: {e}") from e
    if not names or min(names) < 0:
        raise CheckpointError(
            f"{str(path)!r} has no names of ids" if not names else f"{str(path)!r} has negative ids"
        )
    return names


def _split(text: str) -> tuple[str | None, Path]:
    table, _, rest = text.partition("=")
    return (table, Path(rest)) if rest and not os.path.exists(text) else (None, Path(text))  # noqa: PTH110  # no errors


def _closest(path: Path, count: int, num_rows: Mapping[str, int]) -> str:
    able = {name: N for name, N in num_rows.items() if count <= N}
    names = [name for name, N in able.items() if min(able.values()) == N]
    if len(names) == 1:
        return names[0]
    tables = ", ".join(f"{name} ({N} rows)" for name, N in num_rows.items())
    what = f"it matches {', '.join(names)}" if names else "no table has as many rows"
    raise TableNotFoundError(
        f"{str(path)!r} has {count} names: {what}. Pass TABLE={path}. The tables are {tables}"
    )


def _read_lines(path: Path) -> dict[int, str]:
    text = path.read_text(encoding="utf-8-sig", errors="replace").removesuffix("\n")
    return dict(enumerate(text.split("\n"))) if text else {}


def _read_csv(path: Path) -> dict[int, str]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        heading = [cell.strip() for cell in next(rows, [])]
        if heading != ["id", "name"]:
            raise CheckpointError(
                f"{str(path)!r} begins with {brief(','.join(heading))}: its first line has to be id,name"
            )
        names = {}
        for row in rows:
            if len(row) == 1:
                raise CheckpointError(f"line {rows.line_num} of {str(path)!r} has no name: give id,name")
            if row:
                names[int(row[0])] = row[1]
        return names


def _read_tokenizer(path: Path) -> dict[int, str]:
    """Read a tokenizer.json, whose vocabulary is an object of ids by token, or a list of tokens with scores."""
    values = read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("model", {}), dict):
        raise CheckpointError(f"{str(path)!r} is JSON, but no tokenizer.json, and no object of ids by name")
    model: Any = values.get("model", {"vocab": values})
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        names = {i: str(token) for i, (token, _) in enumerate(vocabulary)}
    else:
        names = {int(i): token for token, i in vocabulary.items()}
    if "ByteLevel" in str(values.get("decoder")):
        names = {i: _from_bytes(token) for i, token in names.items()}
    added = values.get("added_tokens", []) if "model" in values else []
    return names | {int(token["id"]): str(token["content"]) for token in added}


def _byte_letters() -> dict[str, int]:
    """Return the bytes by the letters that stand for them in byte-level BPE (Radford et al. 2019)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()


def _from_bytes(token: str) -> str:
    """Decode a token of byte-level BPE, where it is whole letters."""
    if not all(letter in _BYTES for letter in token):
        return token
    try:
        return bytes(_BYTES[letter] for letter in token).decode()
    except UnicodeDecodeError:
        return token
