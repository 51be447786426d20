"""The one compressed table: a spec and its tensors, decoded by the one codebook formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from cqr_compress.bitpack import unpack_codes
from cqr_compress.errors import FormatError, ShapeError
from cqr_compress.hashing import hash_ids
from cqr_compress.spec import DIGIT, HASHED, QUOTIENT, REMAINDER, STORED, AnySpec, CodebookSpec

BLOCK_BYTES = 16 * 2**20
"""Working memory that one block of rows may take, in float32."""


def is_tracing() -> bool:
    """Whether torch is recording a graph, which must not depend on the values of this call."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def is_intercepted() -> bool:
    """Whether someone watches the operations (a dispatch mode, functorch, forward-mode gradients)."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def row_blocks(num_rows: int, row_width: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Split rows 0..num_rows into half-open blocks of about `block_bytes` of float32."""
    rows = max(1, block_bytes // (4 * max(1, row_width)))
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)


@dataclass(frozen=True)
class CompressedTable:
    """A table of N rows and D columns, kept as codes and codebooks (or row-wise integers).

    Attributes:
        spec: what the tensors mean.
        tensors: by short name (`codes`, `codebooks`, ...), with the shapes of `spec.tensor_shapes()`.
    """

    spec: AnySpec
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, expected in self.spec.tensor_shapes().items():
            found = self.tensors.get(name)
            if found is None:
                raise FormatError(f"the table has no tensor {name!r} of shape {expected.shape}")
            if tuple(found.shape) != expected.shape or found.dtype != expected.dtype:
                raise FormatError(
                    f"tensor {name!r} is {tuple(found.shape)} {found.dtype}, "
                    f"and the spec says {expected.shape} {expected.dtype}"
                )

    def decode(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Decode rows start..stop, as `lookup` does; the whole table by default."""
        stop = self.spec.num_embeddings if stop is None else stop
        out = torch.empty(stop - start, self.spec.embedding_dim, dtype=self.spec.torch_dtype)
        for a, b in row_blocks(stop - start, work_width(self.spec)):
            out[a:b] = self.lookup(torch.arange(start + a, start + b))
        return out

    def lookup(self, ids: Tensor) -> Tensor:
        """Decode the rows of `ids`; work is done in float32 and not in blocks.

        Args:
            ids: (B,) integers in [0, N).

        Returns:
            (B, D) in the source's dtype.

        Raises:
            ShapeError: an id outside [0, N).
        """
        N = self.spec.num_embeddings
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= N):
            raise ShapeError(f"ids from {int(ids.min())} to {int(ids.max())} in a table of {N} rows")
        here = {name: t[ids] if name in PER_ROW else t for name, t in self.tensors.items()}
        return decode_block(self.spec, here, ids)


PER_ROW = frozenset({"codes", "row_scale", "row_offset"})
"""Tensors with one entry for each row of the table."""


def decode_block(
    spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Decode some rows of a table and put its kept rows in their places; differentiable.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`; those in PER_ROW hold only the B rows of `ids`.
        ids: (B,) int32 or int64 row numbers.
        dtype: of the result; the source's if None.

    Returns:
        (B, D) in `dtype`.
    """
    dtype = dtype or spec.torch_dtype
    return with_kept_rows(spec, tensors, ids, decode_rows(spec, tensors, ids).to(dtype))


def with_kept_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor, rows: Tensor) -> Tensor:
    """Put the rows that are stored verbatim in the places of those that codes give.

    Args:
        spec: the table's spec.
        tensors: with `kept_ids` and `kept_rows`, where the spec has them.
        ids: (B,) row numbers.
        rows: (B, D), what their codes give, in any dtype; overwritten where no gradient is asked for.

    Returns:
        (B, D) in the dtype of `rows`.
    """
    if "kept_ids" not in tensors:
        return rows
    # two sorted lists: the ids of `kept_rows`, then those of all-zero rows
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
    """Where each id would stand in a sorted list, and whether it does."""
    if length == 1:
        return torch.zeros_like(ids), sorted_ids == ids
    at = torch.searchsorted(sorted_ids, ids.to(sorted_ids.dtype)).clamp_max(length - 1)
    return at, sorted_ids[at] == ids


def decode_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Compute rows from their codes; differentiable.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name; those in PER_ROW hold only the B rows of `ids`.
        ids: (B,) the row numbers, from which hashed codes are computed.

    Returns:
        (B, D) float32, or float64 where the codebooks are.
    """
    if isinstance(spec, CodebookSpec):
        flat = flat_codes(row_codes(spec, tensors.get("codes"), ids), spec)
        table = at_least_float32(tensors["codebooks"]).reshape(-1, spec.sub_dim)
        return rotated(tensors, sum_codewords(flat, table, spec.num_levels).reshape(-1, spec.width))
    codes = unpack_codes(tensors["codes"], spec.embedding_dim, spec.n_bits)
    scale, offset = (at_least_float32(tensors[name])[:, None] for name in ("row_scale", "row_offset"))
    return offset + scale * codes


def rotated(tensors: Mapping[str, Tensor], rows: Tensor) -> Tensor:
    """Multiply rows (B, width) by the table's rotation, where it has one: (B, D)."""
    if "rotation" not in tensors:
        return rows
    with torch.autocast(rows.device.type, enabled=False):  # a table has the precision of its dtype
        return rows @ tensors["rotation"].to(rows.dtype)


def decode_codes(codes: Tensor, codebooks: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Evaluate the codebook formula for codes and codebooks that belong to no table yet.

    Args:
        codes: (B, C, L) integers in [0, K).
        codebooks: (C, L, K, S) float32 or float64.
        rotation: (C * S, D) or None; the concatenated row is multiplied by it from the right.

    Returns:
        (B, D) in the dtype of the codebooks.
    """
    C, L, K, S = codebooks.shape
    flat = codes + torch.arange(0, C * L * K, K, device=codes.device, dtype=torch.int32).view(C, L)
    rows = sum_codewords(flat, codebooks.reshape(-1, S), L).reshape(-1, C * S)
    return rows if rotation is None else rows @ rotation.to(rows.dtype)


def flat_codes(codes: Tensor, spec: CodebookSpec) -> Tensor:
    """Turn codes into rows of the codebooks flattened to (C * L * K, S): (B, C, L) integers to (B, C, L) int32."""
    C, L, K = spec.num_columns, spec.num_levels, spec.codebook_size
    return codes + torch.arange(0, C * L * K, K, device=codes.device, dtype=torch.int32).view(C, L)


def sum_codewords(flat: Tensor, table: Tensor, num_levels: int) -> Tensor:
    """Look up codewords and sum those of a column: (B, C, L) rows of `table` (R, S) to (B * C, S)."""
    if num_levels == 1:
        return F.embedding(flat.view(-1), table)
    return F.embedding_bag(flat.view(-1, num_levels), table, mode="sum")


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which sums of codewords would lose digits."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def computed_codes(spec: CodebookSpec, ids: Tensor) -> Tensor:
    """Codes of the levels that are not stored; zeros where they are.

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
    """The remainder id % K, then the digits of id / N in base K: (B, C), different for all ids if N <= K**C."""
    digits = [ids % K]
    rest = ids
    for _ in range(1, num_columns):  # long division
        digits.append(rest * K // N)
        rest = rest * K % N
    return torch.stack(digits, dim=1)


def row_codes(spec: CodebookSpec, packed: Tensor | None, ids: Tensor) -> Tensor:
    """All codes of some rows: stored ones unpacked, the others computed from the ids.

    Args:
        spec: the table's spec.
        packed: (B, codes_width) uint8, the stored codes of the rows; None where none are stored.
        ids: (B,) row numbers.

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


def work_width(spec: AnySpec) -> int:
    """Float32 values that decoding one row takes, codes included."""
    if isinstance(spec, CodebookSpec):
        return spec.embedding_dim + 4 * spec.num_columns * spec.num_levels
    return 3 * spec.embedding_dim
