"""k-means: seeded, on a bounded sample, also defined for fewer points than centroids.

The nearest centroids are found by the compiled kernel where points have few dimensions, as the columns of product
quantization do, otherwise by faiss.
"""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

from cqr_compress.kernel import ops
from cqr_compress.table.defaults import CPU_FLOAT

POINTS_PER_CENTROID = 256
"""Maximum number of points per centroid; more points are subsampled at random."""
_BLOCK_VALUES = 2**24
_KERNEL_DIM = 8
"""The matrix products of faiss are as fast for points of about 16 dimensions, and faster for more."""
_PERTURBATION = 1 / 1024
_MAX_SPREAD = 64
"""Number of centroids up to which k-means++ takes less time than the iterations that follow."""
_ROUND = 16
"""Of more than _MAX_SPREAD centroids, k-means++ draws one at once for each 16 that it has."""
_MIN_QUERIES = 32
"""faiss rounds distances differently for fewer than 20 queries; padding makes codes independent of block size."""


def fit_centroids(
    points: Tensor, num_centroids: int, seed: int, iterations: int = 25, weights: Tensor | None = None
) -> Tensor:
    """Cluster points with k-means (Lloyd's algorithm, squared Euclidean distance).

    With at most as many points as centroids, the points themselves are the centroids, followed by zeros, and the
    error is 0. Otherwise a random sample of at most POINTS_PER_CENTROID * num_centroids points is clustered.

    Args:
        points: (n, S) float32.
        num_centroids: K.
        seed: seed of the sample and the initial centroids.
        iterations: iterations of Lloyd's algorithm.
        weights: (n,) float32, positive weights of the points' squared errors; all 1 if None.

    Returns:
        (K, S) float32.
    """
    n, S = points.shape
    if n <= num_centroids:
        return torch.cat([points, points.new_zeros(num_centroids - n, S)])
    generator = torch.Generator("cpu").manual_seed(seed)
    order = torch.randperm(n, generator=generator, device="cpu")[: POINTS_PER_CENTROID * num_centroids]
    points = points[order].contiguous()
    costs = points.new_ones(len(points)) if weights is None else weights.float()[order]
    weighted = torch.cat([points * costs[:, None], costs[:, None]], 1)
    if weights is None and num_centroids > _MAX_SPREAD:
        centroids = points[:num_centroids].clone()
    else:
        centroids = _spread_points(points, costs, num_centroids, generator)
    before: Tensor | None = None
    for _ in range(iterations):
        codes = nearest_centroids(points, centroids)
        if before is not None and torch.equal(codes, before):
            break  # the centroids are those means already
        sums = _sums(weighted, codes, num_centroids)
        sizes = sums[:, S]
        filled = sizes > 0
        if filled.all():
            before = codes
            torch.div(sums[:, :S], sizes[:, None], out=centroids)
        else:
            before = None
            centroids[filled] = sums[filled, :S] / sizes[filled, None]
            _split_largest(centroids, sizes, generator)
    return centroids


def _spread_points(points: Tensor, costs: Tensor, num_centroids: int, generator: torch.Generator) -> Tensor:
    """Choose initial centroids by k-means++ (Arthur & Vassilvitskii 2007), each by its error so far.

    Points drawn uniformly miss the few that most of the weight is on. Unlike the paper, if there are many
    centroids, later ones are drawn several at a time by the same errors, as in k-means|| (Bahmani et al. 2012,
    doi:10.14778/2180912.2180915).
    """
    drawn = torch.multinomial(costs, 1, generator=generator)
    centroids = points.new_empty(num_centroids, points.shape[1])
    errors = points.new_full((len(points),), torch.inf)
    start = 0
    while True:
        stop = start + len(drawn)
        centroids[start:stop] = points[drawn]
        if stop == num_centroids:
            return centroids
        new = centroids[start:stop]
        nearest = new[nearest_centroids(points, new)] if len(new) > 1 else new
        errors = torch.minimum(errors, (points - nearest).square_().sum(1))
        shares = (errors * costs).cumsum(0, dtype=torch.float64)
        count = min(stop // _ROUND if stop > _MAX_SPREAD else 1, num_centroids - stop)
        draws = torch.rand(count, dtype=torch.float64, generator=generator, device="cpu")
        at = (torch.arange(count, device="cpu") + draws) / count * shares[-1]  # seldom the same point twice
        drawn = torch.searchsorted(shares, at).clamp_(max=len(points) - 1)
        start = stop


def _sums(points: Tensor, codes: Tensor, num_centroids: int) -> Tensor:
    """Sum the points (n, S) of each centroid: (K, S)."""
    if points.is_cpu and ops.available():
        shape = 1, 1, num_centroids, points.shape[1]
        ids = torch.arange(len(points), dtype=torch.int32, device="cpu")
        packed = codes.to(torch.int32)[:, None].view(torch.uint8)
        return ops.lookup_backward(points, ids, packed, shape, 32)[0, 0]
    return points.new_zeros(num_centroids, points.shape[1]).index_add_(0, codes, points)


def _split_largest(centroids: Tensor, sizes: Tensor, generator: torch.Generator) -> None:
    """Replace centroids without points: each takes half of the points of one that is drawn by its size."""
    empty = (sizes == 0).nonzero().flatten()
    if len(empty) == 0:
        return
    count = min(len(empty), int((sizes > 0).sum()))
    drawn = torch.multinomial(sizes, count, generator=generator)
    draws = torch.rand(count, centroids.shape[1], generator=generator, **CPU_FLOAT)
    signs = torch.where(draws < 0.5, -1.0, 1.0).to(centroids.dtype)
    centroids[empty[:count]] = centroids[drawn] * (1 + _PERTURBATION * signs)
    centroids[drawn] = centroids[drawn] * (1 - _PERTURBATION * signs)


def nearest_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """Find the index of each point's nearest centroid, in bounded memory.

    Args:
        points: (n, S) float32.
        centroids: (K, S) float32 on the same device.

    Returns:
        (n,) int64 on the same device.
    """
    if points.is_cpu and points.shape[1] <= _KERNEL_DIM and ops.available():
        return ops.nearest(points.contiguous(), centroids).to(torch.int64)
    if points.is_cpu:
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(np.ascontiguousarray(centroids.numpy()))
        n = len(points)
        if n < _MIN_QUERIES:
            points = torch.nn.functional.pad(points, (0, 0, 0, _MIN_QUERIES - n))
        labels = torch.from_numpy(index.search(np.ascontiguousarray(points.numpy()), 1)[1][:n, 0])
        return labels.clamp_(min=0)  # -1 where no distance is a number, as of values whose squares overflow
    norms = centroids.square().sum(1)
    step = max(1, _BLOCK_VALUES // len(centroids))
    parts = [
        torch.addmm(norms, block, centroids.T, alpha=-2).min(1).indices for block in torch.split(points, step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=points.device)
