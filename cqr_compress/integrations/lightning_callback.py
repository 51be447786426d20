"""Clusterings in a training by Lightning."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import Callback

from cqr_compress.clustering.schedule import ClusterSchedule
from cqr_compress.errors import SpecError
from cqr_compress.integrations.steps import schedule_of


class ClusterCallback(Callback):
    """Clusters the CQR layers of a module after each epoch of the first part of its training.

        trainer = Trainer(max_epochs=8, callbacks=[ClusterCallback()])

    Its state is part of Lightning's checkpoints. With several optimizers the first is reset where rows have moved.
    """

    def __init__(self, codes_until: float = 0.75, **arguments: Any) -> None:
        """Create the callback.

        Args:
            codes_until: fraction of the training after which codes are frozen.
            **arguments: arguments of `ClusterSchedule`, such as `losses` and `options`.
        """
        self._codes_until, self._arguments = codes_until, arguments
        self.schedule: ClusterSchedule | None = None
        self._state: dict[str, Any] | None = None
        self._steps_seen = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Plan the clusterings; a training that goes on continues with those that are left.

        Raises:
            SpecError: a training without an end, or of epochs whose lengths are not known.
        """
        total = trainer.estimated_stepping_batches
        if not 0 <= total < math.inf:  # -1 where only the number of epochs is known
            raise SpecError("the end of the training is not known: give the Trainer max_epochs or max_steps")
        accumulated = max(1, trainer.accumulate_grad_batches)
        batches = min(trainer.num_training_batches, int(total) * accumulated)  # infinite if not known
        per_epoch = max(1, -(-batches // accumulated))
        arguments = {"optimizer": trainer.optimizers[0], **self._arguments}
        epochs = max(1, round(int(total) / per_epoch))
        earlier = self._state or (self.state_dict() if trainer.global_step else {})
        self.schedule = schedule_of(pl_module, int(total), epochs, self._codes_until, arguments)
        self.schedule.steps_done = earlier.get("steps_done", 0)
        self._state = None
        self._steps_seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Count an optimizer step, and cluster if it is scheduled."""
        if self.schedule is not None and trainer.global_step > self._steps_seen:
            self._steps_seen = trainer.global_step
            self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the schedule."""
        return {} if self.schedule is None else self.schedule.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a schedule for the start of the training."""
        self._state = state_dict or None
