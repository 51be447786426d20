"""k-means through faiss: seeded, on a bounded sample, defined for fewer points than centroids."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

POINTS_PER_CENTROID = 256
"""Points that one centroid is fitted to; more are subsampled at random."""
_BLOCK_VALUES = 2**24
_MIN_QUERIES = 32
"""faiss rounds distances otherwise for fewer than 20 queries: with more, codes do not depend on the block size."""


def fit_centroids(
    points: Tensor, num_centroids: int, seed: int, iterations: int = 25, weights: Tensor | None = None
) -> Tensor:
    """Cluster points to centroids (Lloyd's algorithm, squared Euclidean distance).

    With no more points than centroids the points themselves are the centroids, followed by zeros, and the
    error is 0. Otherwise at most POINTS_PER_CENTROID * num_centroids points, drawn by `seed`, take part.

    Args:
        points: (n, S) float32.
        num_centroids: K.
        seed: for the sample and the initial centroids.
        iterations: of Lloyd's algorithm.
        weights: (n,) float32, positive: what an error at a point costs; 1 for each if None.

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
    """Name each point's nearest centroid, in bounded memory.

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
