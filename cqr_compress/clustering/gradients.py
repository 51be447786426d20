"""Where each id wants to go: gradients and curvature at the output of lookups, summed over training data.

A compressed table can express few rows. The gradient at the output of its lookup is that of a virtual full table,
and tells for each id in which direction its own row would move. Nothing here depends on the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from cqr_compress.errors import SpecError
from cqr_compress.nn import TableLayer
from cqr_compress.spec import CodebookSpec

_EM_STEPS = 100
_BLOCK_VALUES = 2**22
Losses = Callable[[], Iterable[Tensor]]
"""Begins a pass over training data: for each batch the losses of its examples, not reduced."""


class Sums(Protocol):
    """What is added up at the output of a layer's lookups, and of products of its rows with queries."""

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Count in lookups of rows `ids` (B,), whose gradient (B, D) is after the rotation (width, D)."""

    def add_products(self, ids: Tensor, queries: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Count in products of rows `ids` (V,) with queries (B, D), whose gradient is (B, V)."""


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
            rotation: (width, D) that rows were multiplied by, or None.
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
        self.counts.index_add_(0, ids, shares(gradient))
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

    def directed_target(self, ids: Tensor, rows: Tensor, prior: Prior, eta: float, column: int) -> Tensor:
        """As `target`, for one column, with the curvature of each direction: F_i times `directions`.

        Args:
            ids: (B,) int64.
            rows: (B, S) float32, V in this column.
            prior: m and p.
            eta: damping.
            column: from the first one of `columns`.
        """
        values, vectors = self.directions(column)
        S = rows.shape[1]
        here = slice(column * S, (column + 1) * S)
        mean = prior.mean[self.columns][here]
        step = (self.gradient[ids, here] + prior.precision * (rows - mean)) @ vectors
        step = step / (self.fisher[ids][:, None] * values + prior.precision)
        return rows - eta * step @ vectors.T

    def target(self, ids: slice | Tensor, rows: Tensor, prior: Prior, eta: float) -> Tensor:
        """Move rows by a damped Newton step toward the maximum of the posterior of each row.

        V - eta * (g + p (V - m)) / (F + p): the loss is quadratic with gradient g and curvature F, and the prior
        of a row is Gaussian around the mean row m with precision p. Ids that are rare go toward the mean row.

        Args:
            ids: which rows, slices or int64.
            rows: (B, W) float32, V.
            prior: m and p.
            eta: damping; 1 is the whole step.

        Returns:
            (B, W) float32.
        """
        pull = prior.precision * (rows - prior.mean[self.columns])
        precision = self.fisher[ids] + prior.precision
        return rows - eta * (self.gradient[ids] + pull) / precision[:, None]


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
    def estimate(cls, moments: Moments, fisher: Tensor, tau: float) -> Prior:
        """Find the variance of rows by expectation maximization.

        The variance is the mean square of the rows and, as they are only estimates, that of their errors,
        1 / (F + p). Without the latter, tables of rare ids would be drawn to the mean row again and again.

        Args:
            moments: of the rows.
            fisher: (N,) float32, F.
            tau: weight of the prior.
        """
        square = max(moments.mean_square, 1e-30)
        precision = 1 / square
        for _ in range(_EM_STEPS):
            precision = 1 / (square + float((1 / (fisher + precision)).mean()))
        return cls(moments.mean, tau * precision)


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
    def of_rows(cls, blocks: Iterable[Tensor]) -> Moments:
        """Measure rows in blocks, (B, width) float32 each."""
        count, total, squares = 0, torch.zeros(()), 0.0
        for rows in blocks:
            total = total.to(rows.device) + rows.sum(0, dtype=torch.float64)
            squares += float(rows.square().sum(dtype=torch.float64))
            count += len(rows)
        return cls((total / count).float(), squares / (count * len(total)))


@contextmanager
def observed(gradients: Mapping[TableLayer, Sums]) -> Iterator[None]:
    """Let every backward in the context add to the sums of some layers; their codebooks get no gradient.

    Rows are cut from the codebooks, so that the pass costs no more than the rest of the model.

    Raises:
        SpecError: a layer is observed already.
    """
    for layer in gradients:
        if layer.observer is not None:
            raise SpecError(f"{type(layer).__name__} is being observed by another pass")
    try:
        for layer, sums in gradients.items():
            rotation = layer.table_tensors().get("rotation")
            layer.observer = _Summing(sums, None if rotation is None else rotation.detach())
        yield
    finally:
        for layer in gradients:
            layer.observer = None


def shares(gradient: Tensor) -> Tensor:
    """How often each row was used by products, in the measure of lookups.

    In an example a row counts as its gradient beside the largest, which is about 1 for the wanted row of a softmax
    and the probability of any other.

    Args:
        gradient: (B, V) with respect to the products.

    Returns:
        (V,).
    """
    size = gradient.abs()
    return (size / size.amax(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).sum(0)


@dataclass(frozen=True)
class _Summing:
    """An observer that cuts rows from the codebooks, and adds up gradients at the cut."""

    sums: Sums
    rotation: Tensor | None

    def looked_up(self, ids: Tensor, rows: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return rows
        leaf = rows.detach().requires_grad_()
        leaf.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self.sums.add(ids, gradient.detach(), self.rotation)
        )
        return leaf

    def multiplied(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
        queries = h if h.requires_grad else h.detach().requires_grad_()
        products = queries @ rows.detach().T
        flat, step = h.detach().reshape(-1, h.shape[-1]), max(1, _BLOCK_VALUES // max(1, len(ids)))

        def count(gradient: Tensor) -> None:
            if not gradient.numel():
                return
            gradient = gradient.detach().reshape(len(flat), len(ids))
            for some, theirs in zip(torch.split(flat, step), torch.split(gradient, step), strict=True):
                self.sums.add_products(ids, some, theirs, self.rotation)

        products.register_hook(count)  # type: ignore[no-untyped-call]
        return products


def backpropagate(model: nn.Module, losses: Losses, step: Callable[[], None] = lambda: None) -> None:
    """Run the backward of each batch's losses, and leave the parameters' gradients as they were.

    Args:
        model: whose parameters may receive gradients on the way.
        losses: begins a pass, and yields for each batch the losses of its examples, not reduced: the sum of all of
            them is the objective. Gradients are enabled, whatever the caller's mode.
        step: called after each batch.

    Raises:
        SpecError: a loss that was reduced to one number, whose scale is unknown; or no batch.
    """
    parameters = list(model.parameters())
    held = [parameter.grad for parameter in parameters]
    batches = 0
    try:
        for parameter in parameters:
            parameter.grad = None
        with torch.enable_grad():
            for loss in losses():
                if loss.ndim == 0:
                    raise SpecError(
                        "gradient-informed clustering takes the loss of each example, and got one number for a "
                        "batch. Compute it with reduction='none'; a sum over the batch can be given as "
                        "loss.reshape(1)."
                    )
                loss.sum().backward()  # type: ignore[no-untyped-call]
                batches += 1
                step()
                for parameter in parameters:
                    parameter.grad = None
    finally:
        for parameter, grad in zip(parameters, held, strict=True):
            parameter.grad = grad
    if not batches:
        raise SpecError("gradient-informed clustering got no batch: the iterable of losses is empty")
