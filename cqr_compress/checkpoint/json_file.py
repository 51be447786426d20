"""JSON files of strangers: indexes of shards and reports."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from cqr_compress.errors import CheckpointError, brief

MAX_JSON_BYTES = 64 * 2**20
"""The index of a checkpoint of 10^5 tensors has 10 MB."""
MAX_JSON_VALUES = 10**6
"""A value of 3 bytes takes up to 200 in memory; an index has one value for each tensor."""


def require_file(path: Path) -> os.stat_result:
    """Refuse what is not a regular file: reading a FIFO or a device could wait for ever.

    Returns:
        The result of `stat`.

    Raises:
        CheckpointError: no such file, a name that the system refuses, or something else than a file.
    """
    try:
        about = path.stat()
    except FileNotFoundError:
        raise CheckpointError(f"no such file or folder: {str(path)!r}") from None
    except (OSError, ValueError) as e:  # too long a name, a loop of links, a null character
        raise CheckpointError(f"{brief(str(path))} cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if not stat.S_ISREG(about.st_mode):
        what = "a folder" if stat.S_ISDIR(about.st_mode) else "a pipe, socket or device"
        raise CheckpointError(f"{str(path)!r} is {what}, not a regular file")
    return about


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        CheckpointError: not a regular file of JSON, more than 64 MiB (16 MiB with other letters than ASCII: one of
            them makes all letters of its string take 4 bytes), more than a million values, or nested too deeply.
    """
    require_file(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_JSON_BYTES + 1)
        limit = MAX_JSON_BYTES if content.isascii() and rb"\u" not in content else MAX_JSON_BYTES // 4
        if len(content) > limit:
            raise CheckpointError(f"{str(path)!r} has more than {limit >> 20} MiB of JSON")
        if sum(content.count(mark) for mark in (b",", b"[", b"{")) > MAX_JSON_VALUES:
            raise CheckpointError(f"{str(path)!r} has more than {MAX_JSON_VALUES:,} values of JSON")
        return json.loads(content.decode())
    except RecursionError:
        raise CheckpointError(f"{str(path)!r} is JSON that is nested too deeply") from None
    except OSError as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    except CheckpointError:
        raise
    except ValueError as e:  # no UTF-8, no JSON, or an integer of more than 4,300 digits
        raise CheckpointError(f"{str(path)!r} is not JSON: {e}") from e
