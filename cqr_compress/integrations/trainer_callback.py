"""Clusterings in a training by the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from cqr_compress.clustering.schedule import ClusterSchedule
from cqr_compress.integrations.steps import schedule_of


class ClusterCallback(TrainerCallback):
    """Clusters the CQR layers of a model after each epoch of the first part of its training.

    Trainer(model, arguments, train_dataset=data, callbacks=[ClusterCallback()])
    """

    def __init__(self, codes_until: float = 0.75, **arguments: Any) -> None:
        """Create the callback.

        Args:
            codes_until: fraction of the training after which codes are frozen.
            **arguments: arguments of `ClusterSchedule`, such as `losses` and `options`.
        """
        self._codes_until, self._arguments = codes_until, arguments
        self.schedule: ClusterSchedule | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Plan the clusterings; a training that is resumed continues with those that are left."""
        optimizer = kwargs.get("optimizer")
        inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate
        arguments = {"optimizer": inner, **self._arguments}
        epochs = max(1, round(state.num_train_epochs))
        self.schedule = schedule_of(kwargs["model"], state.max_steps, epochs, self._codes_until, arguments)
        self.schedule.steps_done = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count an optimizer step, and cluster if it is scheduled."""
        if self.schedule is not None:
            self.schedule.step()
