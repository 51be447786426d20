"""Reduction of bags of computed rows, with the arguments of nn.EmbeddingBag."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cqr_compress.table.decode import at_least_float32
from cqr_compress.table.tracing import is_exporting


def reduce_bags(
    lookup: Callable[[Tensor], Tensor],
    input: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """Reduce each bag of ids to one row, as F.embedding_bag does with the rows of a weight.

    Args:
        lookup: computes rows (T, D) from ids (T,).
        input: (B, n) ids, B bags of n; or (T,) ids of all bags, split at `offsets`.
        offsets: (B,) first position of each bag; (B + 1,) with `include_last_offset`.
        mode: "sum", "mean" or "max".
        per_sample_weights: weights of the rows, with the shape of `input`.
        include_last_offset: whether `offsets` ends with T.
        padding_idx: id that is excluded from bags, at least 0.

    Returns:
        (B, D); zeros for an empty bag.
    """
    valid = (offsets is None) == (input.ndim == 2) and (per_sample_weights is None or mode == "sum")
    if is_exporting() and valid:  # embedding_bag refuses others
        return _reduce_exported(lookup, input, offsets, mode, per_sample_weights, include_last_offset, padding_idx)
    ids, skipped = input.reshape(-1), None
    places = torch.arange(ids.shape[0], dtype=ids.dtype, device=ids.device)
    if padding_idx is not None:  # an additional row at the end represents the padding row
        skipped = ids.shape[0]
        places = torch.where(ids == padding_idx, skipped, places)
        ids = torch.cat([ids, ids.new_full((1,), padding_idx)])
    return F.embedding_bag(
        places.view(input.shape),
        lookup(ids),
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=skipped,
    )


def _reduce_exported(
    lookup: Callable[[Tensor], Tensor],
    input: Tensor,
    offsets: Tensor | None,
    mode: str,
    per_sample_weights: Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> Tensor:
    """Do the same as `reduce_bags` in operations that all runtimes have."""
    ids = input.reshape(-1)
    rows, counted = lookup(ids), (ids != (-1 if padding_idx is None else padding_idx))[:, None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, 1)
    if offsets is not None:  # the bag of an id is the number of bags that begin at or before it, less one
        starts = torch.zeros(ids.shape[0] + 1, dtype=torch.int64, device=ids.device)
        starts = starts.index_add(0, offsets, torch.ones_like(offsets, dtype=torch.int64))
        bags = (starts.cumsum(0)[:-1] - 1)[:, None]

    def add(values: Tensor) -> Tensor:
        if offsets is None:
            return values.view(*input.shape, values.shape[1]).sum(1)
        return values.new_zeros(offsets.shape[0], values.shape[1]).scatter_add(0, bags.expand_as(values), values)

    def largest(values: Tensor) -> Tensor:
        if offsets is None:
            return values.view(*input.shape, values.shape[1]).amax(1)
        least = values.new_full((offsets.shape[0], values.shape[1]), -torch.inf)
        return least.scatter_reduce(0, bags.expand_as(values), values, "amax")

    counts = add(counted.float())
    if mode == "max":
        reduced = torch.where(counts > 0, largest(torch.where(counted, rows, -torch.inf)), 0.0)
    else:
        reduced = add(torch.where(counted, at_least_float32(rows), 0.0))
        reduced = (reduced / counts.clamp_min(1.0) if mode == "mean" else reduced).to(rows.dtype)
    return reduced[:-1] if include_last_offset and offsets is not None else reduced
