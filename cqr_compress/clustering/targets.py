"""Targets of the rows of a layer, which clustering and reassignment of codes approximate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.clustering.gradients import Moments, Prior, RowGradients
from cqr_compress.clustering.options import ClusterOptions
from cqr_compress.errors import NonFiniteError, SpecError
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.spec import CodebookSpec, TrellisSpec


@dataclass(eq=False)
class Targets:
    """Targets of the rows of one layer, column by column: the rows, or a damped Newton step from them.

    Attributes:
        name: name of the layer in the model.
        layer: the layer, which is not modified.
        spec: spec of its table.
        options: step size, weight of the prior, memory.
        moments: moments of the rows; None without gradients.
        prior: prior of a row; set by `fit_prior`.
    """

    name: str
    layer: TableLayer
    spec: CodebookSpec | TrellisSpec
    options: ClusterOptions
    moments: Moments | None = None
    prior: Prior | None = None

    @classmethod
    def begin(cls, name: str, layer: TableLayer, options: ClusterOptions, gradient_informed: bool) -> Targets:
        """Create targets for a layer, with the moments of its rows if gradient-informed.

        Raises:
            NonFiniteError: codebooks with NaN or infinity.
        """
        spec = layer.spec
        assert isinstance(spec, (CodebookSpec, TrellisSpec))
        for short in ("codebooks", "dim_scale"):
            if short in layer.table_tensors():
                _check_finite(layer.table_tensors()[short], "codebooks", name)
        targets = cls(name, layer, spec, options)
        if gradient_informed:
            targets.moments = Moments.from_rows(layer.lookup_unrotated(ids) for ids in targets.id_blocks())
        return targets

    def id_blocks(self, ids: Tensor | None = None) -> Iterator[Tensor]:
        """Split ids into blocks; all ids of the table if None."""
        count = self.spec.num_embeddings if ids is None else len(ids)
        width = 2 * self.spec.embedding_dim + 4 * self.spec.num_columns * self.spec.num_levels
        for a, b in row_blocks(count, width, self.options.block_bytes):
            yield torch.arange(a, b, device=self.layer.device) if ids is None else ids[a:b]

    def column(self, ids: Tensor, column: int, gradients: RowGradients | None) -> Tensor:
        """Compute the targets of one column of rows: (B, S) float32; the rows themselves without gradients."""
        S = self.spec.sub_dim
        rows = self.layer.lookup_unrotated(ids)
        if gradients is None:
            return rows[:, column * S : (column + 1) * S].contiguous()
        assert self.prior is not None
        moved = gradients.target(ids, rows[:, gradients.columns], self.prior, self.options.step_size)
        at = column * S - gradients.columns.start
        return moved[:, at : at + S].contiguous()

    def is_unreached(self, gradients: RowGradients | None) -> bool:
        """Return whether no gradient reached the layer and the options allow to skip it."""
        return gradients is not None and self.options.skip_unreached and not gradients.counts.any()

    def fit_prior(self, gradients: RowGradients) -> None:
        """Estimate the prior of the rows from the gradients of a pass over the data.

        Raises:
            SpecError: no gradient reached the layer.
            NonFiniteError: gradients with NaN or infinity.
        """
        if not gradients.counts.any():
            raise SpecError(
                f"no gradient reached {self.name!r}: the losses do not depend on it, or were computed with a "
                "compiled or traced copy of the model. Compute them with the model itself"
            )
        for sums in (gradients.gradient, gradients.fisher):
            _check_finite(sums, "gradients", self.name)
        assert self.moments is not None
        self.prior = Prior.estimate(self.moments, gradients.fisher, self.options.prior_weight)


def _check_finite(values: Tensor, what: str, name: str) -> None:
    if not values.isfinite().all():
        raise NonFiniteError(
            f"the {what} of layer {name!r} contain NaN or infinity: training diverged, or a loss was not finite. "
            "The model is unchanged"
        )
