"""Distillation: a dense teacher's outputs or rows as a part of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.errors import TaskError
from cqr_compress.nn import TableLayer
from cqr_compress.tuning.random_streams import RandomState
from cqr_compress.tuning.task import Task


@dataclass
class OutputDistillation:
    """Pulls what the model's forward returns toward what the teacher's returns for the same batch.

    Attributes:
        task: its loss runs both models.
        teacher: in eval mode.
        student: the model.
    """

    task: Task
    teacher: nn.Module
    student: nn.Module

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The task's losses, and the mean squared error of outputs / their mean square.

        Raises:
            TaskError: the loss does not call the model itself, or outputs differ in shape.
        """
        before = RandomState.current()
        with _recorded(self.student) as mine:
            losses = self.task.loss(self.student, batch)
        after = RandomState.current()
        before.set()  # so that negatives are drawn alike
        with torch.no_grad(), _recorded(self.teacher) as wanted:
            self.task.loss(self.teacher, batch)
        after.set()
        if not mine or [t.shape for t in mine] != [t.shape for t in wanted]:
            raise TaskError(
                "distillation of outputs compares what model(...) returns, and the loss "
                + ("got outputs of different shapes" if mine else "never calls model(...)")
                + ": distill rows"
            )
        errors = [
            (a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12)
            for a, b in zip(mine, wanted, strict=True)
        ]
        return losses, torch.stack(errors).mean()


@dataclass
class RowDistillation:
    """Pulls the rows that a batch looks up toward the teacher's.

    Attributes:
        task: its loss runs the model.
        student: the model.
        rows: the teacher's tables (N, D), by layer.
    """

    task: Task
    student: nn.Module
    rows: Mapping[TableLayer, Tensor]
    _errors: list[Tensor] = field(default_factory=list)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The task's losses, and the squared error of rows / their squares, the mean over lookups."""
        self._errors.clear()
        try:
            for layer, wanted in self.rows.items():
                layer.observer = self._observer(wanted)
            losses = self.task.loss(self.student, batch)
        finally:
            for layer in self.rows:
                layer.observer = None
        if not self._errors:
            raise TaskError("distillation of rows found no lookup in the loss")
        return losses, torch.stack(self._errors).mean()

    def _observer(self, wanted: Tensor) -> Any:
        def observe(ids: Tensor, rows: Tensor) -> Tensor:
            target = wanted[ids].to(rows)
            error = (rows - target).float().square().sum()
            self._errors.append(error / target.float().square().sum().clamp_min(1e-12))
            return rows

        return observe


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the floating-point tensors that the model returns."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, args, output: found.extend(_tensors(output)))
    try:
        yield found
    finally:
        hook.remove()


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        output = output.values()
    if hasattr(output, "__iter__") and not isinstance(output, (str, bytes)):
        return [tensor for part in output for tensor in _tensors(part)]
    return []
