"""Encode rows with given codebooks: beam search over the levels, then local search.

Beam search: Chen, Guan & Wang 2010, doi:10.3390/s101211259. Local search: iterated conditional modes (ICM) with
random restarts, as in LSQ (Martinez et al. 2016, 2018).

Shapes: B rows, C columns of S dimensions, L levels, K codewords.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cqr_compress.quantize.base import FitEffort
from cqr_compress.quantize.kmeans import nearest_centroids
from cqr_compress.table.spec import STORED, CodebookSpec

_BLOCK_VALUES = 2**21


def encode_rows(rows: Tensor, codebooks: Tensor, effort: FitEffort, seed: int) -> Tensor:
    """Encode rows column by column: beam search over the levels, then local search.

    Args:
        rows: (B, D) float32, already rotated.
        codebooks: (C, L, K, S) float32.
        effort: beam width and restarts.
        seed: seed of the restarts.

    Returns:
        (B, C, L) int64.
    """
    C, L, _, S = codebooks.shape
    codes = torch.empty(len(rows), C, L, dtype=torch.int64, device="cpu")
    for c in range(C):
        column = rows[:, c * S : (c + 1) * S].contiguous()
        if L == 1:
            codes[:, c, 0] = nearest_centroids(column, codebooks[c, 0])
            continue
        found = beam_search(column, codebooks[c], effort.beam)
        codes[:, c] = (
            search_codes(column, codebooks[c], found, effort.restarts, seed + c) if effort.refine_rounds else found
        )
    return codes


def beam_search(rows: Tensor, codebooks: Tensor, beam: int) -> Tensor:
    """Encode rows level by level with beam search.

    Args:
        rows: (B, S) float32.
        codebooks: (L, K, S) float32.
        beam: beam width; 1 is greedy residual encoding.

    Returns:
        (B, L) int64.
    """
    L, K, S = codebooks.shape
    out = torch.empty(len(rows), L, dtype=torch.int64, device="cpu")
    step = max(1, _BLOCK_VALUES // (beam * max(K, S)))
    norms = codebooks.square().sum(2)
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        residual = block[:, None]  # (B, 1, S), then (B, beam, S)
        error = residual.square().sum(2)
        codes = torch.empty(len(block), 1, 0, dtype=torch.int64, device="cpu")
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
    """Improve codes by ICM with random restarts; the error of a row never increases.

    Args:
        rows: (B, S) float32.
        codebooks: (L, K, S) float32.
        codes: (B, L) int64 to start from.
        restarts: number of random perturbations, each followed by ICM.
        seed: seed of the perturbations.

    Returns:
        (B, L) int64.
    """
    L, K, S = codebooks.shape
    if L == 1:
        return nearest_centroids(rows, codebooks[0])[:, None]
    generator = torch.Generator().manual_seed(seed)
    out = torch.empty_like(codes)
    step = max(1, _BLOCK_VALUES // max(K, S))
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        best, best_error = _icm(block, codebooks, codes[start : start + step].clone())
        for _ in range(restarts):
            trial = best.clone()
            for _ in range(max(1, L // 6)):
                level = torch.randint(L, (len(block), 1), generator=generator, device="cpu")
                trial.scatter_(1, level, torch.randint(K, (len(block), 1), generator=generator, device="cpu"))
            trial, error = _icm(block, codebooks, trial)
            better = error < best_error
            best[better], best_error[better] = trial[better], error[better]
        out[start : start + step] = best
    return out


def _icm(rows: Tensor, codebooks: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Update each level's codeword with the others fixed, in two sweeps; modifies `codes` in place."""
    L, K, S = codebooks.shape
    first = torch.arange(L, device="cpu") * K
    table = codebooks.reshape(L * K, S)
    residual = rows - torch.nn.functional.embedding_bag(codes + first, table, mode="sum")
    for _ in range(2):
        for level in range(L):
            target = residual + codebooks[level][codes[:, level]]
            codes[:, level] = nearest_centroids(target, codebooks[level])
            residual = target - codebooks[level][codes[:, level]]
    return codes, residual.square().sum(1)


def point_rows(column: Tensor, codebooks: Tensor, codes: Tensor, spec: CodebookSpec) -> Tensor:
    """Find the stored codeword nearest to the residual that the other levels leave of a column.

    Args:
        column: (B, S) float32.
        codebooks: (L, K, S) float32.
        codes: (B, L) int64; those of the stored level are not read.
        spec: spec of the table, with one stored level.

    Returns:
        (B,) int64 pointers.
    """
    stored = spec.code_sources.index(STORED)
    rest = column
    for level in range(spec.num_levels):
        if level != stored:
            rest = rest - codebooks[level][codes[:, level]]
    return nearest_centroids(rest.contiguous(), codebooks[stored])
