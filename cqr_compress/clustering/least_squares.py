"""Clustering the sketch for least squares: min ||X T - Y|| over T (d1, d2) by solving smaller problems.

"Clustering the Sketch", arXiv:2210.05974, section 3. The rows of X are examples, T is an embedding table without a
network. Each step compresses T to H M with a sketch H (d1, k) of k << d1 columns, and solves for M. Convergence is
proved for the dense algorithm (Theorem 3.1), not for the sparse one, which corresponds to embedding tables.

Shapes: n examples, d1 rows of T (ids), d2 columns of T (dimensions), k columns of H.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.errors import ShapeError
from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids


@dataclass(frozen=True)
class Problem:
    """A least-squares problem and its solution.

    Attributes:
        X: (n, d1) float64.
        Y: (n, d2) float64.
        best: (d1, d2), a T that minimizes ||X T - Y||.
        signal: ||X best||**2, the excess error of T = 0.
        floor: ||X best - Y||**2, the minimum error.
    """

    X: Tensor
    Y: Tensor
    best: Tensor
    signal: float
    floor: float

    @classmethod
    def of(cls, X: Tensor, Y: Tensor) -> Problem:
        """Create a problem and solve it directly.

        Raises:
            ShapeError: X and Y are not matrices with the same number of rows.
        """
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y):
            raise ShapeError(
                f"X {tuple(X.shape)} and Y {tuple(Y.shape)} are not matrices with the same number of rows"
            )
        X, Y = X.double(), Y.double()
        best = _solve(X, Y)
        return cls(X, Y, best, float((X @ best).square().sum()), float((X @ best - Y).square().sum()))

    def excess(self, T: Tensor) -> float:
        """Compute (||X T - Y||**2 - ||X best - Y||**2) / ||X best||**2: 1 for T = 0 and 0 for the best."""
        return (float((self.X @ T - self.Y).square().sum()) - self.floor) / self.signal

    def bound(self, iterations: int, k: int, smart: bool = False) -> float:
        """Compute the bound of Theorem 3.1 on the expected `excess` of the dense algorithm.

        The bound is (1 - rho)**(iterations * k').

        k' = k - d2 is the number of random columns of each step, rho = sigma_min(X)**2 / ||X||_F**2, or 1 / d1 for
        smart noise.
        """
        singular = torch.linalg.svdvals(self.X)
        d1 = self.X.shape[1]
        smallest = float(singular[-1]) if len(singular) == d1 else 0.0
        rho = 1 / d1 if smart else smallest**2 / float(singular.square().sum())
        return float((1 - rho) ** (iterations * (k - self.Y.shape[1])))


def dense_iterates(problem: Problem, k: int, seed: int = 0, smart: bool = False) -> Iterator[Tensor]:
    """Iterate Algorithm 1: H = [T | G] with Gaussian noise G (d1, k - d2), then T = H argmin_M ||X H M - Y||.

    Args:
        problem: X and Y.
        k: columns of H, more than d2 and at most d1.
        seed: seed of the noise.
        smart: draw the noise in the eigenspace of X, so that X G is Gaussian in the column space of X.

    Returns:
        An infinite iterator over T (d1, d2) float64 after each step.

    Raises:
        ShapeError: k is out of range.
    """
    d1, d2 = problem.best.shape
    if not d2 < k <= d1:
        raise ShapeError(f"k is {k}: give more than d2 = {d2} and at most d1 = {d1}")
    generator = torch.Generator().manual_seed(seed)
    T = torch.zeros_like(problem.best)
    spread = None
    if smart:
        _, singular, right = torch.linalg.svd(problem.X, full_matrices=False)
        inverse = torch.where(singular > singular[0] * 1e-12, 1 / singular, 0.0)
        spread = right.T * inverse  # X @ spread = U
    while True:
        size = d1 if spread is None else spread.shape[1]
        noise = torch.randn(size, k - d2, dtype=torch.float64, generator=generator, device="cpu")
        H = torch.cat([T, noise if spread is None else spread @ noise], 1)
        T = H @ _solve(problem.X @ H, problem.Y)
        yield T


def sparse_iterates(problem: Problem, k: int, seed: int = 0) -> Iterator[Tensor]:
    """Iterate Algorithm 2: H = [clusters of the rows of T | count sketch], each one-sparse with k / 2 columns.

    Convergence is not proved; in practice the error stays above that of k-means of the best T.

    Args:
        problem: X and Y.
        k: columns of H, even, at least 4 and at most d1.
        seed: seed of k-means and the count sketches.

    Returns:
        An infinite iterator over T (d1, d2) float64 after each step.

    Raises:
        ShapeError: k is out of range.
    """
    d1, _ = problem.best.shape
    if k % 2 or not 4 <= k <= d1:
        raise ShapeError(f"k is {k}: give an even number from 4 to d1 = {d1}")
    generator = torch.Generator().manual_seed(seed)
    T = torch.zeros_like(problem.best)
    step = 0
    while True:
        H = torch.zeros(d1, k, dtype=torch.float64, device="cpu")
        pointers = torch.randint(k // 2, (d1,), generator=generator, device="cpu")
        if step:
            pointers = cluster_rows(T, k // 2, seed + step)[0]
        buckets = torch.randint(k // 2, (d1,), generator=generator, device="cpu")
        signs = torch.randint(2, (d1,), generator=generator, device="cpu").double() * 2 - 1
        H[torch.arange(d1, device="cpu"), pointers] = 1.0
        H[torch.arange(d1, device="cpu"), k // 2 + buckets] = signs
        T = H @ _solve(problem.X @ H, problem.Y)
        step += 1
        yield T


def cluster_rows(T: Tensor, num_clusters: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cluster the rows of T with k-means.

    Args:
        T: (d1, d2).
        num_clusters: K.
        seed: seed of k-means.

    Returns:
        The clusters of the rows (d1,) int64, and the centroids (K, d2) float64.
    """
    points = T.float()
    centroids = fit_centroids(points, num_clusters, seed)
    return nearest_centroids(points, centroids), centroids.double()


def _solve(A: Tensor, B: Tensor) -> Tensor:
    """Compute the minimum-norm M that minimizes ||A M - B||; A may be rank-deficient."""
    solution: Tensor = torch.linalg.lstsq(A, B, driver="gelsd").solution
    return solution
