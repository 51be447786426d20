"""The folder of a sweep: its files, and the results so far, from which it is resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.formats.open import files_of
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import output_errors
from cqr_compress.errors import CheckpointError, OutputExistsError
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.task import Task
from cqr_compress.quantize.options import ConvertOptions

STATE_FILE = "sweep.json"


def identity_of(
    path: Path, file_bytes: int, options: ConvertOptions, task: Task | None,
    finetune_options: FinetuneOptions | None, selection: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return what results have to share to be of one sweep."""
    given = selection["frequencies"]
    if isinstance(given, Mapping):
        digest = hashlib.sha256()
        for name, counts in sorted(given.items()):
            digest.update(name.encode() + torch.as_tensor(counts, device="cpu").double().numpy().tobytes())
        given = digest.hexdigest()
    values = {
        "source": path.name,
        "bytes": file_bytes,
        "modified": max((file.stat().st_mtime_ns for file in files_of(path)), default=0),
        "options": asdict(options),
        "task": None if task is None else {"name": task.name, "metric": task.metric, **task.identity},
        "finetune": None if finetune_options is None else finetune_options.to_json(),
        "selection": {name: str(value) for name, value in selection.items() if name != "frequencies"},
        "frequencies": str(given),
    }
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def read_state(folder: Path, identity: dict[str, Any], force: bool) -> dict[str, Any]:
    """Read the results so far; a new folder if there are none.

    Raises:
        OutputExistsError: the folder has another sweep, and `force` is False.
        CheckpointError: a folder that no sweep made, or a damaged file in it.
    """
    fresh = {"kind": "sweep_state", "identity": identity, "points": {}, "infeasible": {}}
    file = folder / STATE_FILE
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OutputExistsError(f"{str(folder)!r} exists, and no sweep made it: give another --folder")
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        return fresh
    state = read_json(file)
    if (
        not isinstance(state, dict)
        or state.get("kind") != "sweep_state"
        or not isinstance(state.get("points"), dict)
    ):
        raise CheckpointError(f"{str(file)!r} is not the state of a sweep: give another --folder")
    if state.get("identity") == identity:
        return state
    if not force:
        other = [name for name in identity if (state.get("identity") or {}).get(name) != identity[name]]
        raise OutputExistsError(
            f"{str(folder)!r} has a sweep with another {' and '.join(other)}: give another --folder, or "
            "replace it with --force"
        )
    return fresh
