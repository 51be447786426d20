"""The guard against over-fitting: what is best so far on held-out data, and when to stop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from cqr_compress.errors import TaskError
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.tuned_model import Snapshot


@dataclass(frozen=True)
class Evaluation:
    """One look at held-out data.

    Attributes:
        step: of the optimizer.
        epoch: finished epochs.
        stage: "as given", "refit" or "trained".
        metrics: by name.
        best: whether it was better than all before.
    """

    step: int
    epoch: int
    stage: str
    metrics: dict[str, float]
    best: bool


@dataclass
class EarlyStopping:
    """Keeps the best weights, the given ones first: what is handed back is never worse than what was given.

    Attributes:
        task: names the metric.
        patience: evaluations in a row without a better one after which to stop.
        history: all evaluations.
        best: the weights of the best one.
        num_bad_evaluations: evaluations since then.
    """

    task: Task
    patience: int
    history: list[Evaluation] = field(default_factory=list)
    best: Snapshot | None = None
    num_bad_evaluations: int = 0

    @property
    def given(self) -> Evaluation:
        """The first evaluation, of the weights as they were given."""
        return self.history[0]

    @property
    def best_evaluation(self) -> Evaluation:
        """The last one that was better than all before."""
        return [evaluation for evaluation in self.history if evaluation.best][-1]

    @property
    def improved(self) -> bool:
        """Whether anything was better than what was given."""
        return self.best_evaluation is not self.given

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.num_bad_evaluations >= self.patience

    def offer(self, step: int, epoch: int, stage: str, metrics: Mapping[str, float]) -> bool:
        """Take an evaluation in; whether it is the best so far, so that its weights shall be kept.

        Raises:
            TaskError: the first one's metric is not a number.
        """
        if not self.history:
            value = metrics[self.task.metric]
            if value != value:
                raise TaskError(f"evaluate gave {self.task.metric} = nan for the weights as they were given")
            better = True
        else:
            better = self.task.is_better(metrics, self.best_evaluation.metrics)
        self.history.append(Evaluation(step, epoch, stage, dict(metrics), better))
        if stage != "refit":
            self.num_bad_evaluations = 0 if better else self.num_bad_evaluations + 1
        return better

    def to_plain(self) -> dict[str, Any]:
        """For a state that a run goes on from."""
        return {
            "history": [asdict(evaluation) for evaluation in self.history],
            "best": self.best,
            "num_bad_evaluations": self.num_bad_evaluations,
        }

    def load_plain(self, plain: Mapping[str, Any]) -> None:
        """Go on from `to_plain`."""
        self.history = [Evaluation(**evaluation) for evaluation in plain["history"]]
        self.best, self.num_bad_evaluations = plain["best"], plain["num_bad_evaluations"]
