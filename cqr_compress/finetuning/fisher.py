"""The empirical Fisher information of a table's rows, summed over training data."""

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
    """The empirical Fisher information matrix, shared by all rows of a table.

    Attributes:
        matrix: (D, D) float64, sum of the outer products of the gradients of single lookups.
        counts: (N,) float32, number of lookups of each id.
    """

    matrix: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, layer: TableLayer) -> FisherMatrix:
        """Create zeros on the layer's device, for a pass over data."""
        D, device = layer.embedding_dim, layer.device
        return cls(
            torch.zeros(D, D, dtype=torch.float64, device=device),
            torch.zeros(layer.num_embeddings, device=device, dtype=torch.float32),
        )

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add lookups; see `GradientAccumulator.add`. The matrix is that of rows after the rotation."""
        gradient = gradient.float()
        self.matrix += (gradient.T @ gradient).double()
        self.counts.index_add_(0, ids, torch.ones_like(gradient[:, 0]))

    def add_products(self, ids: Tensor, queries: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add products of queries and rows; see `RowGradients.add_products`."""
        weighted = queries.float() * gradient.float().square().sum(1, keepdim=True).sqrt()
        self.matrix += (weighted.T @ weighted).double()
        self.counts.index_add_(0, ids, usage(gradient.float()))

    def metric_sqrt(self, num_blocks: int = 1, power: float = 1.0) -> Tensor:
        """Compute A such that ||(x - y) @ A||**2 is the Fisher-weighted squared error of a row y of x.

        A is the symmetric square root of the matrix, after scaling it to a mean eigenvalue of 1 and adding 0.1 to
        each eigenvalue, which makes it positive definite; or of a power of it below 1, which trusts it less.

        Args:
            num_blocks: number of diagonal blocks; entries outside the blocks are taken as 0.
            power: exponent of the eigenvalues before the square root.

        Returns:
            (D, D) float32 on the CPU, symmetric, positive definite, zero outside the blocks.
        """
        D = len(self.matrix)
        S = D // num_blocks
        matrix = self.matrix.cpu() / (self.matrix.trace().cpu() / D).clamp_min(1e-300)
        metric_sqrt = torch.zeros(D, D, dtype=torch.float64, device="cpu")
        for start in range(0, D, S):
            block = slice(start, start + S)
            values, vectors = torch.linalg.eigh(matrix[block, block])
            metric_sqrt[block, block] = (vectors * (values.clamp_min(0) + _FLOOR) ** (power / 2)) @ vectors.T
        return metric_sqrt.float()


def measure_fisher(
    model: nn.Module, layers: Mapping[str, TableLayer], losses: Losses, progress: Progress | None = None
) -> dict[str, FisherMatrix]:
    """Accumulate the empirical Fisher information of layers' rows in one pass over training data.

    Args:
        model: used in its current mode; call `model.eval()` before to disable dropout.
        layers: layers of the model, by name.
        losses: begins the pass, and yields for each batch the unreduced losses of its examples; with several
            processes, those of this process's part of the data.
        progress: receives the progress of the work.

    Returns:
        Fisher information by name, without layers that no gradient reached.

    Raises:
        SpecError: reduced losses, or no gradient reached any layer.
        NonFiniteError: gradients with NaN or infinity.
    """
    progress = progress or NoProgress()
    sums = {layer: FisherMatrix.zeros(layer) for layer in layers.values()}
    progress.start("measuring Fisher information", 0, "batches")
    with observed(sums):
        backpropagate(model, losses, progress.advance)
    for name, layer in layers.items():
        found = sums[layer]
        distributed.all_reduce_(found.matrix)
        distributed.all_reduce_(found.counts)
        if not found.matrix.isfinite().all():
            raise NonFiniteError(f"gradients of the rows of {name!r} contain NaN or infinity")
    reached = {name: sums[layer] for name, layer in layers.items() if sums[layer].counts.any()}
    if not reached:
        raise SpecError(f"no gradient reached {', '.join(map(repr, layers))}: the losses do not depend on them")
    return reached
