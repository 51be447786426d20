"""The folder of a sweep: its files, and the results so far, from which it is resumed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.formats.open import files_of
from cqr_compress.checkpoint.header import check_metrics
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import output_errors
from cqr_compress.checkpoint.size_report import report_path
from cqr_compress.commands.sweep_report import SweepPoint
from cqr_compress.errors import CheckpointError, OutputExistsError, brief
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.finetuning.task import Task
from cqr_compress.quantize.options import ConvertOptions

STATE_FILE = "sweep.json"


def identity_of(
    path: Path, file_bytes: int, options: ConvertOptions, task: Task | None,
    finetune_options: FinetuneOptions | None, selection: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return what results have to share to be of one sweep."""
    values = {
        "source": path.name,
        "bytes": file_bytes,
        "modified": max((file.stat().st_mtime_ns for file in files_of(path)), default=0),
        "options": asdict(options),
        "task": None if task is None else identity_of_task(task),
        "finetune": None if finetune_options is None else finetune_options.to_json(),
        "selection": {name: _selected(value) for name, value in selection.items()},
    }
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def identity_of_task(task: Task) -> dict[str, Any]:
    """Return what tells a task from others, as it is read back from JSON."""
    values = {"name": task.name, "metric": task.metric, **task.identity}
    found: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return found


def _selected(value: Any) -> str:
    """Describe the tables or rows that are selected: tensors by their values, files by size and time as well."""
    if isinstance(value, Mapping):
        digest = hashlib.sha256()
        for name, numbers in sorted(value.items()):
            if isinstance(numbers, str | Mapping):
                digest.update(f"{name}={numbers!r}".encode())
            else:
                values = torch.as_tensor(numbers, dtype=torch.float64, device="cpu")
                digest.update(name.encode() + values.contiguous().numpy().tobytes())
        return digest.hexdigest()
    described = []
    for item in [value] if isinstance(value, str | Path) else value:
        about = Path(str(item).rpartition("=")[2])
        is_file = isinstance(item, str | Path) and os.path.isfile(about)  # noqa: PTH113  # no errors of long names
        described.append(f"{item} {about.stat().st_size} {about.stat().st_mtime_ns}" if is_file else str(item))
    return ", ".join(described)


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
    if not isinstance(state, dict) or state.get("kind") != "sweep_state":
        raise CheckpointError(f"{str(file)!r} is not the state of a sweep: give another --folder")
    try:
        _check_state(state)
    except (TypeError, ValueError, KeyError, AttributeError) as e:
        raise CheckpointError(
            f"{str(file)!r} is damaged: {type(e).__name__}: {str(e)[:300]}. Remove it with its folder, or give "
            "another --folder."
        ) from e
    if state["identity"] == identity:
        return state
    if not force and (state["points"] or state["infeasible"]):
        other = [name for name in identity if state["identity"].get(name) != identity[name]]
        raise OutputExistsError(
            f"{str(folder)!r} has a sweep that differs in {' and '.join(other)}: give another --folder, or "
            "replace it with --force"
        )
    return fresh


def held_point(folder: Path, state: Mapping[str, Any], name: str) -> SweepPoint | None:
    """Return a size of the results so far; None if there is none, or its file is no longer the one measured."""
    values = state["points"].get(name)
    if values is None:
        return None
    file = folder / values["file"]
    try:
        if file.stat().st_size != values["file_bytes"] or not report_path(file).is_file():
            return None
    except OSError:
        return None
    interval = None if values["interval"] is None else tuple(values["interval"])
    return SweepPoint(**{**values, "file": str(file), "interval": interval})


def _check_state(state: Mapping[str, Any]) -> None:
    """Check the types of a state read from JSON; raises TypeError, ValueError, KeyError or AttributeError."""
    task, infeasible = state["identity"]["task"], state["infeasible"]
    if not all(isinstance(reason, str) for reason in infeasible.values()):
        raise TypeError("a reason of an infeasible size is no text")
    for name, values in state["points"].items():
        point = SweepPoint(**values)
        files = [f"{name}{suffix}" for suffix in (".safetensors", ".tuned.safetensors")]
        if name != f"{point.ratio:g}x" or point.file not in files:  # no other file of the disk
            raise ValueError(f"the size {brief(name)} has the file {brief(point.file)}")
        if type(point.file_bytes) is not int or type(point.finetuned) is not bool:
            raise TypeError(f"the size {brief(name)} has {brief(point.file_bytes)} bytes")
        numbers = ("file_bytes", "relative_mse", "recall_at_10", "loss", "seconds")
        check_metrics({number: values[number] for number in numbers}, f"the size {brief(name)}")
        if (point.metrics is None) != (task is None) or (task and task["metric"] not in values["metrics"]):
            raise ValueError(f"the size {brief(name)} lacks the metric of the task")
        check_metrics({} if point.metrics is None else point.metrics, "metrics")
        low, high = (0.0, 0.0) if point.interval is None else point.interval
        check_metrics({"low": low, "high": high}, "an interval")
