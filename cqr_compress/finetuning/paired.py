"""Compare the metric of a compressed model with that of the dense one, on the same examples."""

from __future__ import annotations

import torch
from torch import Tensor

_RESAMPLES = 1000
_LEVEL = 0.95
_BLOCK = 2**24


def relative_loss(dense: float, value: float, mode: str) -> float:
    """Return the change of a metric for the worse, relative to its dense value: 0.01 is a loss of 1%.

    Args:
        dense: metric of the dense model.
        value: metric of the compressed model.
        mode: "max" if a larger metric is better, or "min".
    """
    worse = dense - value if mode == "max" else value - dense
    return worse / max(abs(dense), 1e-300)


def loss_interval(dense: Tensor, values: Tensor, mode: str, seed: int = 0) -> tuple[float, float]:
    """Compute the 95% interval of the relative loss by the paired bootstrap over examples.

    Efron & Tibshirani, "An Introduction to the Bootstrap", section 13.3 (percentile interval). Both models are
    evaluated on the same examples, so that most of their variance cancels.

    Args:
        dense: (n,) metric of the dense model for each example.
        values: (n,) metric of the compressed model.
        mode: "max" or "min".
        seed: seed of the resamples.

    Returns:
        Lower and upper end.
    """
    n = len(dense)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    pairs = torch.stack([dense.double(), values.double()])
    step = max(1, _BLOCK // max(n, 1))
    for start in range(0, _RESAMPLES, step):
        count = min(step, _RESAMPLES - start)
        drawn = torch.randint(n, (count, n), generator=generator, device="cpu")
        before, after = pairs[:, drawn].mean(2)
        worse = before - after if mode == "max" else after - before
        losses.append(worse / before.abs().clamp_min(1e-300))
    tail = (1 - _LEVEL) / 2
    ends = torch.cat(losses).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64, device="cpu"))
    return float(ends[0]), float(ends[1])
