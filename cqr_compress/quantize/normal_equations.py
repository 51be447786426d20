"""Solve the codebooks of a column jointly by least squares (additive quantization, Babenko & Lempitsky 2014)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.table.defaults import CPU_FLOAT

_RIDGE = 1e-4
_MAX_UNKNOWNS = 8192


def solve_codebooks(rows: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Re-solve the codebooks of one column jointly by least squares, damped toward the current codebooks.

    Args:
        rows: (n, S) float32.
        codes: (n, L) int64.
        codebooks: (L, K, S) float32.
        weights: (n,) float32 weights of the rows' squared errors, mean about 1; all 1 if None.

    Returns:
        (L, K, S) float32; the current codebooks if the system has more than 8,192 unknowns or is singular.
    """
    equations = NormalEquations.from_codebooks(codebooks)
    equations.add(rows, codes, weights)
    return equations.solve(codebooks)


@dataclass
class NormalEquations:
    """Normal equations of the codebooks of one column, accumulated over blocks of rows.

    Attributes:
        target: (L * K, S) right-hand side: weighted sum of the rows that use each codeword.
        normal: normal matrix: weighted number of rows that use two codewords, upper triangle, flat
            ((L * K)**2,); only its diagonal (K,) for one level; empty for more than 8,192 unknowns.
        num_rows: number of rows added.
    """

    target: Tensor
    normal: Tensor
    num_rows: int = 0

    @classmethod
    def from_codebooks(cls, codebooks: Tensor) -> NormalEquations:
        """Create equations without rows, for codebooks (L, K, S)."""
        L, K, S = codebooks.shape
        unknowns = 0 if L > 1 and L * K > _MAX_UNKNOWNS else L * K
        return cls(
            torch.zeros(L * K, S, **CPU_FLOAT),
            torch.zeros(K if L == 1 else unknowns * unknowns, **CPU_FLOAT),
        )

    def add(self, rows: Tensor, codes: Tensor, weights: Tensor | None) -> None:
        """Add rows (B, S), their codes (B, L) and weights (B,)."""
        L = codes.shape[1]
        K = len(self.target) // L
        flat = codes + torch.arange(L, device="cpu") * K
        cost = torch.ones(len(rows), **CPU_FLOAT) if weights is None else weights
        weighted = rows if weights is None else rows * weights[:, None]
        for level in range(L):
            self.target.index_add_(0, flat[:, level], weighted)
        self.num_rows += len(rows)
        if L == 1:
            self.normal += torch.bincount(flat[:, 0], cost, minlength=K)
        elif len(self.normal):
            for a in range(L):
                for b in range(a, L):
                    self.normal.index_add_(0, flat[:, a] * (L * K) + flat[:, b], cost)

    def solve(self, codebooks: Tensor) -> Tensor:
        """Solve for the codebooks, damped toward the current codebooks (L, K, S).

        Returns:
            (L, K, S); the current codebooks if the system has more than 8,192 unknowns or is singular.
        """
        L, K, S = codebooks.shape
        ridge = _RIDGE * max(1.0, self.num_rows / K)
        target = self.target + ridge * codebooks.reshape(L * K, S)
        if L == 1:
            return (target / (self.normal + ridge)[:, None]).view(L, K, S)
        if not len(self.normal):
            return codebooks
        normal = self.normal.view(L * K, L * K)
        normal = normal + normal.triu(1).T
        normal.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(normal)
        return codebooks if failed else torch.cholesky_solve(target, factor).view(L, K, S)
