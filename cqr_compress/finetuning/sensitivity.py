"""How sensitive a task's loss is to errors of each row of a dense checkpoint's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.errors import NonFiniteError, SpecError, TaskError
from cqr_compress.finetuning.batches import Batches
from cqr_compress.finetuning.rng import PASS, RandomStream
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.finetuning.task_model import load_model, own_device
from cqr_compress.model.load import checkpoint_tensors
from cqr_compress.progress import Progress
from cqr_compress.table.blocks import row_blocks

_MAX_BATCHES = 1000
_FLOOR = 0.1
"""Share of the mean sensitivity that every row has: rows that no batch looked up are used later."""


@dataclass(frozen=True)
class Sensitivity:
    """Sensitivity of a task's loss to the tables' errors.

    Attributes:
        importance: factor on the relative squared error of each table, in units of the loss.
        counts: (N,) float32 sensitivity of each row, which weighs its squared error, by table.
    """

    importance: dict[str, float] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)


def measure_sensitivity(
    task: Task | str | Path,
    checkpoint: Checkpoint,
    names: Sequence[str],
    seed: int,
    device: torch.device | str | None,
    progress: Progress,
) -> Sensitivity:
    """Measure the empirical Fisher information of all rows, in one pass over at most 1,000 training batches.

    An error e of a row adds about e H e^T / 2 to the loss. The trace of H is estimated by the sum over batches of
    the squared norms of the row's gradient, whose products of different examples cancel in the mean, as the
    gradient of a trained model does; the error is taken as equal in all directions. The Fisher information is the
    Hessian of the mean loss of a model that fits its data (Martens 2020, arXiv:1412.1193).

    Args:
        task: the task, or a task file.
        checkpoint: the dense checkpoint.
        names: its tables.
        seed: random seed.
        device: device to run the model on; if None, CUDA if available.
        progress: receives a stage with the batches.

    Returns:
        Importance and counts, without tables that the loss does not depend on.

    Raises:
        SpecError: the loss depends on no table.
        NonFiniteError: a gradient is not finite.
        TaskError: the model lacks a table, or `loss` returns no losses.
    """
    task = task if isinstance(task, Task) else load_task_file(task)
    chosen = own_device(device)
    model = load_model(task, checkpoint.path, seed, chosen).eval()
    tables = _parameters(model, checkpoint, names)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tables.values():
        parameter.requires_grad_(True)
    sums = {name: torch.zeros(len(p), dtype=torch.float64, device=p.device) for name, p in tables.items()}
    progress.start("measuring sensitivity", 0, "batches")
    batches = Batches(task, 1, seed, chosen).mine(0, _MAX_BATCHES)
    with torch.enable_grad(), RandomStream.seeded(seed, PASS).active():
        for batch in batches:
            losses = task.checked_losses(model, batch)
            if losses.requires_grad:  # a batch may use none of the tables
                losses.sum().backward()  # type: ignore[no-untyped-call]
            for name, parameter in tables.items():
                if parameter.grad is not None:
                    _add_squares(sums[name], parameter.grad)
                    parameter.grad = None
            progress.advance()
    return _sensitivity(sums, tables)


def _parameters(model: nn.Module, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, nn.Parameter]:
    slots = checkpoint_tensors(model, checkpoint)
    found = {}
    for name in names:
        tensor = slots[name].tensor if name in slots else None
        if not isinstance(tensor, nn.Parameter):
            raise TaskError(f"the task's model has no parameter {name!r}, a table of {str(checkpoint.path)!r}")
        found[name] = tensor
    return found


def _add_squares(sums: Tensor, gradient: Tensor) -> None:
    """Add the squared norms of a gradient's rows, dense or sparse, to sums (N,)."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        sums.index_add_(0, gradient.indices()[0], gradient.values().double().square().sum(1))
        return
    for start, stop in row_blocks(*gradient.shape):
        sums[start:stop] += gradient[start:stop].float().square().sum(1)


def _sensitivity(sums: dict[str, Tensor], tables: dict[str, nn.Parameter]) -> Sensitivity:
    found = Sensitivity()
    for name, total in sums.items():
        N, D = tables[name].shape
        if not total.isfinite().all():
            raise NonFiniteError(f"gradients of the rows of {name!r} contain NaN or infinity")
        if not total.any():
            continue
        rows = tables[name].detach()
        counts = total + _FLOOR * total.mean()
        energy = sum(
            float((rows[start:stop].float().square().sum(1) * counts[start:stop]).sum())
            for start, stop in row_blocks(N, D)
        )
        found.importance[name] = max(energy / D, 1e-300)
        found.counts[name] = counts.cpu().float()
    if not found.counts:
        raise SpecError(f"no gradient reached {', '.join(map(repr, tables))}: the loss does not depend on them")
    return found
