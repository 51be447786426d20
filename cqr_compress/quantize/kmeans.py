"""k-means through faiss: seeded, on a bounded sample, defined for fewer points than centroids."""

from __future__ import annotations

import faiss
import numpy as np
import torch
from torch import Tensor

POINTS_PER_CENTROID = 256
"""Points that one centroid is fitted to; more are subsampled at random."""


def fit_centroids(points: Tensor, num_centroids: int, seed: int, iterations: int = 25) -> Tensor:
    """Cluster points to centroids (Lloyd's algorithm, squared Euclidean distance).

    With no more points than centroids the points themselves are the centroids, followed by zeros, and the
    error is 0. Otherwise at most POINTS_PER_CENTROID * num_centroids points, drawn by `seed`, take part.

    Args:
        points: (n, S) float32.
        num_centroids: K.
        seed: for the sample and the initial centroids.
        iterations: of Lloyd's algorithm.

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
    clustering.train(np.ascontiguousarray(points.numpy()), faiss.IndexFlatL2(S))
    return torch.from_numpy(faiss.vector_to_array(clustering.centroids).reshape(num_centroids, S))
