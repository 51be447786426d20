"""Reassign codes while a model trains: rows are encoded anew where a Newton step would take them.

Codebooks stay as they are. Unlike a clustering this takes any number of stored levels, and a cap on the ids that
move keeps a training that is nearly done from being shaken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.clustering.cluster import codebook_layers, listed_layers
from cqr_compress.clustering.gradient_passes import update_columns
from cqr_compress.clustering.gradients import RowGradients
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.clustering.targets import Targets
from cqr_compress.errors import SpecError, TableNotFoundError
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import NoProgress, Progress
from cqr_compress.quantize.base import Effort
from cqr_compress.quantize.code_search import encode_rows
from cqr_compress.table.bitpack import pack_codes, unpack_codes
from cqr_compress.table.spec import STORED

_EFFORT = Effort(refine_rounds=1, restarts=1)
_FLOOR = 0.1  # no direction is free


@dataclass(frozen=True)
class Reassignment:
    """What one reassignment did to one layer.

    Attributes:
        name: of the layer in the model.
        moved: share of ids that got another code in at least one column.
        wanted: share of ids that would have, without the cap.
    """

    name: str
    moved: float
    wanted: float


def reassign_(
    model: nn.Module,
    losses: Losses,
    *,
    max_moved: float = 0.1,
    options: ClusterOptions | None = None,
    progress: Progress | None = None,
) -> list[Reassignment]:
    """Encode the rows of every layer whose codes are all stored anew, in place; codebooks stay.

    Call it between two steps of training, as `cluster_`. Each row aims at where a damped Newton step would take it
    (see `RowGradients.directed_target`) and gets the codes that come closest, if that is closer than the codes it
    has, in a distance that counts each direction by what it costs.

    Args:
        model: changed in place.
        losses: begins a pass over training data, and yields for each batch the losses of its examples.
        max_moved: share of ids that may get other codes, in each column: those whose loss falls most.
        options: step_size, prior_weight, memory and seed are used.
        progress: told of the work.

    Returns:
        One entry for each layer.

    Raises:
        TableNotFoundError: no such layer.
        SpecError: a share outside (0, 1], reduced losses, or a layer that no gradient reached; the model is as it
            was.
        NonFiniteError: codebooks or gradients with NaN or infinity; the model is as it was.
    """
    options, progress = options or ClusterOptions(), progress or NoProgress()
    if not 0 < max_moved <= 1:
        raise SpecError(f"max_moved is {max_moved}: give a share of the ids, above 0 and at most 1")
    layers = reassignable_layers(model)
    if not layers:
        raise TableNotFoundError(
            f"{type(model).__name__} has no layer whose codes are all stored{listed_layers(model)}"
        )
    jobs = [LayerReassignment.begin(name, layer, options, max_moved) for name, layer in layers.items()]
    done = update_columns(model, jobs, losses, options.buffer_bytes, "reassigning codes", progress)
    return [job.finish() for job in done]


def reassignable_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Layers whose codes are all stored, each table once, by the name of the layer in the model."""
    return codebook_layers(model, lambda spec: set(spec.code_sources) == {STORED})


@dataclass(eq=False)
class LayerReassignment:
    """One layer on its way through a reassignment; the layer stays as it is until `finish`."""

    targets: Targets
    max_moved: float
    codes: Tensor  # (N, width), packed
    moved: Tensor  # (N,) bool
    wanted: Tensor  # (N,) bool

    @classmethod
    def begin(cls, name: str, layer: TableLayer, options: ClusterOptions, max_moved: float) -> LayerReassignment:
        none = torch.zeros(layer.num_embeddings, dtype=torch.bool)
        targets = Targets.begin(name, layer, options, gradient_informed=True)
        return cls(targets, max_moved, layer.table_tensors()["codes"].cpu().clone(), none, none.clone())

    @torch.no_grad()
    def update_column(self, column: int, gradients: RowGradients | None) -> None:
        """Encode one column of every row, and take over what gains most."""
        targets, spec = self.targets, self.targets.spec
        assert gradients is not None and targets.prior is not None
        first = gradients.columns.start // spec.sub_dim
        values, vectors = gradients.directions(column - first)
        basis = vectors * (values + _FLOOR).sqrt()  # (S, S): distances are what errors cost
        codebooks = (targets.layer.table_tensors()["codebooks"][column].detach().float() @ basis).cpu()
        found = torch.empty(spec.num_embeddings, spec.num_levels, dtype=torch.int32)
        gain = torch.empty(spec.num_embeddings)
        for ids in targets.id_blocks():
            rows = targets.column(ids, column, None)
            wanted = gradients.directed_target(ids, rows, targets.prior, targets.options.step_size, column - first)
            before = ((wanted - rows) @ basis).square().sum(1).cpu()
            wanted = (wanted @ basis).cpu()
            new = encode_rows(wanted, codebooks[None], _EFFORT, spec.seed + int(ids[0]))[:, 0]
            made = sum(codebooks[level][new[:, level]] for level in range(spec.num_levels))
            precision = (gradients.fisher[ids] + targets.prior.precision).cpu()
            gain[ids.cpu()] = (before - (wanted - made).square().sum(1)) * precision
            found[ids.cpu()] = new.to(torch.int32)
        better = gain > 0
        self.wanted |= better
        limit = max(1, int(self.max_moved * spec.num_embeddings))
        chosen = better.nonzero().flatten()
        if len(chosen) > limit:
            chosen = gain.topk(limit).indices.sort().values
        self.moved[chosen] = True
        at = slice(column * spec.num_levels, (column + 1) * spec.num_levels)
        for ids in targets.id_blocks(chosen):
            codes = unpack_codes(self.codes[ids], spec.num_columns * spec.num_levels, spec.n_bits)
            codes[:, at] = found[ids].to(codes.dtype)
            self.codes[ids] = pack_codes(codes, spec.n_bits)

    @torch.no_grad()
    def finish(self) -> Reassignment:
        """Put the new codes into the layer, the same in all processes."""
        held = self.targets.layer.table_tensors()["codes"]
        held.copy_(self.codes)
        distributed.broadcast_(held)
        usage: Any = float(self.moved.float().mean()), float(self.wanted.float().mean())
        return Reassignment(self.targets.name, *distributed.broadcast_object(usage))
