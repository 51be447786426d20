"""Fused tables: one tensor with the rows of several fields, each of which begins at an offset."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.json_file import require_file
from cqr_compress.errors import CheckpointError, SpecError, TableNotFoundError
from cqr_compress.planning.find import Candidate

_NAMES = ("offsets", "offset", "field_offsets")
_MAX_FIELDS = 100_000
_SMALL_ROWS = 128
_EXACT_SHARE = 0.1
"""Share of a table's bytes that rows of small fields may take, which are stored verbatim."""

Offsets = Mapping[str, Sequence[int] | Tensor] | Sequence[str]


def with_fields(checkpoint: Checkpoint, candidates: Sequence[Candidate], offsets: Offsets = ()) -> list[Candidate]:
    """Find the offsets of fields of fused tables.

    Args:
        checkpoint: the source: an integer tensor `offsets` in the module of a table, or in one around it, has the
            first rows of its fields, as of RecBole's and torchfm's fused features where they are buffers.
        candidates: possible tables.
        offsets: first rows by table; or texts "0,943,2625" or ".npy" files, "TABLE=" before them where several
            tables are selected.

    Returns:
        The candidates, with `field_starts` where there are several fields.

    Raises:
        TableNotFoundError: offsets of a table that is not selected.
        SpecError: offsets that are no ascending rows of their table, from 0.
        CheckpointError: a file that cannot be read.
    """
    selected = {candidate.name: candidate for candidate in candidates if candidate.selected}
    given = dict(offsets) if isinstance(offsets, Mapping) else dict(_read(text, selected) for text in offsets)
    if unknown := [name for name in given if name not in selected]:
        raise TableNotFoundError(f"{unknown[0]!r} has offsets, and is not a selected table: {', '.join(selected)}")
    found = []
    for candidate in candidates:
        starts: tuple[int, ...] = ()
        if candidate.name in given:
            values = torch.as_tensor(given[candidate.name], device="cpu")
            if not _are_starts(values, candidate.shape[0]):
                raise SpecError(
                    f"the offsets of {candidate.name!r} have to be ascending rows of its {candidate.shape[0]:,}, "
                    f"beginning with 0: {values.flatten().tolist()[:5]}"
                )
            starts = tuple(values.tolist())
        elif candidate.selected:
            starts = _of_buffers(checkpoint, candidate)
        found.append(replace(candidate, field_starts=starts if len(starts) > 1 else ()))
    return found


def small_field_rows(
    starts: Sequence[int], shape: tuple[int, int], itemsize: int, budget: float
) -> tuple[int, ...]:
    """Return the rows of small fields, which are stored verbatim within a share of the table's bytes.

    Args:
        starts: first rows of the fields.
        shape: (N, D).
        itemsize: bytes of a value.
        budget: bytes of the table.
    """
    N, D = shape
    fields = sorted(zip(starts, [*starts[1:], N], strict=True), key=lambda field: field[1] - field[0])
    rows: list[int] = []
    for start, stop in fields:
        nbytes = (len(rows) + stop - start) * (D * itemsize + 8)
        if stop - start > _SMALL_ROWS or nbytes > _EXACT_SHARE * budget:
            break
        rows += range(start, stop)
    return tuple(sorted(rows))


def _of_buffers(checkpoint: Checkpoint, candidate: Candidate) -> tuple[int, ...]:
    """Return the offsets in the checkpoint; nothing if there are none."""
    module = candidate.name.split(".")[:-1]
    for depth in range(len(module), max(-1, len(module) - 3), -1):
        for name in _NAMES:
            entry = checkpoint.entries.get(".".join([*module[:depth], name]))
            if entry is not None and _may_be_offsets(entry):
                values = entry.stored.read()
                if _are_starts(values, candidate.shape[0]):
                    return tuple(values.tolist())
    return ()


def _may_be_offsets(entry: TensorEntry) -> bool:
    return len(entry.shape) == 1 and 1 < entry.shape[0] <= _MAX_FIELDS and not entry.dtype.is_floating_point


def _are_starts(values: Tensor, num_rows: int) -> bool:
    """Return whether values are ascending rows of a table, from 0."""
    if values.ndim != 1 or not len(values) or values.dtype.is_floating_point or values.dtype == torch.bool:
        return False
    return bool(values[0] == 0 and (values.diff() > 0).all() and values[-1] < num_rows)


def _read(text: str, selected: Mapping[str, Candidate]) -> tuple[str, Tensor]:
    """Read "TABLE=0,943,2625" or "TABLE=FILE.npy"; without a table, of the only selected one."""
    name, equals, value = text.rpartition("=")
    if not equals:
        if len(selected) != 1:
            raise SpecError(f"offsets {text!r} name no table: give TABLE={text} for one of {', '.join(selected)}")
        name = next(iter(selected))
    if value.endswith(".npy"):
        require_file(Path(value))
        try:
            return name, torch.from_numpy(np.load(value, allow_pickle=False))
        except (OSError, ValueError, TypeError) as e:
            raise CheckpointError(f"{value!r} is no array of numpy with offsets: {e}") from e
    try:
        return name, torch.tensor([int(part) for part in value.split(",")], device="cpu")
    except (ValueError, RuntimeError) as e:
        raise SpecError(f"offsets are {value!r}: give rows such as 0,943,2625, or a .npy file") from e
