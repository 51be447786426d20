"""Build a task's model, load a file into it and evaluate it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.checkpoint.compressed_file import is_compressed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.errors import SpecError, TaskError
from cqr_compress.finetuning.rng import EVALUATION, MODEL, RandomStream
from cqr_compress.finetuning.task import Task
from cqr_compress.model.empty_weights import init_empty_weights
from cqr_compress.model.load import load_checkpoint, load_compressed


def own_device(asked: torch.device | str | None = None) -> torch.device:
    """Return the device of this process: the given one, else CUDA if available; LOCAL_RANK is its default index.

    Raises:
        SpecError: the device does not exist.
    """
    try:
        device = torch.device(asked or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as e:
        raise SpecError(f"no device {str(asked)!r}: give cpu, cuda or cuda:1, for example") from e
    if device.type != "cuda":
        return device
    number = int(os.environ.get("LOCAL_RANK", "0")) if device.index is None else device.index
    if number >= torch.cuda.device_count():
        raise SpecError(f"no device cuda:{number}: torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", number)


def load_model(task: Task, path: Path, seed: int, device: torch.device) -> nn.Module:
    """Build the task's model, with a separate stream of random numbers, and load a file into it.

    For a compressed file, dense tables are never allocated, unless `model()` reads its initial values, or draws
    random numbers outside the initialization of embeddings.

    Raises:
        TaskError: `model()` does not return a module.
        SwapError: the file does not match the model.
    """
    with open_checkpoint(path) as checkpoint:
        compressed = is_compressed(checkpoint)
    if compressed:
        try:
            with init_empty_weights():
                model, drawn = _build(task, seed)
            if not drawn:
                load_compressed(model, path, device=device)
                if not _holds_meta(model, set()):
                    return model
        except Exception:  # built again below with allocated weights, which raises errors of the model itself
            pass
    model, _ = _build(task, seed)
    load_checkpoint(model, path)
    return model.to(device)


def _holds_meta(value: Any, seen: set[int]) -> bool:
    """Return whether a module or a collection contains a tensor on the meta device, at any depth."""
    if isinstance(value, Tensor):
        return value.is_meta
    if isinstance(value, nn.Module):
        value = vars(value)
    if not isinstance(value, dict | list | tuple | set) or id(value) in seen:
        return False
    seen.add(id(value))
    return any(_holds_meta(each, seen) for each in (value.values() if isinstance(value, dict) else value))


def _build(task: Task, seed: int) -> tuple[nn.Module, bool]:
    """Build the model; return it, and whether it drew random numbers from torch's generator."""
    with RandomStream.seeded(seed, MODEL).active():
        before = torch.get_rng_state()
        model = task.model()
        drawn = not torch.equal(before, torch.get_rng_state())
    if not isinstance(model, nn.Module):
        raise TaskError(f"model() returned a {type(model).__name__}: it has to return a torch.nn.Module")
    return model, drawn


def evaluate_examples(task: Task, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Evaluate a model with a separate stream of random numbers; see `Task.measure_examples`."""
    model.eval()
    with torch.no_grad(), RandomStream.seeded(seed, EVALUATION).active():
        return task.measure_examples(model)


def evaluate_task(task: Task, model: nn.Module, seed: int) -> dict[str, float]:
    """Evaluate a model with a separate stream of random numbers; metrics are averaged over all processes."""
    mine = {name: float(values.mean()) for name, values in evaluate_examples(task, model, seed).items()}
    every = distributed.all_gather_object(mine)
    return {name: sum(metrics[name] for metrics in every) / len(every) for name in mine}
