"""Describe a dense checkpoint: its tables, the reasons for their selection, and estimated compression errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import TensorEntry, UnbuiltObject
from cqr_compress.checkpoint.compressed_file import CompressedFile, is_compressed
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.size_report import SizeReport, report_of, report_path
from cqr_compress.errors import BudgetError, CheckpointError, NonFiniteError, TableRefusedError
from cqr_compress.planning.choose import fit_briefly
from cqr_compress.planning.find import Candidate, find_tables, refuse_foreign, with_table_names
from cqr_compress.planning.scan import ScannedTable, scan_table
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.blocks import row_blocks
from cqr_compress.table.defaults import CPU_FLOAT

SCHEMA_VERSION = 2
ESTIMATED_RATIOS = (8, 16, 32)
_SAMPLE_ROWS = 8192
_MAX_RANK = 2048


@dataclass(frozen=True, kw_only=True)
class DenseTable:
    """An embedding table of a dense checkpoint.

    Attributes:
        name: name of the tensor.
        shape: (N, D).
        dtype: dtype of the tensor.
        nbytes: bytes of the tensor.
        share: share of the file's bytes, 0 to 1.
        confidence: confidence that it is a table, 0 to 1.
        reason: explanation of the confidence.
        aliases: other names of the same tensor.
        zero_rows: number of all-zero rows.
        duplicate_rows: number of rows equal to an earlier row.
        nonfinite_rows: number of rows with NaN or infinity.
        effective_rank: exp of the entropy of the normalized singular values (Roy & Vetterli 2007), of a sample.
        relative_mse_at_ratio: quick estimate of product quantization's error at ratios 8, 16 and 32, from trial
            fits on a sample; None if no layout is that small. The default method of `convert` has a lower error.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    nbytes: int
    share: float
    confidence: float
    reason: str
    aliases: tuple[str, ...]
    zero_rows: int | None = None
    duplicate_rows: int | None = None
    nonfinite_rows: int | None = None
    effective_rank: float | None = None
    relative_mse_at_ratio: dict[str, float | None] | None = None


@dataclass(frozen=True, kw_only=True)
class DenseReport:
    """The content of a dense checkpoint.

    Attributes:
        file: path that was opened.
        format: format of the file.
        file_bytes: size of all its files.
        num_tensors: number of tensors, aliases not counted.
        optimizer_bytes: bytes of optimizer state, which a conversion drops.
        unbuilt_objects: objects of the checkpoint that were not instantiated.
        tables: tables that `convert` would compress.
        others: other 2-D tensors, each with name, shape, confidence and reason.
        warnings: problems that would stop a conversion.
    """

    file: str
    format: str
    file_bytes: int
    num_tensors: int
    optimizer_bytes: int
    unbuilt_objects: tuple[UnbuiltObject, ...]
    tables: list[DenseTable]
    others: list[dict[str, Any]]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with the schema's name and version."""
        return {"kind": "checkpoint_report", "schema_version": SCHEMA_VERSION, **asdict(self)}


def inspect(
    path: str | Path,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    quick: bool = False,
    progress: Progress | None = None,
) -> SizeReport | DenseReport:
    """Describe a dense checkpoint, a compressed file, or a saved report.

    Args:
        path: any of the three.
        tables: as for `convert`.
        exclude: as for `convert`.
        quick: use names and shapes only; the tables are not read.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Raises:
        CheckpointError: the file is none of the three.
    """
    path = Path(path)
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        return _saved_report(path)
    with shown(progress) as progress, open_checkpoint(path) as checkpoint:
        if is_compressed(checkpoint):
            return _with_saved(report_of(CompressedFile.from_checkpoint(checkpoint)))
        named = with_table_names(checkpoint, compare=not quick)
        candidates = find_tables(named, tables, exclude)
        warnings = []
        try:
            refuse_foreign(named)
        except TableRefusedError as e:
            warnings.append(str(e))
        found = [c for c in candidates if c.selected]
        return DenseReport(
            file=str(path),
            format=named.format,
            file_bytes=named.file_bytes,
            num_tensors=len(named.entries),
            optimizer_bytes=named.optimizer_bytes,
            unbuilt_objects=named.unbuilt_objects,
            tables=[
                _describe(c, named.entries[c.name], named.file_bytes, quick, warnings, progress) for c in found
            ],
            others=[
                {"name": c.name, "shape": list(c.shape), "confidence": c.confidence, "reason": c.reason}
                for c in candidates
                if not c.selected
            ],
            warnings=warnings,
        )


def _with_saved(report: SizeReport) -> SizeReport:
    """Add what only the report next to the file has, its evaluation and trials, if it is of this file."""
    path = report_path(Path(report.file))
    if not path.is_file():
        return report
    try:
        saved = _saved_report(path)
    except CheckpointError:
        return report
    same = saved.file_bytes_after == report.file_bytes_after and saved.tuning == report.tuning
    if not same:
        return report
    return replace(report, evaluation=saved.evaluation, rate_distortion=saved.rate_distortion)


def _saved_report(path: Path) -> SizeReport:
    return SizeReport.from_json(read_json(path), str(path))


def _describe(
    candidate: Candidate,
    entry: TensorEntry,
    file_bytes: int,
    quick: bool,
    warnings: list[str],
    progress: Progress,
) -> DenseTable:
    share = round(candidate.nbytes / file_bytes, 4)
    known: dict[str, Any] = {
        "name": candidate.name,
        "shape": candidate.shape,
        "dtype": candidate.dtype,
        "nbytes": candidate.nbytes,
        "share": share,
        "confidence": candidate.confidence,
        "reason": candidate.reason,
        "aliases": candidate.aliases,
    }
    if quick:
        return DenseTable(**known)
    progress.start(f"reading {candidate.name}", 2 * candidate.shape[0], "rows")
    try:
        scan = scan_table(entry, max_sample=_SAMPLE_ROWS, step=progress.advance)
    except NonFiniteError as e:
        warnings.append(str(e))
        scan = scan_table(entry, nonfinite="keep", max_sample=_SAMPLE_ROWS, step=progress.advance)
    return DenseTable(
        **known,
        zero_rows=len(scan.zero_ids),
        duplicate_rows=_count_duplicates(entry, progress),
        nonfinite_rows=scan.nonfinite_rows,
        effective_rank=round(effective_rank(scan.sample), 1),
        relative_mse_at_ratio={str(ratio): _estimate(scan, ratio) for ratio in ESTIMATED_RATIOS},
    )


def effective_rank(rows: Tensor) -> float:
    """Compute the exponential of the entropy of the normalized singular values (Roy & Vetterli 2007, EUSIPCO).

    Args:
        rows: (n, D) float32; of more than 2,048 dimensions, 2,048 rows are used.
    """
    if rows.shape[1] > _MAX_RANK and len(rows) > _MAX_RANK:
        rows = rows[torch.linspace(0, len(rows) - 1, _MAX_RANK, **CPU_FLOAT).long()]
    rows = rows / rows.abs().max().clamp_min(1e-38)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows  # the smaller: both have its eigenvalues
    singular = torch.linalg.eigvalsh(gram.double()).clamp_min(0).sqrt()
    shares = singular / singular.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def _count_duplicates(entry: TensorEntry, progress: Progress) -> int:
    """Count rows whose bytes equal those of an earlier row, by a 64-bit hash of each row."""
    N, D = entry.shape
    width = D * entry.dtype.itemsize
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (width,), generator=generator, device="cpu") | 1
    hashes = torch.empty(N, dtype=torch.int64, device="cpu")
    for start, stop in row_blocks(N, 4 * width):
        content = entry.stored.read_rows(start, stop).view(torch.uint8).to(torch.int64)
        hashes[start:stop] = (content * weights).sum(1)
        progress.advance(stop - start)
    return N - len(torch.unique(hashes))


def _estimate(scan: ScannedTable, ratio: int) -> float | None:
    for method in ("trellis", "pq"):  # a trellis has at least two bytes a row
        try:
            error = fit_briefly(scan, ConvertOptions(method=method, ratio=ratio)).error
        except (BudgetError, TableRefusedError):
            continue
        return float(f"{error:.4g}")
    return None
