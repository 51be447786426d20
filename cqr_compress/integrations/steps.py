"""The schedule of clusterings of a training whose number of steps is known."""

from __future__ import annotations

from typing import Any

from torch import nn

from cqr_compress.clustering.schedule import PAPER_FRACTIONS, ClusterSchedule


def schedule_of(
    model: nn.Module, num_steps: int, num_epochs: int, codes_until: float, arguments: dict[str, Any]
) -> ClusterSchedule:
    """Cluster after each epoch up to `codes_until` of the training, or where the paper does in few epochs.

    Args:
        model: model whose layers are clustered.
        num_steps: optimizer steps of the training.
        num_epochs: its epochs.
        codes_until: fraction of the training after which codes are frozen.
        arguments: arguments of `ClusterSchedule`.

    Raises:
        SpecError: `codes_until` is not in (0, 1].
    """
    if int(num_epochs * codes_until) < 1 or num_steps < num_epochs:
        fractions = tuple(fraction for fraction in PAPER_FRACTIONS if fraction <= codes_until) or (codes_until,)
        return ClusterSchedule.at_fractions(model, num_steps, fractions, **arguments)
    return ClusterSchedule.every_epoch(
        model, num_steps // num_epochs, num_epochs, codes_until=codes_until, **arguments
    )
