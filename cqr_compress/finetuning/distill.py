"""Distillation losses: from the outputs or the rows of a dense teacher."""

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
    """Distillation from the teacher's outputs for the same batch.

    If the task has logits, KL distillation from the teacher's logits (Hinton et al. 2015, arXiv:1503.02531);
    otherwise, squared error of the outputs of forward.

    Attributes:
        task: task whose loss runs both models.
        teacher: the dense model, in eval mode.
        student: the model that is trained.
    """

    task: Task
    teacher: nn.Module
    student: nn.Module

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the task's losses and the distillation loss.

        The latter is KL(teacher || student) in nats, averaged over examples, or the mean squared error of the
        outputs of forward / the mean square of the teacher's.

        Raises:
            TaskError: logits are not (n, V), the loss does not call the model itself, or outputs differ in shape.
        """
        before = RandomState.current()
        if self.task.logits is not None:
            losses = self.task.loss(self.student, batch)
            after = RandomState.current()
            before.set()  # both models and the loss have to draw the same candidates and negatives
            mine = self.task.logits(self.student, batch)
            before.set()
            with torch.no_grad():
                wanted = self.task.logits(self.teacher, batch)
            after.set()
            return losses, _divergence(mine, wanted)
        with _recorded(self.student) as outputs:
            losses = self.task.loss(self.student, batch)
        after = RandomState.current()
        before.set()  # both models have to draw the same negatives
        with torch.no_grad(), _recorded(self.teacher) as targets:
            self.task.loss(self.teacher, batch)
        after.set()
        if not outputs or [t.shape for t in outputs] != [t.shape for t in targets]:
            raise TaskError(
                "distillation of outputs compares what model(...) returns, but "
                + ("the teacher's outputs differ in shape" if outputs else "the loss never calls model(...)")
                + ": define logits(model, batch) in the task, or distill rows"
            )
        errors = [
            (a.float() - b.float()).square().mean() / b.float().square().mean().clamp_min(1e-12)
            for a, b in zip(outputs, targets, strict=True)
        ]
        return losses, torch.stack(errors).mean()


@dataclass
class RowDistillation:
    """Distillation from the teacher's rows, on the rows that a batch looks up.

    Attributes:
        task: task whose loss runs the model.
        student: the model that is trained.
        rows: the teacher's tables (N, D), by layer.
    """

    task: Task
    student: nn.Module
    rows: Mapping[TableLayer, Tensor]
    _errors: list[Tensor] = field(default_factory=list)

    def loss(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Compute the task's losses and the distillation loss.

        The latter is the squared error of the rows / their sum of squares, averaged over lookups.

        Raises:
            TaskError: the loss looks up no row.
        """
        self._errors.clear()
        try:
            for layer, wanted in self.rows.items():
                layer.observer = _Comparing(wanted, self._errors)
            losses = self.task.loss(self.student, batch)
        finally:
            for layer in self.rows:
                layer.observer = None
        if not self._errors:
            raise TaskError("distillation of rows requires lookups, but the loss looks up no row: distill outputs")
        return losses, torch.stack(self._errors).mean()


@dataclass(frozen=True)
class _Comparing:
    """An observer that collects the relative squared errors of rows compared with the teacher's (N, D)."""

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
    """Compute KL(wanted || mine) of the softmax of logits (n, V), averaged over examples; -inf masks a candidate.

    Raises:
        TaskError: logits that are not (n, V), or whose shapes differ.
    """
    if mine.ndim != 2 or mine.shape[1] < 2 or mine.shape != wanted.shape:
        raise TaskError(
            f"logits returned shape {tuple(mine.shape)} for the model and {tuple(wanted.shape)} for the teacher: "
            "it has to return scores of two or more candidates for each example, (n, V)"
        )
    log_p, log_q = wanted.float().log_softmax(1), mine.float().log_softmax(1)
    each = (log_p.exp() * (log_p - log_q)).masked_fill(log_p.isneginf(), 0.0)
    return each.sum(1).mean()


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the floating-point tensors that the model returns."""
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
