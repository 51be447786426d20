"""Observe the lookups and products of a layer while losses are backpropagated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from cqr_compress.errors import SpecError
from cqr_compress.nn.table_layer import TableLayer

_BLOCK_VALUES = 2**22
Losses = Callable[[], Iterable[Tensor]]
"""Begins a pass over training data, and yields for each batch the unreduced losses of its examples."""


class GradientAccumulator(Protocol):
    """Accumulates gradients with respect to looked-up rows, and to products of rows with queries."""

    def add(self, ids: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add lookups of rows `ids` (B,) with their gradient (B, D), taken after the rotation (width, D)."""

    def add_products(self, ids: Tensor, queries: Tensor, gradient: Tensor, rotation: Tensor | None) -> None:
        """Add products of rows `ids` (V,) with queries (B, D), with their gradient (B, V)."""


@contextmanager
def observed(gradients: Mapping[TableLayer, GradientAccumulator]) -> Iterator[None]:
    """Accumulate gradients of layers' rows in every backward pass inside the context.

    Rows are detached from the codebooks, which receive no gradient, so that the pass does not backpropagate
    through lookups.

    Raises:
        SpecError: a layer is already observed.
    """
    for layer in gradients:
        if layer.observer is not None:
            raise SpecError(f"{type(layer).__name__} is already observed by another pass: let it finish first")
    try:
        for layer, sums in gradients.items():
            rotation = layer.table_tensors().get("rotation")
            layer.observer = _Summing(sums, None if rotation is None else rotation.detach())
        yield
    finally:
        for layer in gradients:
            layer.observer = None


def usage(gradient: Tensor) -> Tensor:
    """Compute the usage of each row by products, as an equivalent number of lookups.

    In each example a row counts as the magnitude of its gradient / the largest magnitude. For a softmax this is
    about 1 for the target row and the probability of any other row.

    Args:
        gradient: (B, V), gradient with respect to the products.

    Returns:
        (V,) usage, summed over examples.
    """
    size = gradient.abs()
    return (size / size.amax(1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)).sum(0)


@dataclass(frozen=True)
class _Summing:
    """An observer that detaches rows from the codebooks and accumulates their gradients."""

    sums: GradientAccumulator
    rotation: Tensor | None

    def on_lookup(self, ids: Tensor, rows: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return rows
        leaf = rows.detach().requires_grad_()
        leaf.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self.sums.add(ids, gradient.detach(), self.rotation)
        )
        return leaf

    def on_matmul(self, h: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
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
    """Backpropagate the losses of each batch, and restore the parameters' gradients afterwards.

    Args:
        model: model whose parameters may receive gradients during the pass.
        losses: begins a pass, and yields for each batch the unreduced losses of its examples; their total sum is
            the objective. Gradients are enabled regardless of the caller's mode.
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
                        "gradient-informed clustering requires the loss of each example, but got one number for a "
                        "batch. Compute it with reduction='none'; pass a sum over the batch as loss.reshape(1)."
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
