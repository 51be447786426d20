"""What fine-tuning needs of a user: the model, batches, a loss, and a metric on held-out data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.errors import TaskError

MODES = ("max", "min")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its data, as functions.

    Attributes:
        name: shown in reports.
        model: builds the architecture whose state_dict the checkpoint belongs to; its weights do not matter.
        train_batches: begins an epoch, counted from 0, and gives its batches: any finite iterable of anything that
            `loss` takes. Called again with the same number it has to give the same batches if random numbers are
            drawn from `torch`, `numpy.random` or `random`, which are seeded alike.
        loss: of a model and a batch: the losses of its examples, (B,), or their mean.
        evaluate: of a model in eval mode, without gradients: metrics by name, on held-out data.
        metric: the figure that decides.
        mode: "max" if more of it is better, or "min".
        logits: of a model and a batch: scores of candidates, (n, V), whose softmax distillation of outputs
            compares; what `model(...)` returns is compared if None.
        frequencies: how often each id of a table is used, (N,), by the name of the tensor, or None.
        optimizer: makes the optimizer of some parameters; AdamW if None.
        identity: what tells it from other tasks of this name, as plain values: a run that goes on after a kill has
            to have the same.
    """

    name: str
    model: Callable[[], nn.Module]
    train_batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], Mapping[str, float]]
    metric: str
    mode: str = "max"
    logits: Callable[[nn.Module, Any], Tensor] | None = None
    frequencies: Callable[[str], Tensor | None] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise TaskError(f"mode is {self.mode!r}: give 'max' if more of {self.metric!r} is better, or 'min'")

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Evaluate a model.

        Raises:
            TaskError: the metric is not among the metrics, or one of them is not a number.
        """
        found = self.evaluate(model)
        if not isinstance(found, Mapping):
            raise TaskError(f"evaluate gave a {type(found).__name__}: it returns metrics by name")
        try:
            metrics = {str(name): float(value) for name, value in found.items()}
        except (TypeError, ValueError) as e:
            raise TaskError(f"evaluate gave {found!r}: its values are numbers") from e
        if self.metric not in metrics:
            raise TaskError(f"metric is {self.metric!r} and evaluate gave {', '.join(metrics) or 'nothing'}")
        return metrics

    def is_better(self, metrics: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Whether the metric is better; NaN never is."""
        new, old = metrics[self.metric], than[self.metric]
        return new > old if self.mode == "max" else new < old
