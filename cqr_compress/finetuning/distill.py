"""Distillation: a dense teacher's outputs or rows as a part of the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.rng import RandomState
from cqr_compress.finetuning.task import Task
from cqr_compress.nn.table_layer import TableLayer


@dataclass
class OutputDistillation:
    """Pulls what the model answers toward what the teacher answers for the same batch.

    Where the task has logits, these are the softmax of both (Hinton et al. 2015, arXiv:1503.02531), otherwise what
    their forward returns.

    Attributes:
        task: its loss runs both models.
        teacher: in eval mode.
        student: the model.
    """

    task: Task
    teacher: nn.Module
    student: nn.Module

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The task's losses, and how far outputs are from the teacher's.

        That is KL(teacher || student) in nats, the mean over examples, or the mean squared error of what forward
        returns / its mean square.

        Raises:
            TaskError: logits are not (n, V), the loss does not call the model itself, or outputs differ in shape.
        """
        before = RandomState.current()
        if self.task.logits is not None:
            losses = self.task.loss(self.student, batch)
            after = RandomState.current()
            before.set()  # so that both, and the loss, draw candidates and negatives alike
            mine = self.task.logits(self.student, batch)
            before.set()
            with torch.no_grad():
                wanted = self.task.logits(self.teacher, batch)
            after.set()
            return losses, _divergence(mine, wanted)
        with _recorded(self.student) as outputs:
            losses = self.task.loss(self.student, batch)
        after = RandomState.current()
        before.set()  # so that negatives are drawn alike
        with torch.no_grad(), _recorded(self.teacher) as targets:
            self.task.loss(self.teacher, batch)
        after.set()
        if not outputs or [t.shape for t in outputs] != [t.shape for t in targets]:
            raise TaskError(
                "distillation of outputs compares what model(...) returns, and the loss "
                + ("got outputs of different shapes" if outputs else "never calls model(...)")
                + ": define logits(model, batch) in the task, or distill rows"
            )
        errors = [
            (a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12)
            for a, b in zip(outputs, targets, strict=True)
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
                layer.observer = _Comparing(wanted, self._errors)
            losses = self.task.loss(self.student, batch)
        finally:
            for layer in self.rows:
                layer.observer = None
        if not self._errors:
            raise TaskError("distillation of rows found no lookup in the loss")
        return losses, torch.stack(self._errors).mean()


@dataclass(frozen=True)
class _Comparing:
    """An observer that notes how far rows are from the teacher's (N, D)."""

    wanted: Tensor
    errors: list[Tensor]

    def on_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        target = self.wanted[ids].to(rows)
        error = (rows - target).float().square().sum()
        self.errors.append(error / target.float().square().sum().clamp_min(1e-12))
        return rows

    def on_matmul(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        return h @ self.on_lookup(ids, rows).T


def _divergence(mine: Tensor, wanted: Tensor) -> Tensor:
    """KL(wanted || mine) of the softmax of logits (n, V), the mean over examples; -inf leaves a candidate out.

    Raises:
        TaskError: other shapes, or shapes that differ.
    """
    if mine.ndim != 2 or mine.shape[1] < 2 or mine.shape != wanted.shape:
        raise TaskError(
            f"logits gave {tuple(mine.shape)}, and {tuple(wanted.shape)} for the teacher: it returns scores of "
            "two or more candidates for each example, (n, V)"
        )
    log_p, log_q = wanted.float().log_softmax(1), mine.float().log_softmax(1)
    each = (log_p.exp() * (log_p - log_q)).masked_fill(log_p.isneginf(), 0.0)
    return each.sum(1).mean()


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
