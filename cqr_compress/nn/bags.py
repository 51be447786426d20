"""Reduction of bags of computed rows, with the arguments of nn.EmbeddingBag."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


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
