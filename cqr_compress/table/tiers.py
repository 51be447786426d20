"""Rows of several tiers, whose codes follow each other: which tier a row has, and where its codes begin.

A row's tier has 2 bits; `tier_starts` has the first byte of every TIER_BLOCK-th row, to which the bytes of the
rows between are added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cqr_compress.errors import FormatError, ShapeError
from cqr_compress.table.trellis_spec import MAX_TIERS, TIER_BLOCK, TrellisSpec

_ROWS_PER_BYTE = 4
_BYTES_PER_BLOCK = TIER_BLOCK // _ROWS_PER_BYTE


def tier_tensors(spec: TrellisSpec, tiers: Tensor) -> dict[str, Tensor]:
    """Make the tensors that locate the codes of each row.

    Args:
        spec: a spec with several tiers.
        tiers: (N,) uint8 tier of each row, as many of each as the spec has.

    Returns:
        `row_tiers` and `tier_starts`.
    """
    sizes = torch.tensor(spec.tier_nbytes, dtype=torch.int64, device=tiers.device)[tiers.long()]
    starts = (sizes.cumsum(0) - sizes)[::TIER_BLOCK]
    padded = torch.zeros(-(-len(tiers) // _ROWS_PER_BYTE) * _ROWS_PER_BYTE, dtype=torch.uint8, device=tiers.device)
    padded[: len(tiers)] = tiers
    shifts = 4 ** torch.arange(_ROWS_PER_BYTE, dtype=torch.uint8, device=tiers.device)
    packed = (padded.view(-1, _ROWS_PER_BYTE) * shifts).sum(1, dtype=torch.uint8)
    return {"row_tiers": packed, "tier_starts": starts.to(spec.body_shapes()["tier_starts"].dtype)}


def tiers_of(tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Read the tiers of rows: (B,) ids to (B,) int64."""
    ids = ids.to(torch.int64)
    packed = tensors["row_tiers"].index_select(0, ids // _ROWS_PER_BYTE).to(torch.int32)
    shift = (ids % _ROWS_PER_BYTE * 2).to(torch.int32)
    return torch.bitwise_right_shift(packed, shift).bitwise_and(MAX_TIERS - 1).to(torch.int64)


def first_bytes(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Find where the codes of rows begin: (B,) ids to (B,) int64."""
    ids, packed = ids.to(torch.int64), tensors["row_tiers"]
    block, place = ids // TIER_BLOCK, ids % TIER_BLOCK
    within = torch.arange(_BYTES_PER_BLOCK, device=ids.device)
    at = (block[:, None] * _BYTES_PER_BLOCK + within).clamp_max((spec.num_embeddings - 1) // _ROWS_PER_BYTE)
    counted = (place[:, None] - _ROWS_PER_BYTE * within).clamp(0, _ROWS_PER_BYTE)
    read = packed.index_select(0, at.flatten()).to(torch.int64).view_as(at)
    before = _bytes_of_first_rows(spec, ids.device).flatten().index_select(0, (256 * counted + read).flatten())
    return tensors["tier_starts"].index_select(0, block).to(torch.int64) + before.view_as(at).sum(1)


def _bytes_of_first_rows(spec: TrellisSpec, device: torch.device) -> Tensor:
    """Return the bytes of the first 0 to 4 rows of each value of a byte of `row_tiers`: (5, 256) int64."""
    byte = torch.arange(256, device=device)
    sums = [torch.zeros_like(byte)]
    for row in range(_ROWS_PER_BYTE):
        tier = byte // 4**row % MAX_TIERS
        sizes = [(tier == t).to(torch.int64) * nbytes for t, nbytes in enumerate(spec.tier_nbytes)]
        sums.append(sums[-1] + torch.stack(sizes).sum(0))
    return torch.stack(sums)


def gather_codes(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Gather the codes of rows: (B,) ids to (B, row_nbytes) uint8, with other bytes after those of a row."""
    codes, first = tensors["codes"], first_bytes(spec, tensors, ids)
    at = first[:, None] + torch.arange(spec.row_nbytes, device=ids.device)
    return codes.index_select(0, at.clamp_max(spec.codes_nbytes - 1).flatten()).view(at.shape)


def places(spec: TrellisSpec, tensors: Mapping[str, Tensor], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Locate the codes of rows (B,): indices (B, row_nbytes) into `codes`, and which of them are of the row."""
    within = torch.arange(spec.row_nbytes, device=ids.device)
    sizes = torch.tensor(spec.tier_nbytes, device=ids.device)[tiers_of(tensors, ids)]
    return first_bytes(spec, tensors, ids)[:, None] + within, within < sizes[:, None]


def stored_codes(spec: TrellisSpec, codes: Tensor, tiers: Tensor) -> Tensor:
    """Select the bytes that are stored, of codes (B, row_nbytes) of rows of tiers (B,): (n,) uint8."""
    sizes = torch.tensor(spec.tier_nbytes, device=codes.device)[tiers.to(torch.int64)]
    return codes[torch.arange(spec.row_nbytes, device=codes.device) < sizes[:, None]]


def check_tiers(spec: TrellisSpec, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that do not locate the codes of a table.

    Raises:
        FormatError: a row has a tier that the spec lacks, or its codes begin elsewhere.
    """
    N = spec.num_embeddings
    tiers = tensors["row_tiers"][:, None] // 4 ** torch.arange(_ROWS_PER_BYTE, dtype=torch.uint8, device="cpu") % 4
    tiers = tiers.flatten()[:N]
    counts = torch.bincount(tiers.to(torch.int64), minlength=MAX_TIERS).tolist()
    if counts != [*spec.tier_rows, *[0] * (MAX_TIERS - spec.num_tiers)]:
        raise FormatError(f"row_tiers has {counts} rows of each tier, not {list(spec.tier_rows)}")
    if not torch.equal(tier_tensors(spec, tiers)["tier_starts"], tensors["tier_starts"]):
        raise FormatError("tier_starts do not belong to row_tiers")


def importance_tiers(spec: TrellisSpec, importance: Tensor) -> Tensor:
    """Assign the rows of most importance (N,) to the largest tiers: (N,) uint8.

    Raises:
        ShapeError: another number of rows.
    """
    if len(importance) != spec.num_embeddings:
        raise ShapeError(f"importance of {len(importance)} rows, not {spec.num_embeddings}")
    tiers = torch.empty(len(importance), dtype=torch.uint8, device="cpu")
    of_rank = torch.arange(spec.num_tiers, dtype=torch.uint8, device="cpu").repeat_interleave(
        torch.tensor(spec.tier_rows, device="cpu")
    )
    tiers[importance.argsort(stable=True)] = of_rank
    return tiers
