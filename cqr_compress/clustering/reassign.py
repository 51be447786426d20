"""Reassignment of codes during training: codes are reassigned toward a damped Newton target of each row.

Codebooks are unchanged. Unlike clustering, this supports any number of stored levels and trellises, and a limit on
the share of ids that change keeps the training stable.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.clustering.cluster import layers_with, listed_layers
from cqr_compress.clustering.gradient_passes import update_columns
from cqr_compress.clustering.gradients import RowGradients
from cqr_compress.clustering.observe import Losses
from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.clustering.targets import Targets
from cqr_compress.errors import SpecError, TableNotFoundError
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import NoProgress, Progress
from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.code_search import encode_rows
from cqr_compress.quantize.trellis_search import search_paths
from cqr_compress.table.bitpack import pack_codes, unpack_codes
from cqr_compress.table.decode import gather_rows
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.spec import STORED, AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.tiers import stored_codes, tiers_of
from cqr_compress.table.trellis import gain_table, value_table

_EFFORT = FitEffort(refine_rounds=1, restarts=1)
_FLOOR = 0.1  # keeps the metric positive definite


@dataclass(frozen=True)
class Reassignment:
    """Result of reassigning the codes of one layer.

    Attributes:
        name: name of the layer in the model.
        moved: share of ids whose code changed in at least one column.
        wanted: share of ids whose code would change without the limit.
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
    """Reassign the codes of every layer whose codes are all stored, in place; codebooks are unchanged.

    Call it between two training steps, as `cluster_`. The target of each row is a damped Newton step (see
    `RowGradients.directed_target`). The row gets the codes nearest to its target under the Fisher metric of the
    column, if they are nearer than its current codes.

    Args:
        model: modified in place.
        losses: begins a pass over training data, and yields for each batch the unreduced losses of its examples.
        max_moved: maximum share of ids that change, in each column: those whose loss is expected to decrease most.
        options: step_size, prior_weight, memory limits, skip_unreached and seed are used.
        progress: receives the progress of the work.

    Returns:
        One result for each layer.

    Raises:
        TableNotFoundError: no layer has all of its codes stored.
        SpecError: a share outside (0, 1], reduced losses, or a layer that no gradient reached; the model is
            unchanged.
        NonFiniteError: codebooks or gradients with NaN or infinity; the model is unchanged.
    """
    options, progress = options or ClusterOptions(), progress or NoProgress()
    if not 0 < max_moved <= 1:
        raise SpecError(f"max_moved is {max_moved}: give a share of ids above 0 and at most 1")
    layers = reassignable_layers(model)
    if not layers:
        raise TableNotFoundError(
            f"{type(model).__name__} has no layer whose codes are all stored{listed_layers(model)}: load a table "
            "compressed with pq, rq, prq, or cqr and helper stored or none"
        )
    updates = [
        (TrellisReassignment if isinstance(layer.spec, TrellisSpec) else LayerReassignment).begin(
            name, layer, options, max_moved
        )
        for name, layer in layers.items()
    ]
    done = update_columns(model, updates, losses, options.buffer_bytes, "reassigning codes", progress)
    return [update.finish() for update in done]


def reassignable_layers(model: nn.Module) -> dict[str, TableLayer]:
    """Find the layers whose codes are all stored, each table once, by name in the model."""
    return layers_with(model, _is_reassignable)


def _is_reassignable(spec: AnySpec) -> bool:
    return isinstance(spec, TrellisSpec) or (isinstance(spec, CodebookSpec) and set(spec.code_sources) == {STORED})


@dataclass(eq=False)
class LayerReassignment:
    """A reassignment of one layer in progress; the layer is unchanged until `finish`."""

    targets: Targets
    max_moved: float
    codes: Tensor  # (N, width), packed; as from gather_rows
    moved: Tensor  # (N,) bool
    wanted: Tensor  # (N,) bool

    @classmethod
    def begin(cls, name: str, layer: TableLayer, options: ClusterOptions, max_moved: float) -> LayerReassignment:
        none = torch.zeros(layer.num_embeddings, dtype=torch.bool, device="cpu")
        targets = Targets.begin(name, layer, options, gradient_informed=True)
        ids = torch.arange(layer.num_embeddings, device=layer.device)
        codes = gather_rows(layer.spec, layer.table_tensors(), ids)["codes"].cpu()
        return cls(targets, max_moved, codes, none, none.clone())

    @torch.no_grad()
    def update_column(self, column: int, gradients: RowGradients | None) -> None:
        """Re-encode one column of every row, and apply the changes with the largest expected gain."""
        targets, spec = self.targets, self.targets.spec
        assert gradients is not None and targets.prior is not None and isinstance(spec, CodebookSpec)
        first = gradients.columns.start // spec.sub_dim
        values, vectors = gradients.directions(column - first)
        basis = vectors * (values + _FLOOR).sqrt()  # (S, S): Euclidean distances become the Fisher metric
        codebooks = (targets.layer.table_tensors()["codebooks"][column].detach().float() @ basis).cpu()
        found = torch.empty(spec.num_embeddings, spec.num_levels, dtype=torch.int32, device="cpu")
        gain = torch.empty(spec.num_embeddings, **CPU_FLOAT)
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
        chosen = self.choose(gain)
        at = slice(column * spec.num_levels, (column + 1) * spec.num_levels)
        for ids in targets.id_blocks(chosen):
            codes = unpack_codes(self.codes[ids], spec.num_columns * spec.num_levels, spec.n_bits)
            codes[:, at] = found[ids].to(codes.dtype)
            self.codes[ids] = pack_codes(codes, spec.n_bits)

    def choose(self, gain: Tensor) -> Tensor:
        """Choose the ids to change by the expected decrease of their loss (N,): (m,) int64 ascending."""
        better = gain > 0
        self.wanted |= better
        limit = max(1, int(self.max_moved * len(gain)))
        chosen = better.nonzero().flatten()
        if len(chosen) > limit:
            chosen = gain.topk(limit).indices.sort().values
        self.moved[chosen] = True
        return chosen

    def stored(self) -> Tensor:
        """Return the codes as the layer holds them."""
        return self.codes

    @torch.no_grad()
    def finish(self) -> Reassignment:
        """Write the new codes to the layer, identically in all processes."""
        held = self.targets.layer.table_tensors()["codes"]
        held.copy_(self.stored())
        distributed.broadcast_(held)
        usage: Any = float(self.moved.float().mean()), float(self.wanted.float().mean())
        return Reassignment(self.targets.name, *distributed.broadcast_object(usage))


class TrellisReassignment(LayerReassignment):
    """A reassignment of the paths of a trellis-coded layer; gains stay, and the metric is taken as diagonal."""

    @torch.no_grad()
    def update_column(self, column: int, gradients: RowGradients | None) -> None:
        """Search the path of every row again, and apply the changes with the largest expected gain."""
        targets, spec = self.targets, self.targets.spec
        assert gradients is not None and targets.prior is not None and isinstance(spec, TrellisSpec)
        assert gradients.blocks is not None
        tensors = {short: t.detach() for short, t in targets.layer.table_tensors().items()}
        metric = gradients.blocks[0].diagonal() / gradients.fisher.sum().clamp_min(1e-30) + _FLOOR
        found, gain = self.codes.clone(), torch.empty(spec.num_embeddings, **CPU_FLOAT)
        for ids in targets.id_blocks():
            rows = targets.layer.lookup_unrotated(ids)
            wanted = gradients.directed_target(ids, rows, targets.prior, targets.options.step_size, column)
            factor = torch.ones(len(ids), 1, dtype=rows.dtype, device=rows.device)
            if spec.gain_bits:
                codes = tensors["row_gain"][ids].long()
                factor = gain_table(tensors["gain_range"].float())[codes][:, None]
            tiers = tiers_of(tensors, ids) if spec.has_tiers else torch.zeros_like(ids)
            made, codes = _searched(spec, tensors, wanted / factor, metric, tiers)
            before, after = (((wanted - r).square() * metric).sum(1) for r in (rows, factor * made))
            gain[ids.cpu()] = ((before - after) * (gradients.fisher[ids] + targets.prior.precision)).cpu()
            found[ids.cpu()] = codes.cpu()
        chosen = self.choose(gain)
        self.codes[chosen] = found[chosen]

    def stored(self) -> Tensor:
        """Return the codes as the layer holds them."""
        spec, tensors = self.targets.spec, self.targets.layer.table_tensors()
        if not (isinstance(spec, TrellisSpec) and spec.has_tiers):
            return self.codes
        tiers = tiers_of(tensors, torch.arange(spec.num_embeddings, device=self.targets.layer.device))
        return stored_codes(spec, self.codes, tiers.cpu())


def _searched(
    spec: TrellisSpec, tensors: Mapping[str, Tensor], wanted: Tensor, metric: Tensor, tiers: Tensor
) -> tuple[Tensor, Tensor]:
    """Search the paths of rows (B, P) under a diagonal metric (P,): the new rows, and codes (B, row_nbytes)."""
    values, made = value_table(spec, tensors).float(), torch.zeros_like(wanted)
    codes = torch.zeros(len(wanted), spec.row_nbytes, dtype=torch.uint8, device=wanted.device)
    for tier, row_nbytes in enumerate(spec.tier_nbytes):
        here, rates = (tiers == tier).nonzero().flatten(), tensors["dim_rates"][tier]
        kept = (rates > 0).nonzero().flatten()
        scale = tensors["dim_scale"][tier, kept].float()
        states, packed = search_paths(
            wanted[here][:, kept] / scale, metric[kept] * scale.square(), rates[kept], spec.window, values
        )
        made[here[:, None], kept] = values[states.long()] * scale
        codes[here, :row_nbytes] = packed
    return made, codes
