"""Checksums of the tensors of a safetensors file, and the write that a shard belongs to, in its metadata.

cqr_compress_crc32  CRC-32 of each tensor of this file, of its dtype and shape as a text such as `float16 4 2` and
then its bytes: eight hexadecimal digits per tensor, in the order of the sorted names; each exclusive-or the CRC-32
of the header (the metadata under `cqr_compress`, where the file has it) and then the sorted names as a JSON list
cqr_compress_write  in shards and their index: 16 hexadecimal digits that all files of one write share
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import TensorEntry, read_blocks
from cqr_compress.checkpoint.header import METADATA_KEY
from cqr_compress.errors import CheckpointError
from cqr_compress.table.base_spec import dtype_name
from cqr_compress.table.blocks import BLOCK_BYTES

CHECKSUMS_KEY = "cqr_compress_crc32"
WRITE_KEY = "cqr_compress_write"
WRITE_DIGITS = 16


def checksum(block: Tensor, before: int = 0) -> int:
    """Compute the CRC-32 of the bytes of a tensor, continued from that of the preceding blocks."""
    return zlib.crc32(bytes_of(block), before)


def bytes_of(values: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, in the order of its elements."""
    flat = values.contiguous().as_strided((values.numel(),), (1,))  # a single element may have any stride
    return flat.view(torch.uint8).numpy().data


def initial_checksum(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Compute the CRC-32 of a tensor before its bytes."""
    return zlib.crc32(" ".join([dtype_name(dtype), *map(str, shape)]).encode())


def checksum_of(entry: TensorEntry, step: Callable[[int], None]) -> int:
    """Compute the CRC-32 of a tensor in blocks; `step` receives the bytes of each."""
    value = initial_checksum(entry.shape, entry.dtype)
    for _, block in read_blocks(entry, BLOCK_BYTES):
        value = checksum(block, value)
        step(block.nbytes)
    return value


def checksums_to_text(checksums: Mapping[str, int], metadata: Mapping[str, str]) -> str:
    """Format the checksums of a file as the value of CHECKSUMS_KEY, given the other metadata of the file."""
    names = sorted(checksums)
    header = _header_checksum(metadata, names)
    return "".join(f"{checksums[name] ^ header:08x}" for name in names)


def _header_checksum(metadata: Mapping[str, str], names: list[str]) -> int:
    return zlib.crc32((metadata.get(METADATA_KEY, "") + json.dumps(names)).encode())


def checksums_from_text(metadata: Mapping[str, str], names: Iterable[str], where: str) -> dict[str, int]:
    """Parse the value of CHECKSUMS_KEY in the metadata of a file.

    Raises:
        CheckpointError: it has not eight hexadecimal digits per tensor.
    """
    ordered, text = sorted(names), metadata[CHECKSUMS_KEY]
    header = _header_checksum(metadata, ordered)
    try:
        if len(text) != 8 * len(ordered):
            raise ValueError(f"{len(text)} digits for {len(ordered)} tensors")
        return {name: int(text[8 * i : 8 * i + 8], 16) ^ header for i, name in enumerate(ordered)}
    except ValueError as e:
        raise CheckpointError(f"the checksums in the metadata of {where!r} are damaged: {e}") from e
