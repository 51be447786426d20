"""Early stopping: the best weights on held-out data so far, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.tuned_model import Snapshot


@dataclass(frozen=True)
class Evaluation:
    """One evaluation on held-out data.

    Attributes:
        step: optimizer steps done.
        epoch: finished epochs.
        stage: "as given", "refit", "reassigned" or "trained".
        metrics: metrics by name.
        best: whether it was better than all previous evaluations.
    """

    step: int
    epoch: int
    stage: str
    metrics: dict[str, float]
    best: bool


@dataclass
class EarlyStopping:
    """Early stopping that starts from the given weights, so that the best weights are never worse than those.

    Attributes:
        task: the task, with its metric.
        patience: consecutive evaluations without improvement until training stops.
        history: all evaluations.
        best: weights of the best evaluation.
        num_bad_evaluations: evaluations since the best one, refits and reassignments not counted.
    """

    task: Task
    patience: int
    history: list[Evaluation] = field(default_factory=list)
    best: Snapshot | None = None
    num_bad_evaluations: int = 0

    @property
    def given(self) -> Evaluation:
        """The first evaluation, of the given weights."""
        return self.history[0]

    @property
    def best_evaluation(self) -> Evaluation:
        """The best evaluation: the last one that improved the metric."""
        return [evaluation for evaluation in self.history if evaluation.best][-1]

    @property
    def improved(self) -> bool:
        """Whether any evaluation was better than that of the given weights."""
        return self.best_evaluation is not self.given

    @property
    def exhausted(self) -> bool:
        """Whether training should stop."""
        return self.num_bad_evaluations >= self.patience

    @property
    def was_taken_back(self) -> bool:
        """Whether a reassignment of codes was worse than the weights before it, which are then restored."""
        best = None
        for before, after in pairwise(self.history):
            best = before if before.best else best
            if before.stage == "refit" and best is not None:  # after refits, the best weights are restored
                before = best
            worse = self.task.is_better(before.metrics, after.metrics)
            if after.stage == "reassigned" and (worse or not math.isfinite(after.metrics[self.task.metric])):
                return True
        return False

    def offer(self, step: int, epoch: int, stage: str, metrics: Mapping[str, float], finite: bool) -> bool:
        """Add an evaluation, and return whether it is the best so far; the caller then sets `best`.

        Args:
            step: optimizer steps done.
            epoch: finished epochs.
            stage: see `Evaluation`.
            metrics: metrics by name.
            finite: whether the weights are finite; others are never the best, whatever their metric is.

        Raises:
            TaskError: the metric of the first evaluation is NaN.
        """
        if not self.history:
            value = metrics[self.task.metric]
            if value != value:
                raise TaskError(
                    f"evaluate returned {self.task.metric} = nan for the given weights: it has to be a number"
                )
            better = True
        else:
            better = finite and self.task.is_better(metrics, self.best_evaluation.metrics)
        self.history.append(Evaluation(step, epoch, stage, dict(metrics), better))
        if stage not in ("refit", "reassigned"):
            self.num_bad_evaluations = 0 if better else self.num_bad_evaluations + 1
        return better

    def to_plain(self) -> dict[str, Any]:
        """Convert to plain values, for the state of a run."""
        return {
            "history": [asdict(evaluation) for evaluation in self.history],
            "best": self.best,
            "num_bad_evaluations": self.num_bad_evaluations,
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Restore the values of `to_plain`."""
        self.history = [Evaluation(**evaluation) for evaluation in plain["history"]]
        self.best, self.num_bad_evaluations = plain["best"], plain["num_bad_evaluations"]
