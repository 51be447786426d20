"""Metrics on held-out data, over all processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cqr_compress import distributed
from cqr_compress.table.defaults import CPU_FLOAT


def gathered(values: list[Tensor]) -> Tensor:
    """Concatenate the values of all processes, on the CPU: (n,)."""
    mine = torch.cat([value.detach().float().cpu() for value in values]) if values else torch.empty(0, **CPU_FLOAT)
    return torch.cat(distributed.all_gather_object(mine))


def auc(scores: Tensor, labels: Tensor) -> float:
    """Compute the area under the ROC curve: P(positive scores above negative), with ties counted half.

    Args:
        scores: (n,).
        labels: (n,), positive if above 0.

    Returns:
        The AUC; NaN if all labels are equal, or a score is NaN.
    """
    if bool(scores.isnan().any()):
        return math.nan
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0).double() - (count.double() - 1) / 2)[place]
    positive = labels > 0
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return math.nan
    above = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def click_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute AUC, and BCE in nats, of logits (n,) and labels (n,) of 0 and 1."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    return {"auc": auc(logits, labels), "bce": float(bce)}


def target_ranks(scores: Tensor, targets: Tensor, seen: Tensor) -> Tensor:
    """Compute the rank of each user's target item among the items that the user has not seen.

    Args:
        scores: (B, N) floating point, one score for each user and item.
        targets: (B,) int64, the target item of each user; it takes part even if it is among those seen.
        seen: (B, N) bool, items that are left out.

    Returns:
        (B,) float64, from 0: the number of items with a higher score, plus half of those with the same score;
        NaN where a score of the user is NaN.
    """
    own = scores.gather(1, targets[:, None])
    others = ~seen.scatter(1, targets[:, None], True)
    above = ((scores > own) & others).sum(1).double()
    equal = ((scores == own) & others).sum(1).double()
    return torch.where(scores.isnan().any(1), math.nan, above + equal / 2)


def ranking_metrics(ranks: Tensor, k: int = 10) -> dict[str, float]:
    """Compute HR@k and NDCG@k with one target item per user.

    Args:
        ranks: (n,), from 0; see `target_ranks`.
        k: length of the list.

    Returns:
        The metrics by name, such as "ndcg@10"; all NaN if a rank is NaN.
    """
    return {name: float(values.mean()) for name, values in user_metrics(ranks, k).items()}


def user_metrics(ranks: Tensor, k: int = 10) -> dict[str, Tensor]:
    """Compute HR@k and NDCG@k of each user, (n,) float64; see `ranking_metrics`."""
    ranks = ranks.double()
    hit = torch.where(ranks.isnan(), math.nan, (ranks < k).double())
    gain = torch.where(hit == 0, 0.0, hit / (ranks + 2).log2())
    return {f"ndcg@{k}": gain, f"hr@{k}": hit}
