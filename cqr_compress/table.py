"""The one compressed table: a spec and its tensors, decoded by the one codebook formula."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cqr_compress.bitpack import unpack_codes
from cqr_compress.errors import FormatError, ShapeError
from cqr_compress.hashing import hash_ids
from cqr_compress.spec import HASHED, QUOTIENT, STORED, AnySpec, CodebookSpec

BLOCK_BYTES = 16 * 2**20
"""Working memory that one block of rows may take, in float32."""


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
        for a, b in row_blocks(stop - start, _work_width(self.spec)):
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


def decode_block(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Decode some rows of a table and put its kept rows in their places.

    Args:
        spec: the table's spec.
        tensors: all of `spec.tensor_shapes()`; those in PER_ROW hold only the B rows of `ids`.
        ids: (B,) int64 row numbers.

    Returns:
        (B, D) in the source's dtype.
    """
    rows = decode_rows(spec, tensors, ids).to(spec.torch_dtype)
    if "kept_ids" not in tensors:
        return rows
    # two sorted lists: the ids of `kept_rows`, then those of all-zero rows
    for sorted_ids, values in (
        (tensors["kept_ids"][: spec.num_kept_rows], tensors["kept_rows"]),
        (tensors["kept_ids"][spec.num_kept_rows :], None),
    ):
        if len(sorted_ids):
            at = torch.searchsorted(sorted_ids, ids.to(sorted_ids.dtype)).clamp_max(len(sorted_ids) - 1)
            hit = sorted_ids[at] == ids
            rows[hit] = 0.0 if values is None else values[at[hit]]
    return rows


def decode_rows(spec: AnySpec, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Compute rows from their codes.

    Args:
        spec: the table's spec.
        tensors: `spec.body_shapes()` by name; those in PER_ROW hold only the B rows of `ids`.
        ids: (B,) int64, the row numbers, from which hashed codes are computed.

    Returns:
        (B, D) float32.

    Raises:
        FormatError: a stored code names no codeword.
    """
    if isinstance(spec, CodebookSpec):
        codes = _all_codes(spec, tensors.get("codes"), ids)
        return decode_codes(codes, tensors["codebooks"].float(), tensors.get("rotation"))
    codes = unpack_codes(tensors["codes"], spec.embedding_dim, spec.n_bits)
    return tensors["row_offset"].float()[:, None] + tensors["row_scale"].float()[:, None] * codes


def decode_codes(codes: Tensor, codebooks: Tensor, rotation: Tensor | None = None) -> Tensor:
    """Evaluate the codebook formula.

    Args:
        codes: (B, C, L) integers in [0, K).
        codebooks: (C, L, K, S) float32.
        rotation: (D, D) or None; the concatenated row is multiplied by it from the right.

    Returns:
        (B, D) float32.
    """
    C, L, K, S = codebooks.shape
    first = torch.arange(C * L, device=codes.device).view(C, L) * K
    flat = codes + first  # (B, C, L) rows of the flattened codebooks
    table = codebooks.reshape(C * L * K, S)
    summed = F.embedding_bag(flat.view(-1, L), table, mode="sum") if L > 1 else F.embedding(flat, table)
    rows = summed.reshape(-1, C * S)
    return rows if rotation is None else rows @ rotation.float()


def computed_codes(spec: CodebookSpec, ids: Tensor) -> Tensor:
    """Codes of the levels that are not stored; zeros where they are.

    Args:
        spec: the table's spec.
        ids: (B,) int64.

    Returns:
        (B, C, L) int64.
    """
    K = spec.codebook_size
    codes = torch.zeros(len(ids), spec.num_columns, spec.num_levels, dtype=torch.int64)
    for level, source in enumerate(spec.code_sources):
        for column in range(spec.num_columns):
            if source == HASHED:
                stream = column * spec.num_levels + level
                codes[:, column, level] = hash_ids(ids, K, spec.seed, stream)
            elif source == QUOTIENT:
                codes[:, column, level] = ids // -(-spec.num_embeddings // K)
            elif source != STORED:
                codes[:, column, level] = ids % K
    return codes


def _all_codes(spec: CodebookSpec, packed: Tensor | None, ids: Tensor) -> Tensor:
    C, stored = spec.num_columns, spec.num_stored_levels
    if packed is None:
        return computed_codes(spec, ids)
    unpacked = unpack_codes(packed, C * stored, spec.n_bits).view(-1, C, stored)
    if unpacked.numel() and int(unpacked.max()) >= spec.codebook_size:
        raise FormatError(f"code {int(unpacked.max())} names no codeword of {spec.codebook_size}")
    if stored == spec.num_levels:
        return unpacked
    codes = computed_codes(spec, ids)
    codes[:, :, [source == STORED for source in spec.code_sources]] = unpacked.to(torch.int64)
    return codes


def _work_width(spec: AnySpec) -> int:
    """Float32 values that decoding one row takes, codes included."""
    if isinstance(spec, CodebookSpec):
        return spec.embedding_dim + 4 * spec.num_columns * spec.num_levels
    return 3 * spec.embedding_dim
