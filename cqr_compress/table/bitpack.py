"""Packing of codes of 1 to 16 bits, without gaps within a row; every row starts on a byte boundary."""

from __future__ import annotations

import torch
from torch import Tensor

from cqr_compress.errors import ShapeError
from cqr_compress.table.tracing import is_exporting


def packed_width(num_codes: int, n_bits: int) -> int:
    """Return the bytes of one packed row: ceil(num_codes * n_bits / 8)."""
    return (num_codes * n_bits + 7) // 8


def pack_codes(codes: Tensor, n_bits: int) -> Tensor:
    """Pack integer codes with `n_bits` each, least significant bit first.

    Args:
        codes: (N, M) integers in [0, 2**n_bits), any device.
        n_bits: 1 to 16.

    Returns:
        (N, packed_width(M, n_bits)) uint8 on the same device.

    Raises:
        ShapeError: a code does not fit in `n_bits`, or n_bits is outside 1 to 16.
    """
    _check_n_bits(n_bits)
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >> n_bits):
        raise ShapeError(
            f"cannot pack codes from {int(codes.min())} to {int(codes.max())} into {n_bits} bits: "
            f"the range is 0 to {2**n_bits - 1}"
        )
    num_rows, num_codes = codes.shape
    if n_bits == 8:
        return codes.to(torch.uint8)
    first_byte, shift = _positions(num_codes, n_bits, codes.device)
    shifted = codes.to(torch.int32) << shift  # (N, M), at most 23 bits
    width = packed_width(num_codes, n_bits)
    packed = torch.zeros(num_rows, width + 2, dtype=torch.int32, device=codes.device)
    for byte in range(3):  # codes never overlap, so addition is bitwise or
        packed.index_add_(1, first_byte + byte, (shifted >> (8 * byte)) & 0xFF)
    return packed[:, :width].to(torch.uint8)


def unpack_codes(packed: Tensor, num_codes: int, n_bits: int) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: (N, packed_width(num_codes, n_bits)) uint8, any device.
        num_codes: M, number of codes in a row.
        n_bits: 1 to 16.

    Returns:
        (N, M) uint8 or int32 on the same device; all values are in [0, 2**n_bits).

    Raises:
        ShapeError: the width of `packed` does not match M codes of `n_bits`, or n_bits is outside 1 to 16.
    """
    _check_n_bits(n_bits)
    if not torch.jit.is_tracing() and packed.shape[1] != packed_width(num_codes, n_bits):  # type: ignore
        raise ShapeError(
            f"cannot unpack {num_codes} codes of {n_bits} bits from rows of {packed.shape[1]} bytes: "
            f"they take {packed_width(num_codes, n_bits)}"
        )
    if n_bits == 8:
        return packed
    if n_bits == 4:
        wide = packed.to(torch.int32) if is_exporting() else packed  # ONNX shifts of bytes are signed
        return torch.stack((wide & 15, torch.bitwise_right_shift(wide, 4)), dim=2).flatten(1)[:, :num_codes]
    first_byte, shift = _positions(num_codes, n_bits, packed.device)
    padded = torch.nn.functional.pad(packed, (0, 2)).to(torch.int32)
    wide = padded.index_select(1, first_byte) + padded.index_select(1, first_byte + 1) * 2**8
    if n_bits > 9:  # only then a code can span three bytes
        wide = wide + padded.index_select(1, first_byte + 2) * 2**16
    return torch.bitwise_right_shift(wide, shift).bitwise_and_(2**n_bits - 1)


def _positions(num_codes: int, n_bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    bit = torch.arange(num_codes, device=device) * n_bits
    return bit // 8, (bit % 8).to(torch.int32)


def _check_n_bits(n_bits: int) -> None:
    if not 1 <= n_bits <= 16:
        raise ShapeError(f"n_bits is {n_bits}: give 1 to 16 bits")
