"""Codes of rows: stored codes are unpacked, others are computed from the ids."""

from __future__ import annotations

import torch
from torch import Tensor

from cqr_compress.table.bitpack import unpack_codes
from cqr_compress.table.hashing import hash_ids
from cqr_compress.table.spec import DIGIT, HASHED, QUOTIENT, REMAINDER, STORED, CodebookSpec


def flat_codes(codes: Tensor, codebook_size: int) -> Tensor:
    """Convert codes to row numbers of codebooks flattened to (C * L * K, S): (B, C, L) integers."""
    C, L = codes.shape[1:]
    first = torch.arange(0, C * L * codebook_size, codebook_size, device=codes.device, dtype=torch.int32)
    return codes + first.view(C, L)


def computed_codes(spec: CodebookSpec, ids: Tensor) -> Tensor:
    """Compute the codes of the levels that are not stored; zeros for stored levels.

    Args:
        spec: the table's spec.
        ids: (B,) integers, any device.

    Returns:
        (B, C, L) int64 on the device of `ids`.
    """
    ids, C, L = ids.to(torch.int64), spec.num_columns, spec.num_levels
    levels = []
    for level, source in enumerate(spec.code_sources):
        if source == HASHED:
            levels.append(hash_ids(ids, spec.codebook_size, spec.seed, range(level, C * L, L)))
        elif source == QUOTIENT:
            levels.append((ids // -(-spec.num_embeddings // spec.codebook_size))[:, None].expand(-1, C))
        elif source == REMAINDER:
            levels.append((ids % spec.codebook_size)[:, None].expand(-1, C))
        elif source == DIGIT:
            levels.append(_digits(ids, spec.num_embeddings, spec.codebook_size, C))
        else:
            levels.append(torch.zeros_like(ids)[:, None].expand(-1, C))
    return torch.stack(levels, dim=2)


def _digits(ids: Tensor, N: int, K: int, num_columns: int) -> Tensor:
    """Compute the remainder id % K, then digits of id / N in base K: (B, C), unique for each id if N <= K**C."""
    digits = [ids % K]
    rest = ids
    for _ in range(1, num_columns):  # long division
        digits.append(rest * K // N)
        rest = rest * K % N
    return torch.stack(digits, dim=1)


def row_codes(spec: CodebookSpec, packed: Tensor | None, ids: Tensor) -> Tensor:
    """Return all codes of rows: stored codes unpacked, the others computed from the ids.

    Args:
        spec: the table's spec.
        packed: (B, codes_width) uint8, the stored codes of the rows; None if no level is stored.
        ids: (B,) ids.

    Returns:
        (B, C, L) integers in [0, K).
    """
    C, stored = spec.num_columns, spec.num_stored_levels
    if packed is None:
        return computed_codes(spec, ids)
    unpacked = unpack_codes(packed, C * stored, spec.n_bits).view(-1, C, stored)
    if stored == spec.num_levels:
        return unpacked
    from_file = iter(unpacked.to(torch.int64).unbind(2))
    computed = computed_codes(spec, ids).unbind(2)
    levels = [next(from_file) if s == STORED else computed[i] for i, s in enumerate(spec.code_sources)]
    return torch.stack(levels, dim=2)
