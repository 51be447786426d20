"""Shared parts of the built-in tasks with binary labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.tasks.data.files import DataOptions, ExampleFiles, Examples
from cqr_compress.tasks.data.readers import Block
from cqr_compress.tasks.metrics import click_metrics, gathered

HOLD_OUT = 0.1


@dataclass(frozen=True)
class ModelBuilder:
    cls: Any
    arguments: tuple[Any, ...]

    def __call__(self) -> nn.Module:
        model: nn.Module = self.cls(*self.arguments)
        return model


def read_labels(block: Block, raw: Tensor, kept: Tensor, threshold: float | None) -> Tensor:
    """Return labels of 0 and 1, with -1 as 0; with a threshold, ratings from it are 1.

    Raises:
        TaskError: a missing or invalid label.
    """
    unknown = (raw.isnan() & kept).nonzero()
    if len(unknown):
        raise TaskError(f"{block.where(int(unknown[0]))}: the label is missing")
    if threshold is not None:
        return (raw >= threshold).float()
    other = (kept & (raw != 0) & (raw != 1) & (raw != -1)).nonzero()
    if len(other):
        row = int(other[0])
        raise TaskError(
            f"{block.where(row)}: the label is {raw[row]:g}. Labels have to be 0 and 1 (or -1 and 1); for ratings "
            "set threshold, such as threshold=4"
        )
    return (raw > 0).float()


def click_task(
    name: str, options: DataOptions, hold_out: float, metric: str, build: Any, read: Any, logits: Any
) -> Task:
    """Create a task whose examples end with a label, and whose model returns a logit for each example."""
    if not 0 < hold_out <= 0.5:
        raise TaskError(f"setting hold_out of task {name} is {hold_out}: give a share of at most 0.5")
    if metric not in ("auc", "bce"):
        raise TaskError(f"setting metric of task {name} is {metric!r}: give auc or bce")
    files = ExampleFiles(options, read, hold_out)

    def loss(model: nn.Module, batch: Examples) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits(model, batch), batch[-1], reduction="none")

    def evaluate(model: nn.Module) -> Mapping[str, float]:
        device = next(model.parameters()).device
        found: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in files.held_out_batches():
            found.append(logits(model, tuple(part.to(device) for part in batch)))
            labels.append(batch[-1])
        scores = gathered(found)
        if not len(scores):
            raise TaskError("there is no held-out example to evaluate on: give more data, or an --eval-file")
        return click_metrics(scores, gathered(labels))

    return Task(
        name=name, model=build, train_batches=files.train_batches, loss=loss, evaluate=evaluate, metric=metric,
        mode="max" if metric == "auc" else "min", identity=options.identity,
    )  # fmt: skip
