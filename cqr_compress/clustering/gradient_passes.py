"""Updates of the columns of several layers, with as many passes over the data as the memory requires."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from torch import nn

from cqr_compress import distributed
from cqr_compress.clustering.gradients import RowGradients
from cqr_compress.clustering.observe import Losses, backpropagate, observed
from cqr_compress.clustering.targets import Targets
from cqr_compress.errors import CqrCompressWarning
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import Progress


class ColumnUpdate(Protocol):
    """A clustering or reassignment of one layer in progress; the layer is unchanged."""

    @property
    def targets(self) -> Targets:
        """Targets of the layer's rows."""

    def update_column(self, column: int, gradients: RowGradients | None) -> None:
        """Compute the new codes of one column."""


Update = TypeVar("Update", bound=ColumnUpdate)


def update_columns(
    model: nn.Module,
    updates: Sequence[Update],
    losses: Losses | None,
    buffer_bytes: int,
    label: str,
    progress: Progress,
) -> list[Update]:
    """Update every column, after a pass over the data that accumulates its gradients.

    With several processes, each passes over its own part of the data, the sums are all-reduced, and only the first
    process updates columns.

    Returns:
        The completed updates: all, except those of layers that no gradient reached, if options allow to skip them.
    """
    left: set[Update] = set()
    for group in _groups(updates, buffer_bytes if losses else None):
        sums: dict[TableLayer, RowGradients] = {}
        if losses is not None:
            for update, c in group.items():
                layer, S = update.targets.layer, update.targets.spec.sub_dim
                sums[layer] = RowGradients.zeros(layer, slice(c.start * S, c.stop * S))
            progress.start("accumulating gradients", 0, "batches")
            with observed(sums):
                backpropagate(model, losses, progress.advance)
            for found in sums.values():
                for tensor in (found.gradient, found.fisher, found.counts, found.blocks):
                    if tensor is not None:
                        distributed.all_reduce_(tensor)
        left |= {update for update in group if update.targets.is_unreached(sums.get(update.targets.layer))}
        group = {update: columns for update, columns in group.items() if update not in left}
        progress.start(label, sum(map(len, group.values())), "columns")
        for update, columns in group.items():
            gradients = sums.get(update.targets.layer)
            if gradients is not None:
                update.targets.fit_prior(gradients)
            for column in columns if distributed.rank() == 0 else ():
                update.update_column(column, gradients)
                progress.advance()
    for update in updates:
        if update in left and distributed.rank() == 0:
            warnings.warn(
                f"no gradient reached {update.targets.name!r}, which is unchanged",
                CqrCompressWarning,
                stacklevel=3,
            )
    return [update for update in updates if update not in left]


def _groups(updates: Sequence[Update], buffer_bytes: int | None) -> Iterator[dict[Update, range]]:
    """Split the columns of all layers into groups of at least one column whose gradients fit the buffer."""
    group: dict[Update, range] = {}
    free = buffer_bytes or 0
    for update in updates:
        start, spec = 0, update.targets.spec
        for column in range(spec.num_columns):
            need = 4 * spec.num_embeddings * spec.sub_dim
            if buffer_bytes is not None and need > free and group:
                yield group
                group, free, start = {}, buffer_bytes, column
            free -= need
            group[update] = range(start, column + 1)
    yield group
