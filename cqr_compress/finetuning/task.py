"""Interface of a task: the model, training batches, a loss, and metrics on held-out data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.errors import TaskError, brief

MODES = ("max", "min")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model and its data, as functions.

    Attributes:
        name: name in reports.
        model: builds the architecture of the checkpoint's state_dict; its initial weights are replaced.
        train_batches: maps an epoch, from 0, to its batches: a finite iterable of anything that `loss` accepts.
            For the same epoch it has to give the same batches, provided that random numbers are drawn from
            `torch`, `numpy.random` or `random`, which are seeded with the same values.
        loss: maps a model and a batch to the losses of its examples, (B,), or to their mean.
        evaluate: maps a model in eval mode to metrics on held-out data, by name; called without gradients. A
            metric is a number, or the values of all examples, (n,), whose mean it is: a sweep needs these for its
            intervals.
        metric: name of the metric that selects the best weights.
        mode: "max" if a larger metric is better, or "min".
        logits: maps a model and a batch to scores of candidates, (n, V), for distillation of outputs, which uses
            their softmax; if None, it uses the output of `model(...)`.
        frequencies: maps the name of a table to counts of its ids, (N,), or None.
        optimizer: creates the optimizer of a list of parameters; AdamW if None.
        identity: plain values that distinguish the task from others of the same name; a resumed run has to have
            the same values.
    """

    name: str
    model: Callable[[], nn.Module]
    train_batches: Callable[[int], Iterable[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    evaluate: Callable[[nn.Module], Mapping[str, float | Tensor | Sequence[float]]]
    metric: str
    mode: str = "max"
    logits: Callable[[nn.Module, Any], Tensor] | None = None
    frequencies: Callable[[str], Tensor | None] | None = None
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise TaskError(f"mode is {self.mode!r}: give 'max' if a larger {self.metric!r} is better, or 'min'")

    def checked_losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Compute the losses of a batch's examples, (B,), or their mean.

        Raises:
            TaskError: `loss` returns something else.
        """
        losses = self.loss(model, batch)
        if not isinstance(losses, Tensor) or losses.ndim > 1 or losses.numel() == 0:
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise TaskError(
                f"loss returned {shape}: it has to return the losses of a batch's examples (B,), or their mean"
            )
        if not losses.is_floating_point():
            raise TaskError(f"loss returned {losses.dtype}: it has to return real floating-point losses")
        return losses

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Evaluate a model.

        Raises:
            TaskError: see `measure_examples`.
        """
        return {name: float(values.mean()) for name, values in self.measure_examples(model).items()}

    def measure_examples(self, model: nn.Module) -> dict[str, Tensor]:
        """Evaluate a model for each example: (n,) float64 by metric, of one value where there is only a number.

        Raises:
            TaskError: `evaluate` does not return the task's metric, or returns something that is not a number.
        """
        found = self.evaluate(model)
        if not isinstance(found, Mapping):
            raise TaskError(f"evaluate returned a {type(found).__name__}: it has to return metrics by name")
        try:
            metrics = {str(name): _values(value) for name, value in found.items()}
        except (TypeError, ValueError, RuntimeError) as e:
            raise TaskError(f"evaluate returned {brief(str(found))}: its values have to be numbers") from e
        if self.metric not in metrics:
            raise TaskError(
                f"metric is {self.metric!r}, but evaluate returned {', '.join(metrics) or 'no metrics'}: it has "
                "to return that metric"
            )
        return metrics

    def is_better(self, metrics: Mapping[str, float], than: Mapping[str, float]) -> bool:
        """Return whether the metric is strictly better; one that is not finite never is."""
        new, old = metrics[self.metric], than[self.metric]
        return math.isfinite(new) and (new > old if self.mode == "max" else new < old)


def _values(value: Any) -> Tensor:
    """Convert a number, or the values of examples, to (n,) float64; raises TypeError or ValueError."""
    if isinstance(value, str):
        raise TypeError("a text is no metric")
    values = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach().flatten()
    if not len(values):
        raise ValueError("a metric of no example")
    return values
