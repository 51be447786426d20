"""Checksums of the tensors of a safetensors file, and the write that a shard belongs to, in its metadata.

cqr_compress_crc32  CRC-32 of the bytes of each tensor of this file: eight hexadecimal digits per tensor, in the
order of the sorted names
cqr_compress_write  in shards and their index: 16 hexadecimal digits that all files of one write share
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cqr_compress.errors import CheckpointError

CHECKSUMS_KEY = "cqr_compress_crc32"
WRITE_KEY = "cqr_compress_write"
WRITE_DIGITS = 16


def checksum(block: Tensor, before: int = 0) -> int:
    """Compute the CRC-32 of the bytes of a tensor, continued from that of the preceding blocks."""
    return zlib.crc32(block.contiguous().reshape(-1).view(torch.uint8).numpy().data, before)


def checksum_of(blocks: Iterable[tuple[int, Tensor]], step: Callable[[int], None]) -> int:
    """Compute the CRC-32 of a tensor, given its blocks from `read_blocks`; `step` receives the bytes of each."""
    value = 0
    for _, block in blocks:
        value = checksum(block, value)
        step(block.nbytes)
    return value


def checksums_to_text(checksums: Mapping[str, int]) -> str:
    """Format the checksums of a file as the value of CHECKSUMS_KEY."""
    return "".join(f"{checksums[name]:08x}" for name in sorted(checksums))


def checksums_from_text(text: str, names: Iterable[str], where: str) -> dict[str, int]:
    """Parse the value of CHECKSUMS_KEY.

    Raises:
        CheckpointError: it has not eight hexadecimal digits per tensor.
    """
    ordered = sorted(names)
    try:
        if len(text) != 8 * len(ordered):
            raise ValueError(f"{len(text)} digits for {len(ordered)} tensors")
        return {name: int(text[8 * i : 8 * i + 8], 16) for i, name in enumerate(ordered)}
    except ValueError as e:
        raise CheckpointError(f"the checksums in the metadata of {where!r} are damaged: {e}") from e
