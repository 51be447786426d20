"""A schedule of clusterings, for use in a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress.clustering.cluster import cluster_
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.options import Clustering, ClusterOptions
from cqr_compress.errors import SpecError
from cqr_compress.progress import Progress

PAPER_FRACTIONS = (1 / 4, 1 / 2)
"""Fractions of a training of one epoch after which the paper clusters."""


class ClusterSchedule:
    """Cluster the layers of a model after given numbers of optimizer steps.

        schedule = ClusterSchedule.every_epoch(model, steps_per_epoch, num_epochs, optimizer=optimizer)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()

    The pointers are those of the last clustering: if the schedule ends before the rows differ by what the model
    has learnt, they remain as good as random. Train longer, or cluster more often.

    Attributes:
        steps: numbers of optimizer steps after which to cluster, ascending.
        steps_done: number of optimizer steps so far.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: Iterable[int],
        *,
        losses: Losses | None = None,
        counts: Mapping[str, Tensor] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        optimizer_state: str = "reset",
        options: ClusterOptions | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Create a schedule; the other arguments are those of `cluster_`.

        Args:
            model: model whose layers are clustered.
            steps: numbers of optimizer steps, from 1.
            losses: begins a pass over the training data; see `cluster_`.
            counts: counts of the ids, by layer.
            optimizer: optimizer of the codebooks.
            optimizer_state: "reset" or "keep".
            options: see `ClusterOptions`.
            progress: receives the progress of each clustering.

        Raises:
            SpecError: a step below 1.
        """
        self.steps = tuple(sorted(set(steps)))
        if self.steps and self.steps[0] < 1:
            raise SpecError(f"cannot cluster after step {self.steps[0]}: give steps of at least 1")
        self.steps_done = 0
        self._model = model
        self._arguments: dict[str, Any] = {
            "losses": losses, "counts": counts, "optimizer": optimizer, "optimizer_state": optimizer_state,
            "options": options, "progress": progress,
        }  # fmt: skip

    @classmethod
    def every_epoch(
        cls,
        model: nn.Module,
        steps_per_epoch: int,
        num_epochs: int,
        *,
        codes_until: float = 0.75,
        **arguments: Any,
    ) -> ClusterSchedule:
        """Cluster after each epoch of the first part of the training; the codebooks converge in the rest of it.

        Args:
            model: model whose layers are clustered.
            steps_per_epoch: optimizer steps per epoch.
            num_epochs: number of epochs of the training.
            codes_until: fraction of the training after which codes are frozen. It is 0.6 in the paper: after each
                of the first 6 of 10 epochs.
            arguments: arguments of `ClusterSchedule`.

        Raises:
            SpecError: the schedule would have no clustering.
        """
        if steps_per_epoch < 1 or num_epochs < 1 or not 0 < codes_until <= 1:
            raise SpecError(
                f"{num_epochs} epochs of {steps_per_epoch} steps until {codes_until} have no clustering: give at "
                "least 1 epoch of 1 step, and codes_until above 0 and at most 1"
            )
        last = int(num_epochs * codes_until + 1e-9)
        if last < 1:
            raise SpecError(
                f"none of {num_epochs} epochs ends before {codes_until} of the training: use at_fractions instead"
            )
        return cls(model, [steps_per_epoch * epoch for epoch in range(1, last + 1)], **arguments)

    @classmethod
    def at_fractions(
        cls, model: nn.Module, num_steps: int, fractions: Iterable[float] = PAPER_FRACTIONS, **arguments: Any
    ) -> ClusterSchedule:
        """Cluster at fractions of the training; by default at those of the paper for one epoch.

        Args:
            model: model whose layers are clustered.
            num_steps: optimizer steps of the whole training.
            fractions: fractions of the training, in (0, 1].
            arguments: arguments of `ClusterSchedule`.

        Raises:
            SpecError: a fraction outside (0, 1].
        """
        fractions = tuple(fractions)
        if not all(0 < fraction <= 1 for fraction in fractions):
            raise SpecError(f"fractions {fractions} are not all in (0, 1]")
        return cls(model, [max(1, round(num_steps * fraction)) for fraction in fractions], **arguments)

    def step(self) -> list[Clustering] | None:
        """Count an optimizer step, and cluster if it is scheduled; call it after `optimizer.step()`.

        Returns:
            The result of `cluster_`, or None if no clustering was scheduled.
        """
        self.steps_done += 1
        if self.steps_done not in self.steps:
            return None
        return cluster_(self._model, **self._arguments)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that resumes the schedule."""
        return {"steps": list(self.steps), "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from the state of `state_dict`."""
        self.steps, self.steps_done = tuple(state["steps"]), state["steps_done"]
