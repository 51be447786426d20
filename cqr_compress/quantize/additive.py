"""Stored codes: product, residual and product-residual quantization as one additive quantizer per column.

PQ (Jegou, Douze & Schmid 2011, doi:10.1109/TPAMI.2010.57) is one level in many columns, RQ (Chen, Guan & Wang
2010, doi:10.3390/s101211259) many levels in one column. Codebooks start from k-means on residuals. Where
`Effort.rounds` allows, they are then re-solved jointly by least squares between re-encodings, as in additive
quantization (Babenko & Lempitsky 2014) and LSQ (Martinez et al. 2016, 2018): iterated conditional modes
(ICM) with random restarts, kept only when they lower the error.

Shapes: n or B rows, D columns, C columns of S = D // C, L levels, K codewords.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cqr_compress.quantize.kmeans import fit_centroids, nearest_centroids
from cqr_compress.quantize.rotation import balanced_pca, procrustes
from cqr_compress.table.bitpack import pack_codes
from cqr_compress.table.decode import decode_codes
from cqr_compress.table.spec import FLOAT_DTYPES, CodebookSpec

_BLOCK_VALUES = 2**21


_RIDGE = 1e-4


_MAX_UNKNOWNS = 8192


@dataclass(frozen=True)
class Effort:
    """How much work goes into a fit.

    Attributes:
        kmeans_iterations: Lloyd iterations for each codebook.
        rounds: joint refinements after k-means; 0 gives the textbook quantizer.
        beam: partial codes kept while a row is encoded level by level.
        restarts: random restarts of the local search for each row, where L > 1.
    """

    kmeans_iterations: int = 25
    rounds: int = 0
    beam: int = 4
    restarts: int = 0


@dataclass(frozen=True)
class AdditiveQuantizer:
    """Fitted codebooks that encode rows.

    Attributes:
        spec: the table's spec.
        codebooks: (C, L, K, S) in `spec.codebook_dtype`.
        rotation: (width, D) in the same dtype, or None; decoded rows are multiplied by it.
        effort: how rows are encoded.
    """

    spec: CodebookSpec
    codebooks: Tensor
    rotation: Tensor | None
    effort: Effort

    def shared_tensors(self) -> dict[str, Tensor]:
        """Tensors of the table that do not grow with its rows."""
        tensors = {"codebooks": self.codebooks}
        return tensors if self.rotation is None else {**tensors, "rotation": self.rotation}

    def encode(self, rows: Tensor, first_row: int) -> dict[str, Tensor]:
        """Encode rows: (B, D) float32 to `codes` (B, codes_width) uint8."""
        if self.rotation is not None:
            rows = rows @ self.rotation.float().T
        seed = self.spec.seed + first_row
        codes = encode_rows(rows, self.codebooks.float(), self.effort, seed)
        return {"codes": pack_codes(codes.flatten(1), self.spec.n_bits)}


def fit_additive(
    rows: Tensor, spec: CodebookSpec, effort: Effort, step: Callable[[], None], weights: Tensor | None = None
) -> AdditiveQuantizer:
    """Fit codebooks, and the rotation where the spec has one, to sampled rows.

    Args:
        rows: (n, D) float32, finite.
        spec: layout to fit.
        effort: work to put in.
        step: called after each unit of work; there are `num_steps(spec, effort)`.
        weights: (n,) float32, positive: what an error at a row costs; 1 for each if None.

    Returns:
        The quantizer, its tensors rounded to `spec.codebook_dtype`.
    """
    C, L, K = spec.num_columns, spec.num_levels, spec.codebook_size
    rotation = balanced_pca(rows, C, spec.rank) if spec.rotation else None
    rotated = rows if rotation is None else rows @ rotation
    codebooks = torch.empty(C, L, K, spec.sub_dim)
    codes = torch.empty(len(rows), C, L, dtype=torch.int64)
    columns = rotated.view(len(rows), C, spec.sub_dim).transpose(0, 1).contiguous()
    for c, column in enumerate(columns):
        residual = column
        for level in range(L):
            seed = spec.seed + c * L + level
            codebooks[c, level] = fit_centroids(residual, K, seed, effort.kmeans_iterations, weights)
            codes[:, c, level] = nearest_centroids(residual, codebooks[c, level])
            residual = residual - codebooks[c, level][codes[:, c, level]]
        step()
    exact = len(rows) <= K
    for round_ in range(0 if exact else effort.rounds):
        for c, column in enumerate(columns):
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
            codes[:, c] = search_codes(column, codebooks[c], codes[:, c], effort.restarts, spec.seed + round_)
        if spec.rotation == "opq":
            rotation = procrustes(rows, decode_codes(codes, codebooks), weights)
            columns = (rows @ rotation).view(len(rows), C, spec.sub_dim).transpose(0, 1).contiguous()
        step()
    dtype = FLOAT_DTYPES[spec.codebook_dtype]
    if not exact and effort.rounds:
        for c, column in enumerate(columns):
            codebooks[c] = solve_codebooks(column, codes[:, c], codebooks[c], weights)
    decode_rotation = None if rotation is None else rotation.T.contiguous().to(dtype)
    return AdditiveQuantizer(spec, codebooks.to(dtype), decode_rotation, effort)


def num_steps(spec: CodebookSpec, effort: Effort) -> int:
    """Calls of `step` that `fit_additive` makes at most."""
    return spec.num_columns + effort.rounds


def encode_rows(rows: Tensor, codebooks: Tensor, effort: Effort, seed: int) -> Tensor:
    """Encode rows column by column: beam search over the levels, then local search.

    Args:
        rows: (B, D) float32, already rotated.
        codebooks: (C, L, K, S) float32.
        effort: beam width and restarts.
        seed: for the restarts.

    Returns:
        (B, C, L) int64.
    """
    C, L, _, S = codebooks.shape
    codes = torch.empty(len(rows), C, L, dtype=torch.int64)
    for c in range(C):
        column = rows[:, c * S : (c + 1) * S].contiguous()
        if L == 1:
            codes[:, c, 0] = nearest_centroids(column, codebooks[c, 0])
            continue
        found = beam_search(column, codebooks[c], effort.beam)
        codes[:, c] = (
            search_codes(column, codebooks[c], found, effort.restarts, seed + c) if effort.rounds else found
        )
    return codes


def beam_search(rows: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Encode level by level, keeping the `beam` best partial sums of each row.

    Args:
        rows: (B, S) float32.
        codebooks: (L, K, S) float32.
        beam: partial codes kept; 1 is greedy residual encoding.

    Returns:
        (B, L) int64.
    """
    L, K, S = codebooks.shape
    out = torch.empty(len(rows), L, dtype=torch.int64)
    step = max(1, _BLOCK_VALUES // (beam * max(K, S)))
    norms = codebooks.square().sum(2)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        residual = block[:, None]  # (B, 1, S), then (B, beam, S)
        error = residual.square().sum(2)
        codes = torch.empty(len(block), 1, 0, dtype=torch.int64)
        for level in range(L):
            width = residual.shape[1]
            distance = torch.addmm(norms[level], residual.reshape(-1, S), codebooks[level].T, alpha=-2)
            distance = (distance.view(len(block), width, K) + error[:, :, None]).flatten(1)
            kept = 1 if level == L - 1 else min(beam, width * K)
            error, best = distance.topk(kept, dim=1, largest=False)
            parent, code = best // K, best % K  # (B, kept)
            residual = residual.gather(1, parent[..., None].expand(-1, -1, S)) - codebooks[level][code]
            codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, level)), code[..., None]], 2)
        out[start : start + step] = codes[:, 0]
    return out


def search_codes(rows: Tensor, codebooks: Tensor, codes: Tensor, restarts: int, seed: int) -> Tensor:
    """Improve codes by ICM and random restarts; never raises a row's error.

    Args:
        rows: (B, S) float32.
        codebooks: (L, K, S) float32.
        codes: (B, L) int64 to start from.
        restarts: perturbations tried.
        seed: for the perturbations.

    Returns:
        (B, L) int64.
    """
    L, K, S = codebooks.shape
    if L == 1:
        return nearest_centroids(rows, codebooks[0])[:, None]
    norms = codebooks.square().sum(2)
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty_like(codes)
    step = max(1, _BLOCK_VALUES // max(K, S))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        best, best_error = _icm(block, codebooks, norms, codes[start : start + step].clone())
        for _ in range(restarts):
            trial = best.clone()
            for _ in range(max(1, L // 6)):
                level = torch.randint(L, (len(block), 1), generator=generator)
                trial.scatter_(1, level, torch.randint(K, (len(block), 1), generator=generator))
            trial, error = _icm(block, codebooks, norms, trial)
            better = error < best_error
            best[better], best_error[better] = trial[better], error[better]
        out[start : start + step] = best
    return out


def _icm(rows: Tensor, codebooks: Tensor, norms: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Choose each level's codeword anew, the others fixed, twice round; changes `codes`."""
    L, K, S = codebooks.shape
    first = torch.arange(L) * K
    table = codebooks.reshape(L * K, S)
    residual = rows - torch.nn.functional.embedding_bag(codes + first, table, mode="sum")
    for _ in range(2):
        for level in range(L):
            target = residual + codebooks[level][codes[:, level]]
            scores = torch.addmm(norms[level], target, codebooks[level].T, alpha=-2)
            codes[:, level] = scores.min(1).indices
            residual = target - codebooks[level][codes[:, level]]
    return codes, residual.square().sum(1)


def solve_codebooks(rows: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Re-solve the codebooks of one column jointly: least squares, damped toward the current ones.

    Args:
        rows: (n, S) float32.
        codes: (n, L) int64.
        codebooks: (L, K, S) float32.
        weights: (n,) float32 of the rows' squared errors, mean about 1; 1 for each if None.

    Returns:
        (L, K, S) float32; the current codebooks where the system is larger than 8,192 unknowns.
    """
    equations = NormalEquations.of(codebooks)
    equations.add(rows, codes, weights)
    return equations.solve(codebooks)


@dataclass
class NormalEquations:
    """Least squares for the codebooks of one column, added up over blocks of rows.

    Attributes:
        target: (L * K, S) sums of the rows that each codeword takes part in.
        normal: how often two codewords meet: (L * K)**2 flat, or (K,) of one level.
        num_rows: rows so far.
    """

    target: Tensor
    normal: Tensor
    num_rows: int = 0

    @classmethod
    def of(cls, codebooks: Tensor) -> NormalEquations:
        """Begin with no rows, for codebooks (L, K, S)."""
        L, K, S = codebooks.shape
        unknowns = 0 if L > 1 and L * K > _MAX_UNKNOWNS else L * K
        return cls(torch.zeros(L * K, S), torch.zeros(K if L == 1 else unknowns * unknowns))

    def add(self, rows: Tensor, codes: Tensor, weights: Tensor | None) -> None:
        """Add rows (B, S), their codes (B, L) and weights (B,)."""
        L = codes.shape[1]
        K = len(self.target) // L
        flat = codes + torch.arange(L) * K
        cost = torch.ones(len(rows)) if weights is None else weights
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
        """Solve for the codebooks (L, K, S), damped toward the current ones.

        Returns:
            The current ones where the system is larger than 8,192 unknowns.
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
