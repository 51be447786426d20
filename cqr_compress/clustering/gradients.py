"""Gradients and curvature with respect to looked-up rows, accumulated over training data.

The gradient at the output of a compressed table's lookup is the gradient of a virtual full table: it gives each id
the direction in which its own row would move. This module does not depend on the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cqr_compress.clustering.observe import usage
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.spec import CodebookSpec, TrellisSpec

_EM_STEPS = 100


@dataclass
class RowGradients:
    """Gradients of a table's virtual rows, accumulated over a pass over training data.

    Attributes:
        columns: slice of the dimensions before rotation, of W dimensions.
        gradient: (N, W) float32, gradient of the summed loss.
        fisher: (N,) float32, empirical Fisher information: squared gradients of single lookups, averaged over all
            dimensions and summed over lookups.
        counts: (N,) float32, number of lookups of each id.
        blocks: (W // S, S, S) float32, sum of the outer products of single gradients within each column; or None.
    """

    columns: slice
    gradient: Tensor
    fisher: Tensor
    counts: Tensor
    blocks: Tensor | None = None

    @classmethod
    def zeros(cls, layer: TableLayer, columns: slice) -> RowGradients:
        """Create zeros on the layer's device, for a pass over data."""
        N, device = layer.num_embeddings, layer.device
        spec = cast("CodebookSpec | TrellisSpec", layer.spec)
        width, S = len(range(*columns.indices(spec.width))), spec.sub_dim
        return cls(
            columns=columns,
            gradient=torch.zeros(N, width, device=device, dtype=torch.float32),
            fisher=torch.zeros(N, device=device, dtype=torch.float32),
            counts=torch.zeros(N, device=device, dtype=torch.float32),
            blocks=torch.zeros(width // S, S, S, device=device, dtype=torch.float32),
        )

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add lookups.

        Args:
            ids: (B,) ids of the rows.
            gradient: (B, D) gradient with respect to the rows, any floating dtype.
            rotation: (width, D) matrix that the rows were multiplied by, or None.
        """
        gradient = gradient.float()
        if rotation is not None:
            gradient = gradient @ rotation.float().T
        self.counts.index_add_(0, ids, torch.ones_like(gradient[:, 0]))
        self.fisher.index_add_(0, ids, gradient.square().mean(1))
        here = gradient[:, self.columns]
        self.gradient.index_add_(0, ids, here)
        if self.blocks is not None:
            parts = here.reshape(len(here), len(self.blocks), -1).transpose(0, 1)  # (columns, B, S)
            self.blocks += parts.transpose(1, 2) @ parts

    def add_products(self, ids: Tensor, queries: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add products of queries and rows, such as the logits of a softmax.

        The gradient with respect to row j in example i is gradient[i, j] * queries[i].

        Args:
            ids: (V,) ids of the rows.
            queries: (B, D), any floating dtype.
            gradient: (B, V) gradient with respect to the products.
            rotation: as in `add`.
        """
        queries, gradient = queries.float(), gradient.float()
        if rotation is not None:
            queries = queries @ rotation.float().T
        self.counts.index_add_(0, ids, usage(gradient))
        here = queries[:, self.columns]
        self.gradient.index_add_(0, ids, gradient.T @ here)
        squares = gradient.square()
        self.fisher.index_add_(0, ids, squares.T @ queries.square().mean(1))
        if self.blocks is not None:
            weighted = here * squares.sum(1, keepdim=True).sqrt()
            parts = weighted.reshape(len(here), len(self.blocks), -1).transpose(0, 1)  # (columns, B, S)
            self.blocks += parts.transpose(1, 2) @ parts

    def directions(self, column: int) -> tuple[Tensor, Tensor]:
        """Compute the eigendecomposition of one column's relative curvature, shared by all ids.

        Args:
            column: index of the column, counted from the first one of `columns`.

        Returns:
            Eigenvalues (S,), relative to the mean curvature of the table's dimensions, and eigenvectors (S, S).
        """
        assert self.blocks is not None
        mean = self.fisher.sum().clamp_min(1e-30)  # of squared gradients, over dimensions
        values, vectors = torch.linalg.eigh((self.blocks[column] / mean).double())
        return values.clamp_min(0).float(), vectors.float()

    def directed_target(self, ids: Tensor, rows: Tensor, prior: Prior, step_size: float, column: int) -> Tensor:
        """Compute `target` for one column, with the curvature F_i times the eigenvalue in each of `directions`.

        Args:
            ids: (B,) int64.
            rows: (B, S) float32, V in this column.
            prior: m and p.
            step_size: damping.
            column: index of the column, counted from the first one of `columns`.

        Returns:
            (B, S) float32.
        """
        values, vectors = self.directions(column)
        S = rows.shape[1]
        here = slice(column * S, (column + 1) * S)
        mean = prior.mean[self.columns][here]
        step = (self.gradient[ids, here] + prior.precision * (rows - mean)) @ vectors
        step = step / (self.fisher[ids][:, None] * values + prior.precision)
        return rows - step_size * step @ vectors.T

    def target(self, ids: slice | Tensor, rows: Tensor, prior: Prior, step_size: float) -> Tensor:
        """Compute a damped Newton step toward the maximum a posteriori estimate of each row.

        V - step_size * (g + p (V - m)) / (F + p): the loss is approximated by a quadratic with gradient g and
        curvature F, and the prior of a row is a Gaussian with mean m, the mean row, and precision p. Rows of rare
        ids shrink toward the mean row.

        Args:
            ids: ids of the rows, a slice or int64.
            rows: (B, W) float32, V.
            prior: m and p.
            step_size: damping; 1 is the full step.

        Returns:
            (B, W) float32.
        """
        pull = prior.precision * (rows - prior.mean[self.columns])
        precision = self.fisher[ids] + prior.precision
        return rows - step_size * (self.gradient[ids] + pull) / precision[:, None]


@dataclass(frozen=True)
class Prior:
    """A Gaussian prior of rows, estimated from the table itself (empirical Bayes).

    Attributes:
        mean: (width,) float32, the mean row.
        precision: inverse variance of a value, multiplied by the weight of the prior.
    """

    mean: Tensor
    precision: float

    @classmethod
    def estimate(cls, moments: Moments, fisher: Tensor, prior_weight: float) -> Prior:
        """Estimate the variance of rows by expectation maximization.

        The variance is the mean square of the rows plus, because the rows are estimates, their mean posterior
        variance 1 / (F + p). Without the latter, tables of rare ids would shrink toward the mean row in each
        clustering.

        Args:
            moments: moments of the rows.
            fisher: (N,) float32, F.
            prior_weight: weight of the prior.
        """
        square = max(moments.mean_square, 1e-30)
        precision = 1 / square
        for _ in range(_EM_STEPS):
            precision = 1 / (square + float((1 / (fisher + precision)).mean()))
        return cls(moments.mean, prior_weight * precision)


@dataclass(frozen=True)
class Moments:
    """First and second moments of a table's rows.

    Attributes:
        mean: (width,) float32, the mean row.
        mean_square: mean square of all values.
    """

    mean: Tensor
    mean_square: float

    @classmethod
    def from_rows(cls, blocks: Iterable[Tensor]) -> Moments:
        """Compute the moments of rows, given in blocks of (B, width) float32."""
        count, total, squares = 0, torch.zeros((), **CPU_FLOAT), 0.0
        for rows in blocks:
            total = total.to(rows.device) + rows.sum(0, dtype=torch.float64)
            squares += float(rows.square().sum(dtype=torch.float64))
            count += len(rows)
        return cls((total / count).float(), squares / (count * len(total)))
