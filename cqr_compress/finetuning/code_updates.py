"""Updates of codes in fine-tuning: reclustering or reassignment between epochs, or training of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cqr_compress.clustering.cluster import cluster_, clusterable_layers
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.reassign import reassign_, reassignable_layers
from cqr_compress.errors import TableNotFoundError, TaskError
from cqr_compress.finetuning.latent_rows import has_trainable_codes
from cqr_compress.finetuning.options import FinetuneOptions
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import Progress
from cqr_compress.table.spec import TrellisSpec


@dataclass(frozen=True)
class CodeUpdates:
    """Updates the codes of a model's tables.

    Attributes:
        model: the model, modified in place.
        tables: its layers, by the names of their tables.
        options: options of fine-tuning.
        counts: counts of the ids, (N,) by table, if known.
        progress: receives the progress of the work.
    """

    model: nn.Module
    tables: Mapping[str, TableLayer]
    options: FinetuneOptions
    counts: Mapping[str, Tensor]
    progress: Progress

    def kind(self, per_example: bool) -> str:
        """Choose the update of codes between epochs: "recluster", "reassign", "train" or "frozen".

        Args:
            per_example: whether the task's loss gives the losses of the examples.

        Raises:
            TableNotFoundError: no table supports the requested update.
            TaskError: the requested update requires the losses of the examples.
        """
        asked = self.options.codes
        needs_losses = self.options.gradient_informed or asked == "reassign"
        if asked == "auto":
            if per_example and reassignable_layers(self.model):
                return "reassign"
            can = clusterable_layers(self.model) and (per_example or not needs_losses)
            return "recluster" if can else "frozen"
        if asked != "frozen" and needs_losses and asked != "train" and not per_example:
            raise TaskError(
                f"codes is {asked!r}, which requires the losses of the examples, but the task's loss is one "
                "number for a batch: compute it with reduction='none'"
            )
        if asked == "recluster" and not clusterable_layers(self.model):
            raise TableNotFoundError(
                "codes is 'recluster', but no table has one level of stored codes: give 'reassign' or 'auto'"
            )
        if asked == "reassign" and not reassignable_layers(self.model):
            raise TableNotFoundError(
                "codes is 'reassign', but no table has all of its codes stored: give 'recluster' or 'auto'"
            )
        if asked == "train" and not self.trainable_tables():
            raise TableNotFoundError(
                "codes is 'train', but no table has all of its codes stored and at most 2^28 values: give "
                "'reassign' or 'auto'"
            )
        return asked

    def trainable_tables(self) -> dict[str, TableLayer]:
        """Return the tables whose codes can be trained."""
        return {name: layer for name, layer in self.tables.items() if has_trainable_codes(layer.spec)}

    @property
    def may_be_taken_back(self) -> bool:
        """Whether to evaluate after a reassignment: a trellis follows targets so closely that rows can overfit."""
        trellis = any(isinstance(layer.spec, TrellisSpec) for layer in self.tables.values())
        return self.options.codes == "auto" and trellis

    def is_due(self, epoch: int) -> bool:
        """Return whether codes are updated after `epoch` epochs; 0 is before the first."""
        last = int(self.options.epochs * self.options.codes_until + 1e-9)
        return self.options.codes_until > 0 and epoch <= last and epoch < self.options.epochs

    def change(self, kind: str, losses: Losses, optimizer: torch.optim.Optimizer) -> str:
        """Recluster or reassign the codes, and return a log line."""
        clustering = replace(self.options.clustering, skip_unreached=True)
        if kind == "recluster":
            named = {id(layer): name for name, layer in self.tables.items()}
            counts = {
                path: self.counts[named[id(layer)]]
                for path, layer in clusterable_layers(self.model).items()
                if named.get(id(layer)) in self.counts
            }
            done = cluster_(
                self.model, losses if self.options.gradient_informed else None, counts=counts, optimizer=optimizer,
                options=clustering, progress=self.progress,
            )  # fmt: skip
            return "reclustered, " + ", ".join(f"{d.name} {d.moved:.0%} of ids moved" for d in done)
        moved = reassign_(
            self.model, losses, max_moved=self.options.max_moved, options=clustering, progress=self.progress
        )
        return "reassigned, " + ", ".join(
            f"{d.name} {d.moved:.0%} of ids got other codes (without the limit {d.wanted:.0%})" for d in moved
        )
