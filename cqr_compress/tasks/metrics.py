"""Metrics on held-out data, over all processes."""

from __future__ import annotations

import torch
from torch import Tensor

from cqr_compress import distributed


def gathered(values: list[Tensor]) -> Tensor:
    """Concatenate the values of all processes, on the CPU: (n,)."""
    mine = torch.cat([value.detach().float().cpu() for value in values]) if values else torch.empty(0)
    return torch.cat(distributed.all_gather_object(mine))


def auc(scores: Tensor, labels: Tensor) -> float:
    """Compute the area under the ROC curve: P(positive scores above negative), with ties counted half.

    Args:
        scores: (n,).
        labels: (n,), positive if above 0.

    Returns:
        The AUC; NaN if all labels are equal.
    """
    _, place, count = torch.unique(scores, return_inverse=True, return_counts=True)
    rank = (count.cumsum(0).double() - (count.double() - 1) / 2)[place]
    positive = labels > 0
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if not num_positive or not num_negative:
        return float("nan")
    above = rank[positive].sum() - num_positive * (num_positive + 1) / 2
    return float(above / (num_positive * num_negative))


def click_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Compute AUC, and BCE in nats, of logits (n,) and labels (n,) of 0 and 1."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits.double(), labels.double())
    return {"auc": auc(logits, labels), "bce": float(bce)}


def ranking_metrics(ranks: Tensor, k: int = 10) -> dict[str, float]:
    """Compute HR@k and NDCG@k with one target item per user, given its ranks (n,) from 0."""
    ranks = ranks.double()
    hit = ranks < k
    gain = torch.where(hit, 1 / (ranks + 2).log2(), 0.0)
    return {f"ndcg@{k}": float(gain.mean()), f"hr@{k}": float(hit.double().mean())}
