"""Decode codes to rows: the codebook formula, paths through a trellis, and row-wise integers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from cqr_compress.table.bitpack import unpack_codes
from cqr_compress.table.codes import flat_codes, row_codes
from cqr_compress.table.spec import AnySpec, CodebookSpec, TrellisSpec
from cqr_compress.table.tiers import gather_codes, places, stored_codes, tiers_of
from cqr_compress.table.tracing import is_exporting, is_tracing
from cqr_compress.table.trellis import values_of_states, window_states

PER_ROW = frozenset({"codes", "row_scale", "row_offset", "row_gain"})
"""Tensors with an entry for each row of the table, in the order of the rows."""
TIERS = "tiers"
"""Name of the tiers (B,) int64 of rows that were gathered from a table with several."""


def gather_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Gather the entries of ids: PER_ROW with B rows, TIERS where there are several, and the other tensors.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`.
        ids: (B,) integers in [0, N).
    """
    has_tiers = isinstance(spec, TrellisSpec) and spec.has_tiers
    here = {
        s: _take(t, ids) if s in PER_ROW and not (has_tiers and s == "codes") else t for s, t in tensors.items()
    }
    if isinstance(spec, TrellisSpec) and has_tiers:
        here["codes"] = gather_codes(spec, tensors, ids)  # torch 2.6 cannot compile |=
        here[TIERS] = tiers_of(tensors, ids)
    return here


def _take(tensor: Tensor, ids: Tensor) -> Tensor:
    return torch.embedding(tensor, ids) if tensor.ndim == 2 else tensor.index_select(0, ids)


def write_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, gathered: Mapping[str, Tensor]) -> None:
    """Replace the entries of ids, each once, in place: the inverse of `gather_rows`.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`.
        ids: (B,) int64 in [0, N).
        gathered: entries of PER_ROW for these rows; others are ignored.
    """
    for short in PER_ROW & gathered.keys():
        tensor, new = tensors[short], gathered[short].to(tensors[short].device)
        if isinstance(spec, TrellisSpec) and spec.has_tiers and short == "codes":
            at, inside = places(spec, tensors, ids)
            tensor[at[inside]] = new[inside]
        else:
            tensor[ids] = new


def stored_rows(spec: AnySpec, gathered: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of PER_ROW of encoded rows as they are stored: codes of several tiers without gaps.

    Args:
        spec: the table's spec.
        gathered: from `Quantizer.encode`, as from `gather_rows`.
    """
    stored = {short: tensor for short, tensor in gathered.items() if short in PER_ROW}
    if isinstance(spec, TrellisSpec) and spec.has_tiers:
        stored["codes"] = stored_codes(spec, gathered["codes"], gathered[TIERS])
    return stored


def decode(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Decode rows of a table, including its exact and zero rows; differentiable.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`, from `gather_rows`.
        ids: (B,) int32 or int64 ids.
        dtype: dtype of the result; that of the source if None.

    Returns:
        (B, D) in `dtype`.
    """
    dtype = dtype or spec.torch_dtype
    return with_exact_rows(spec, tensors, ids, decode_rows(spec, tensors, ids).to(dtype))


def decode_all(spec: AnySpec, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Decode all rows of a table in one block, as a graph that is traced has to; differentiable.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`.
        dtype: dtype of the result.

    Returns:
        (N, D) in `dtype`.
    """
    ids = torch.arange(spec.num_embeddings, device=next(iter(tensors.values())).device)
    here = gather_rows(spec, tensors, ids) if isinstance(spec, TrellisSpec) and spec.has_tiers else tensors
    rows = decode_rows(spec, here, ids).to(dtype)
    if "kept_ids" not in tensors:
        return rows
    kept, zero = tensors["kept_ids"].to(torch.int64).tensor_split([spec.num_kept_rows])
    if spec.num_kept_rows:
        rows = rows.index_copy(0, kept, tensors["kept_rows"].to(dtype))
    return rows.index_fill(0, zero, 0.0) if spec.num_zero_rows else rows


def with_exact_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, rows: Tensor) -> Tensor:
    """Replace decoded rows by the exact and zero rows of the table.

    Args:
        spec: the table's spec.
        tensors: tensors of the table, with `kept_ids` and `kept_rows` if the spec has them.
        ids: (B,) ids.
        rows: (B, D) rows decoded from codes, any dtype; modified in place if no gradient is required.

    Returns:
        (B, D) in the dtype of `rows`.
    """
    if "kept_ids" not in tensors:
        return rows
    # two sorted lists: the ids of `kept_rows`, then those of the zero rows
    kept, zero = tensors["kept_ids"].tensor_split([spec.num_kept_rows])
    if spec.num_kept_rows:
        at, hit = _find(kept, spec.num_kept_rows, ids)
        rows = torch.where(hit[:, None], torch.embedding(tensors["kept_rows"], at).to(rows.dtype), rows)
    if spec.num_zero_rows:
        _, hit = _find(zero, spec.num_zero_rows, ids)
        in_place = not rows.requires_grad and not is_tracing()
        rows = (rows.masked_fill_ if in_place else rows.masked_fill)(hit[:, None], 0.0)
    return rows


def _find(sorted_ids: Tensor, length: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Find the position of each id in a sorted list, and whether the list contains it."""
    if length == 1:
        return torch.zeros_like(ids), sorted_ids.to(ids.dtype) == ids
    if is_exporting():
        return _bisect(sorted_ids.to(torch.int64), length, ids.to(torch.int64))
    at = torch.searchsorted(sorted_ids, ids.to(sorted_ids.dtype)).clamp_max(length - 1)
    return at, sorted_ids[at] == ids


def _bisect(sorted_ids: Tensor, length: int, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same as `_find` by an unrolled binary search for the last entry that is not larger than the id."""
    at = torch.zeros_like(ids)
    for bit in reversed(range((length - 1).bit_length())):
        probe = (at + 2**bit).clamp_max(length - 1)
        at = torch.where(sorted_ids.index_select(0, probe) <= ids, probe, at)
    return at, sorted_ids.index_select(0, at) == ids


def decode_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Decode rows from their codes; differentiable.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name, from `gather_rows`.
        ids: (B,) ids, from which hashed codes are computed.

    Returns:
        (B, D) float32; float64 for float64 codebooks.
    """
    if isinstance(spec, CodebookSpec):
        flat = flat_codes(row_codes(spec, tensors.get("codes"), ids), spec.codebook_size)
        table = at_least_float32(tensors["codebooks"]).reshape(-1, spec.sub_dim)
        return rotated(tensors, sum_codewords(flat, table, spec.num_levels).reshape(-1, spec.width))
    if isinstance(spec, TrellisSpec):
        tiers = tensors.get(TIERS)
        states = window_states(tensors["codes"], tensors["dim_rates"], spec.window, tiers)
        return rotated(tensors, values_of_states(spec, tensors, states, tensors.get("row_gain"), tiers))
    codes = unpack_codes(tensors["codes"], spec.embedding_dim, spec.n_bits)
    scale, offset = (at_least_float32(tensors[name])[:, None] for name in ("row_scale", "row_offset"))
    return offset + scale * codes


def rotated(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Multiply rows (B, width) by the table's rotation and add its mean, where it has them: (B, D)."""
    mean = tensors.get("row_mean")
    if "rotation" not in tensors:
        return rows if mean is None else rows + mean.to(rows.dtype)
    if is_tracing() or torch.is_autocast_enabled(rows.device.type):
        with torch.autocast(rows.device.type, enabled=False):  # it must not reduce the precision of a table
            return _rotated(rows, tensors["rotation"], mean)
    return _rotated(rows, tensors["rotation"], mean)


def _rotated(rows: Tensor, rotation: Tensor, mean: Tensor | None) -> Tensor:
    rotation = rotation.to(rows.dtype)
    return rows @ rotation if mean is None else torch.addmm(mean.to(rows.dtype), rows, rotation)


def decode_codes(codes: Tensor, codebooks: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Evaluate the codebook formula for codes and codebooks without a table.

    Args:
        codes: (B, C, L) integers in [0, K).
        codebooks: (C, L, K, S) float32 or float64.
        rotation: (C * S, D) or None; the concatenated row is multiplied by it from the right.

    Returns:
        (B, D) in the dtype of the codebooks.
    """
    C, L, K, S = codebooks.shape
    rows = sum_codewords(flat_codes(codes, K), codebooks.reshape(-1, S), L).reshape(-1, C * S)
    return rows if rotation is None else rows @ rotation.to(rows.dtype)


def sum_codewords(flat: Tensor, table: Tensor, num_levels: int) -> Tensor:
    """Look up codewords and sum those of each column: indices (B, C, L) into `table` (R, S) to (B * C, S)."""
    if num_levels == 1:
        return F.embedding(flat.view(-1), table)
    flat = flat.view(-1, num_levels)
    if is_exporting():
        first, *others = flat.unbind(1)
        rows = F.embedding(first, table)
        for level in others:
            rows = rows + F.embedding(level, table)
        return rows
    return F.embedding_bag(flat, table, mode="sum")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert half precision, in which sums of codewords would lose digits, to float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
