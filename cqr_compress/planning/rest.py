"""Plan the dtypes of tensors outside the compressed tables: which can be stored in half precision."""

from __future__ import annotations

from collections.abc import Collection

import torch

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry, read_blocks
from cqr_compress.checkpoint.rest_record import FLOATS, RestRecord
from cqr_compress.progress import Progress
from cqr_compress.table.blocks import BLOCK_BYTES

_NEED_PRECISION = {
    "running_mean": "a running statistic",
    "running_var": "a running statistic",
    "inv_freq": "frequencies of positions",
}
"""Last parts of names of buffers that models compute with in float32."""
_LARGEST_LOSS = 1e-4
"""Largest relative squared error of a rounded tensor: rounding to float16 has about 1e-7, to bfloat16 3e-6."""


def plan_rest(
    checkpoint: Checkpoint, tables: Collection[str], dtype: str | None, progress: Progress
) -> RestRecord | None:
    """Choose the tensors to store in a narrower dtype; None where none is asked for.

    Args:
        checkpoint: the source.
        tables: names of the compressed tables.
        dtype: "float16" or "bfloat16", or None.
        progress: receives a stage with the bytes that are checked.
    """
    if dtype is None:
        return None
    others = [entry for name, entry in checkpoint.entries.items() if name not in tables]
    target = FLOATS[dtype]
    wide = [entry for entry in others if entry.dtype.is_floating_point and entry.dtype.itemsize > target.itemsize]
    progress.start(f"rounding other tensors to {dtype}", sum(entry.nbytes for entry in wide), "bytes")
    narrowed: dict[str, list[str]] = {}
    kept = {}
    for entry in wide:
        reason = _NEED_PRECISION.get(entry.name.rsplit(".", 1)[-1]) or _reason_to_keep(entry, target, progress)
        if reason:
            kept[entry.name] = reason
        else:
            narrowed.setdefault(str(entry.dtype).removeprefix("torch."), []).append(entry.name)
    chosen = {name for names in narrowed.values() for name in names}
    return RestRecord(
        dtype=dtype,
        narrowed={source: tuple(names) for source, names in narrowed.items()},
        kept=kept,
        bytes_before=sum(entry.nbytes for entry in others),
        bytes_after=sum(
            entry.nbytes // entry.dtype.itemsize * (target if entry.name in chosen else entry.dtype).itemsize
            for entry in others
        ),
    )


def _reason_to_keep(entry: TensorEntry, dtype: torch.dtype, progress: Progress) -> str | None:
    """Return why a tensor cannot be rounded to a dtype, or None."""
    lost = energy = scale = 0.0  # sums of squares of values divided by the largest: squares of tiny ones are zero
    for _, block in read_blocks(entry, BLOCK_BYTES):
        rounded = block.to(dtype)
        if bool((rounded.isinf() & ~block.isinf()).any()):
            return f"values outside the range of {str(dtype).removeprefix('torch.')}"
        finite = block.isfinite()
        block, rounded = block[finite].double(), rounded[finite].double()
        largest = max(scale, float(block.abs().max()) if block.numel() else 0.0)
        if largest:
            lost = lost * (scale / largest) ** 2 + float(((rounded - block) / largest).square().sum())
            energy = energy * (scale / largest) ** 2 + float((block / largest).square().sum())
        scale = largest
        progress.advance(block.numel() * entry.dtype.itemsize)
    return "values that it would round to zero" if lost > _LARGEST_LOSS * energy else None
