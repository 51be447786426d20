"""Fit a planned table and encode all its rows, block by block, into a receiver of tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cqr_compress.errors import VerificationError
from cqr_compress.planning.choose import TablePlan
from cqr_compress.planning.scan import ScannedTable
from cqr_compress.progress import Progress
from cqr_compress.quantize.registry import method_of
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.decode import decode, stored_rows
from cqr_compress.table.file_form import to_file
from cqr_compress.table.quality import QualityMeter


def encode_table(
    scan: ScannedTable, plan: TablePlan, seed: int, put: Callable[[str, Tensor], None], progress: Progress
) -> QualityMeter:
    """Fit one table and pass its tensors to `put`.

    Args:
        scan: the table's rows, with their sample.
        plan: a plan with a spec.
        seed: seed of the sample of rows on which recall is measured.
        put: called with a short name (`codes`, `codebooks`, ...) and a tensor as files have it; tensors of PER_ROW
            are passed in blocks of rows, in order.
        progress: receives the progress of the work.

    Returns:
        The meter that compares the decoded rows with the source's.

    Raises:
        VerificationError: a decoded row is not finite.
    """
    spec, name = plan.spec, plan.name
    assert spec is not None, "only a table with a spec is encoded"
    method = method_of(spec.method)
    progress.start(f"fitting {name}", method.num_steps(spec, plan.effort), "steps")
    quantizer = method.fit(scan, spec, plan.effort, progress.advance)
    shared = dict(quantizer.shared_tensors())
    if spec.num_kept_rows + spec.num_zero_rows:
        shared["kept_ids"] = scan.stored_apart_ids.to(spec.tensor_shapes()["kept_ids"].dtype)
        shared["kept_rows"] = exact_rows_of(scan)
    shapes = spec.file_shapes()
    for short, tensor in to_file(spec, shared).items():
        put(short, tensor.to(shapes[short].dtype))
    meter = QualityMeter.for_table(spec.num_embeddings, seed, scan.weights)
    progress.start(f"encoding {name}", spec.num_embeddings, "rows")
    for start, rows in scan.blocks():
        encoded = quantizer.encode(rows, start)
        for short, tensor in stored_rows(spec, encoded).items():
            put(short, tensor)
        ids = torch.arange(start, start + len(rows), device="cpu")
        decoded = torch.cat(
            [
                decode(spec, shared | {short: t[a:b] for short, t in encoded.items()}, ids[a:b])
                for a, b in row_blocks(len(rows), spec.work_width)
            ]
        )
        lost = ids[~decoded.isfinite().all(1)]
        if not torch.isin(lost, scan.exact_ids).all():
            raise VerificationError(
                f"decoded row {int(lost[0])} of {name!r} is outside the range of its dtype. "
                "Pass --codebook-dtype float32."
            )
        meter.add(rows, decoded, start)
        progress.advance(len(rows))
    return meter


def exact_rows_of(scan: ScannedTable) -> Tensor:
    """Read the rows that are stored verbatim."""
    rows = [scan.entry.stored.read_rows(int(i), int(i) + 1) for i in scan.exact_ids]
    return torch.cat([torch.empty(0, scan.shape[1], dtype=scan.entry.dtype, device="cpu"), *rows])
