"""Split rows into blocks of bounded working memory."""

from __future__ import annotations

from collections.abc import Iterator

BLOCK_BYTES = 16 * 2**20
"""Working memory of one block of rows in float32."""
GPU_BLOCK_BYTES = 256 * 2**20
"""The same on a GPU, where a small block takes no less time than a large one."""


def row_blocks(num_rows: int, row_width: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Split rows 0..num_rows into half-open blocks of about `block_bytes` of float32."""
    rows = max(1, block_bytes // (4 * max(1, row_width)))
    for start in range(0, num_rows, rows):
        yield start, min(start + rows, num_rows)
