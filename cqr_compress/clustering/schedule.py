"""When to cluster: a callback for a plain training loop."""

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


class ClusterSchedule:
    """Cluster a model's layers after given steps of training.

        schedule = ClusterSchedule.every_epoch(model, steps_per_epoch, num_epochs, optimizer=optimizer)
        for batch in batches:
            ...
            optimizer.step()
            schedule.step()

    Attributes:
        steps: after which numbers of steps a clustering is done, ascending.
        steps_done: steps so far.
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
        """Plan clusterings; the other arguments are those of `cluster_`.

        Args:
            model: whose layers are clustered.
            steps: numbers of optimizer steps, from 1.
            losses: begins a pass over the training data; see `cluster_`.
            counts: how often each id is used, by layer.
            optimizer: of the codebooks.
            optimizer_state: "reset" or "keep".
            options: see `ClusterOptions`.
            progress: told of the work of each clustering.

        Raises:
            SpecError: a step below 1.
        """
        self.steps = tuple(sorted(set(steps)))
        if self.steps and self.steps[0] < 1:
            raise SpecError(f"cannot cluster after step {self.steps[0]}: steps count from 1")
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
        """Cluster after each epoch up to a part of the training; the model needs time to rest after the last.

        Args:
            model: whose layers are clustered.
            steps_per_epoch: optimizer steps of an epoch.
            num_epochs: epochs of the training.
            codes_until: part of the training after which no clustering is done. The paper's is 0.6: after each of
                the first 6 of 10 epochs.
            arguments: those of `ClusterSchedule`.

        Raises:
            SpecError: no clustering would be done.
        """
        if steps_per_epoch < 1 or num_epochs < 1 or not 0 < codes_until <= 1:
            raise SpecError(
                f"{num_epochs} epochs of {steps_per_epoch} steps, until {codes_until}: there is no clustering"
            )
        last = int(num_epochs * codes_until + 1e-9)
        if last < 1:
            raise SpecError(
                f"no epoch of {num_epochs} ends before {codes_until} of the training: use at_fractions instead"
            )
        return cls(model, [steps_per_epoch * epoch for epoch in range(1, last + 1)], **arguments)

    @classmethod
    def at_fractions(
        cls, model: nn.Module, num_steps: int, fractions: Iterable[float] = (1 / 4, 1 / 2), **arguments: Any
    ) -> ClusterSchedule:
        """Cluster at parts of the training; by default at those of the paper for one epoch.

        Args:
            model: whose layers are clustered.
            num_steps: optimizer steps of the whole training.
            fractions: of it, in (0, 1].
            arguments: those of `ClusterSchedule`.

        Raises:
            SpecError: a fraction outside (0, 1].
        """
        fractions = tuple(fractions)
        if not all(0 < fraction <= 1 for fraction in fractions):
            raise SpecError(f"fractions {fractions} are not all in (0, 1]")
        return cls(model, [max(1, round(num_steps * fraction)) for fraction in fractions], **arguments)

    def step(self) -> list[Clustering] | None:
        """Count a step of the optimizer, and cluster if it is the time; call it after `optimizer.step()`.

        Returns:
            What `cluster_` returns, or None where nothing was done.
        """
        self.steps_done += 1
        if self.steps_done not in self.steps:
            return None
        return cluster_(self._model, **self._arguments)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs."""
        return {"steps": list(self.steps), "steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.steps, self.steps_done = tuple(state["steps"]), state["steps_done"]
