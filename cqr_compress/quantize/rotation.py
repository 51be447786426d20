"""Rotations that balance a table's variance over the columns (Ge, He, Ke & Sun 2013, OPQ)."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_pca(rows: Tensor, num_columns: int, rank: int | None = None) -> Tensor:
    """Compute the PCA rotation with directions allocated to columns so that products of variances are balanced.

    "Optimized Product Quantization", section 3.3 (eigenvalue allocation), doi:10.1109/TPAMI.2013.240.

    Args:
        rows: (n, D) float32.
        num_columns: C, a divisor of the rank.
        rank: number of principal directions to keep, those of largest variance; all D if None.

    Returns:
        (D, rank) float32 with orthonormal columns; `rows @ result` are the rotated rows.
    """
    D = rows.shape[1]
    rank = rank or D
    sub_dim = rank // num_columns
    variances, directions = torch.linalg.eigh((rows.T @ rows).double() / max(1, len(rows)))
    log_variances = variances.clamp_min(variances.max() * 1e-12 + 1e-300).log()
    filled = [0.0] * num_columns
    columns: list[list[int]] = [[] for _ in range(num_columns)]
    for direction in range(D - 1, D - 1 - rank, -1):  # eigh sorts ascending
        open_columns = [c for c in range(num_columns) if len(columns[c]) < sub_dim]
        chosen = min(open_columns, key=lambda c: (filled[c], len(columns[c]), c))
        columns[chosen].append(direction)
        filled[chosen] += float(log_variances[direction] - log_variances[0]) + 1e-9
    order = [direction for column in columns for direction in column]
    rotation: Tensor = directions[:, order].float()
    return rotation


def procrustes(rows: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Find R with orthonormal columns that minimizes ||rows - target @ R.T|| (Schonemann 1966).

    If R is square, this equals ||rows @ R - target||.

    Args:
        rows: (n, D) float32.
        target: (n, rank) float32.
        weights: (n,) weights of the rows' squared errors; all 1 if None.

    Returns:
        (D, rank) float32.
    """
    target = target if weights is None else target * weights[:, None]
    left, _, right = torch.linalg.svd((rows.T @ target).double(), full_matrices=False)
    rotation: Tensor = (left @ right).float()
    return rotation
