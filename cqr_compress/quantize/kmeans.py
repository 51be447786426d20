"""k-means with faiss: seeded, on a bounded sample, also defined for fewer points than centroids."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

POINTS_PER_CENTROID = 256
"""Maximum number of points per centroid; more points are subsampled at random."""
_BLOCK_VALUES = 2**24
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
        return torch.cat([points, torch.zeros(num_centroids - n, S)])
    clustering = faiss.Clustering(S, num_centroids)
    clustering.niter = iterations
    clustering.seed = seed % (2**31 - 1) + 1
    clustering.min_points_per_centroid = 1
    clustering.max_points_per_centroid = POINTS_PER_CENTROID
    given = None if weights is None else np.ascontiguousarray(weights.float().numpy())
    clustering.train(np.ascontiguousarray(points.numpy()), faiss.IndexFlatL2(S), given)
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(num_centroids, S))


def nearest_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """Find the index of each point's nearest centroid, in bounded memory.

    Args:
        points: (n, S) float32.
        centroids: (K, S) float32 on the same device.

    Returns:
        (n,) int64 on the same device.
    """
    if points.is_cpu:
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(np.ascontiguousarray(centroids.numpy()))
        n = len(points)
        if n < _MIN_QUERIES:
            points = torch.nn.functional.pad(points, (0, 0, 0, _MIN_QUERIES - n))
        return torch.from_numpy(index.search(np.ascontiguousarray(points.numpy()), 1)[1][:n, 0])
    norms = centroids.square().sum(1)
    step = max(1, _BLOCK_VALUES // len(centroids))
    parts = [
        torch.addmm(norms, block, centroids.T, alpha=-2).min(1).indices for block in torch.split(points, step)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=points.device)
