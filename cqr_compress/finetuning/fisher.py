"""In which directions an error of a row costs much: the Fisher information of a table's rows, summed over data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cqr_compress import distributed
from cqr_compress.clustering.observe import Losses, backpropagate, observed, usage
from cqr_compress.errors import NonFiniteError, SpecError
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.progress import NoProgress, Progress

_FLOOR = 0.1


@dataclass
class FisherMatrix:
    """The empirical Fisher information matrix that all rows of a table share.

    Attributes:
        matrix: (D, D) float64, outer products of the gradients of single lookups, summed.
        counts: (N,) float32, how often each id was looked up.
    """

    matrix: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, layer: TableLayer) -> FisherMatrix:
        """Begin a pass; on the layer's device."""
        D, device = layer.embedding_dim, layer.device
        return cls(
            torch.zeros(D, D, dtype=torch.float64, device=device),
            torch.zeros(layer.num_embeddings, device=device),
        )

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Count occurrences in; see `GradientAccumulator.add`. The matrix is that of rows after rotation."""
        gradient = gradient.float()
        self.matrix += (gradient.T @ gradient).double()
        self.counts.index_add_(0, ids, torch.ones_like(gradient[:, 0]))

    def add_products(self, ids: Tensor, queries: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Count products of queries and rows in; see `RowGradients.add_products`."""
        weighted = queries.float() * gradient.float().square().sum(1, keepdim=True).sqrt()
        self.matrix += (weighted.T @ weighted).double()
        self.counts.index_add_(0, ids, usage(gradient.float()))

    def metric_sqrt(self, num_blocks: int = 1) -> Tensor:
        """Find A such that ||x @ A - y @ A||**2 is what a difference of two rows costs.

        A is the symmetric square root of the matrix, scaled to a mean eigenvalue of 1 and with 0.1 added to each,
        so that no direction is free.

        Args:
            num_blocks: blocks of dimensions between which costs are left out.

        Returns:
            (D, D) float32 on the CPU, symmetric, positive definite, zero outside of the blocks.
        """
        D = len(self.matrix)
        S = D // num_blocks
        matrix = self.matrix.cpu() / (self.matrix.trace().cpu() / D).clamp_min(1e-300)
        metric_sqrt = torch.zeros(D, D, dtype=torch.float64)
        for start in range(0, D, S):
            block = slice(start, start + S)
            values, vectors = torch.linalg.eigh(matrix[block, block])
            metric_sqrt[block, block] = (vectors * (values.clamp_min(0) + _FLOOR).sqrt()) @ vectors.T
        return metric_sqrt.float()


def measure_fisher(
    model: nn.Module, layers: Mapping[str, TableLayer], losses: Losses, progress: Progress | None = None
) -> dict[str, FisherMatrix]:
    """Pass over training data, and sum the Fisher information of some layers' rows.

    Args:
        model: as it is; call `model.eval()` before if dropout shall rest.
        layers: layers of the model by name.
        losses: begins the pass: for each batch the losses of its examples, not reduced. With several processes,
            of this one's part of the data.
        progress: told of the work.

    Returns:
        By name; layers that no gradient reached are left out.

    Raises:
        SpecError: reduced losses, or no gradient reached any layer.
        NonFiniteError: gradients with NaN or infinity.
    """
    progress = progress or NoProgress()
    sums = {layer: FisherMatrix.zeros(layer) for layer in layers.values()}
    progress.start("measuring fisher", 0, "batches")
    with observed(sums):
        backpropagate(model, losses, progress.advance)
    for name, layer in layers.items():
        found = sums[layer]
        distributed.all_reduce_(found.matrix)
        distributed.all_reduce_(found.counts)
        if not found.matrix.isfinite().all():
            raise NonFiniteError(f"gradients at the rows of {name!r} have NaN or infinity")
    reached = {name: sums[layer] for name, layer in layers.items() if sums[layer].counts.any()}
    if not reached:
        raise SpecError(f"no gradient reached {', '.join(map(repr, layers))}: the losses do not depend on them")
    return reached
