"""Where each id wants to go: gradients and curvature at the output of lookups, summed over training data.

A compressed table can express few rows. The gradient at the output of its lookup is that of a virtual full table,
and tells for each id in which direction its own row would move. Nothing here depends on the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from cqr_compress.clustering.observe import usage
from cqr_compress.nn.table_layer import TableLayer
from cqr_compress.table.spec import CodebookSpec

_EM_STEPS = 100


@dataclass
class RowGradients:
    """What a pass over training data says about some columns of a table's virtual rows.

    Attributes:
        columns: which of the dimensions before rotation.
        gradient: (N, W) float32, the gradient of the summed loss, over W dimensions.
        fisher: (N,) float32, the empirical Fisher information: squared gradients of single occurrences, mean
            over all of these dimensions, summed.
        counts: (N,) float32, how often an id was looked up.
        blocks: (W // S, S, S) float32, outer products of single gradients within each column, summed; None where
            they are not known.
    """

    columns: slice
    gradient: Tensor
    fisher: Tensor
    counts: Tensor
    blocks: Tensor | None = None

    @classmethod
    def zeros(cls, layer: TableLayer, columns: slice) -> RowGradients:
        """Begin a pass; on the layer's device."""
        N, device = layer.num_embeddings, layer.device
        spec = cast(CodebookSpec, layer.spec)
        width, S = len(range(*columns.indices(spec.width))), spec.sub_dim
        return cls(
            columns=columns,
            gradient=torch.zeros(N, width, device=device),
            fisher=torch.zeros(N, device=device),
            counts=torch.zeros(N, device=device),
            blocks=torch.zeros(width // S, S, S, device=device),
        )

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Count occurrences in.

        Args:
            ids: (B,) rows.
            gradient: (B, D) with respect to them, any floating dtype.
            rotation: (width, D) that rows were on_matmul by, or None.
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
        """Count products of queries and rows in, such as the logits of a softmax.

        The gradient with respect to row j in example i is gradient[i, j] * queries[i].

        Args:
            ids: (V,) rows.
            queries: (B, D), any floating dtype.
            gradient: (B, V) with respect to the products.
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
        """How curvature differs between the directions of one column, whatever the id.

        Args:
            column: from the first one of `columns`.

        Returns:
            Eigenvalues (S,), 1 where curvature is that of the table's mean dimension, and eigenvectors (S, S).
        """
        assert self.blocks is not None
        mean = self.fisher.sum().clamp_min(1e-30)  # of squared gradients, over dimensions
        values, vectors = torch.linalg.eigh((self.blocks[column] / mean).double())
        return values.clamp_min(0).float(), vectors.float()

    def directed_target(self, ids: Tensor, rows: Tensor, prior: Prior, step_size: float, column: int) -> Tensor:
        """As `target`, for one column, with the curvature of each direction: F_i times `directions`.

        Args:
            ids: (B,) int64.
            rows: (B, S) float32, V in this column.
            prior: m and p.
            step_size: damping.
            column: from the first one of `columns`.
        """
        values, vectors = self.directions(column)
        S = rows.shape[1]
        here = slice(column * S, (column + 1) * S)
        mean = prior.mean[self.columns][here]
        step = (self.gradient[ids, here] + prior.precision * (rows - mean)) @ vectors
        step = step / (self.fisher[ids][:, None] * values + prior.precision)
        return rows - step_size * step @ vectors.T

    def target(self, ids: slice | Tensor, rows: Tensor, prior: Prior, step_size: float) -> Tensor:
        """Move rows by a damped Newton step toward the maximum of the posterior of each row.

        V - step_size * (g + p (V - m)) / (F + p): the loss is quadratic with gradient g and curvature F, and the
        prior of a row is Gaussian around the mean row m with precision p. Ids that are rare go toward the mean
        row.

        Args:
            ids: which rows, slices or int64.
            rows: (B, W) float32, V.
            prior: m and p.
            step_size: damping; 1 is the whole step.

        Returns:
            (B, W) float32.
        """
        pull = prior.precision * (rows - prior.mean[self.columns])
        precision = self.fisher[ids] + prior.precision
        return rows - step_size * (self.gradient[ids] + pull) / precision[:, None]


@dataclass(frozen=True)
class Prior:
    """A Gaussian that rows come from, estimated from the table itself (empirical Bayes).

    Attributes:
        mean: (width,) float32, the mean row.
        precision: inverse variance of a value, times the weight of the prior.
    """

    mean: Tensor
    precision: float

    @classmethod
    def estimate(cls, moments: Moments, fisher: Tensor, prior_weight: float) -> Prior:
        """Find the variance of rows by expectation maximization.

        The variance is the mean square of the rows and, as they are only estimates, that of their errors,
        1 / (F + p). Without the latter, tables of rare ids would be drawn to the mean row again and again.

        Args:
            moments: of the rows.
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
    """What all rows of a table are like.

    Attributes:
        mean: (width,) float32, the mean row.
        mean_square: of all values.
    """

    mean: Tensor
    mean_square: float

    @classmethod
    def from_rows(cls, blocks: Iterable[Tensor]) -> Moments:
        """Measure rows in blocks, (B, width) float32 each."""
        count, total, squares = 0, torch.zeros(()), 0.0
        for rows in blocks:
            total = total.to(rows.device) + rows.sum(0, dtype=torch.float64)
            squares += float(rows.square().sum(dtype=torch.float64))
            count += len(rows)
        return cls((total / count).float(), squares / (count * len(total)))
