"""Evaluate compressed files: quality of rows compared with the original, and a task's metrics."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import write_report
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import check_outputs
from cqr_compress.checkpoint.size_report import SizeReport, report_of, report_path
from cqr_compress.errors import CheckpointError, CqrCompressWarning, FormatError, OutputError
from cqr_compress.finetuning.task import Task
from cqr_compress.finetuning.task_file import load_task_file
from cqr_compress.finetuning.task_model import evaluate_task, load_model, own_device
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.scan import ScannedTable, source_rows
from cqr_compress.progress import Progress, shown
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.quality import QualityMeter, recall
from cqr_compress.table.table import CompressedTable

_BANDS = (("half of all uses", 0.5), ("the next 40%", 0.9), ("the last 10%", 1.0))


@dataclass(frozen=True)
class Band:
    """Quality of ids of similar frequency.

    Attributes:
        name: share of all uses that the band covers.
        num_ids: number of ids.
        relative_mse: see `quality.Quality`; None if all rows of the band are zero.
        mean_cosine: see `quality.Quality`.
        recall_at_10: see `quality.Quality`; of queries in the band.
    """

    name: str
    num_ids: int
    relative_mse: float | None
    mean_cosine: float | None
    recall_at_10: float | None


@dataclass(frozen=True)
class TableEvaluation:
    """Quality of one table of a compressed file, compared with the original.

    Attributes:
        name: name of the table.
        quality: metrics by name, see `quality.Quality`.
        bands: quality by frequency; empty if frequencies are unknown.
    """

    name: str
    quality: dict[str, float]
    bands: list[Band]


@dataclass(frozen=True)
class FileEvaluation:
    """Evaluation of one compressed file.

    Attributes:
        file: its path.
        file_bytes: its size.
        tables: quality of its tables; empty without an original.
        metrics: metrics of the task, or None without a task.
    """

    file: str
    file_bytes: int
    tables: list[TableEvaluation]
    metrics: dict[str, float] | None


@dataclass(frozen=True)
class EvaluationReport:
    """Result of `evaluate`.

    Attributes:
        original: path of the dense checkpoint, or None.
        dense_bytes: size of the original, or None.
        dense: metrics of the original, or None without a task or an original.
        task: name of the task, or None.
        metric: name of the task's metric, or None.
        files: evaluations of the compressed files.
    """

    original: str | None
    dense_bytes: int | None
    dense: dict[str, float] | None
    task: str | None
    metric: str | None
    files: list[FileEvaluation]

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        return {"kind": "evaluation_report", "schema_version": 2, **asdict(self)}


def evaluate(
    files: Sequence[str | Path],
    *,
    original: str | Path | None = None,
    task: Task | str | Path | None = None,
    frequencies: Frequencies = (),
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Compare compressed files with their original, by the quality of their rows and by a task's metrics.

    The evaluation is added to the report next to each file, which `inspect` shows.

    Args:
        files: compressed files.
        original: the dense checkpoint that the files were made of.
        task: task whose metrics are measured, also of the original; or a task file.
        frequencies: counts of the ids, see `read_frequencies`.
        seed: random seed.
        device: device to run the task on; if None, CUDA if available.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Raises:
        CqrCompressError: see the subclasses in `errors`.
    """
    if isinstance(task, (str, Path)):
        task = load_task_file(task)
    chosen = own_device(device)
    dense, dense_bytes = None, None
    with shown(progress) as progress:
        if original is not None:
            with open_checkpoint(original) as checkpoint:
                dense_bytes = checkpoint.file_bytes
            if task is not None:
                dense = _metrics(task, Path(original), seed, chosen, progress)
        found = [
            _file_evaluation(path, original, task, frequencies, seed, chosen, progress)
            for path in map(Path, files)
        ]
    report = EvaluationReport(
        original=None if original is None else str(original),
        dense_bytes=dense_bytes,
        dense=dense,
        task=None if task is None else task.name,
        metric=None if task is None else task.metric,
        files=found,
    )
    for one in found:
        try:
            _complete(Path(one.file), report, one)
        except (OutputError, CheckpointError) as e:
            message = f"the report next to {one.file!r} was not updated: {e}"
            warnings.warn(message, CqrCompressWarning, stacklevel=2)
    return report


def _file_evaluation(
    path: Path,
    original: str | Path | None,
    task: Task | None,
    frequencies: Frequencies,
    seed: int,
    device: torch.device,
    progress: Progress,
) -> FileEvaluation:
    tables: list[TableEvaluation] = []
    with open_checkpoint(path) as compressed:
        opened = CompressedFile.from_checkpoint(compressed)
        opened.verify()
        file_bytes = compressed.file_bytes
        if original is not None:
            with open_checkpoint(original) as dense:
                tables = _tables(opened, dense, frequencies, seed, progress)
    metrics = None if task is None else _metrics(task, path, seed, device, progress)
    return FileEvaluation(str(path), file_bytes, tables, metrics)


def _metrics(task: Task, path: Path, seed: int, device: torch.device, progress: Progress) -> dict[str, float]:
    progress.start(f"evaluating {path.name}", 0, "runs")
    return evaluate_task(task, load_model(task, path, seed, device), seed)


def _tables(
    opened: CompressedFile, dense: Checkpoint, frequencies: Frequencies, seed: int, progress: Progress
) -> list[TableEvaluation]:
    counts = read_frequencies(frequencies, {n: s.num_embeddings for n, s in opened.specs.items()})
    found = []
    for name in opened.specs:
        table = opened.table(name)
        scan = source_rows(dense, name, table, counts.get(name), progress)
        progress.start(f"comparing {name}", table.spec.num_embeddings, "rows")
        found.append(_table(name, table, scan, counts.get(name), seed, progress))
    return found


def _table(
    name: str, table: CompressedTable, scan: ScannedTable, counts: Tensor | None, seed: int, progress: Progress
) -> TableEvaluation:
    N = table.spec.num_embeddings
    meter = QualityMeter.for_table(N, seed, scan.weights)
    errors, energies, cosines = torch.empty(3, N, **CPU_FLOAT)
    for start, rows in scan.blocks():
        decoded = table.decode(start, start + len(rows))
        meter.add(rows, decoded, start)
        at, y = slice(start, start + len(rows)), decoded.float()
        errors[at] = (rows - y).square().sum(1)
        energies[at] = rows.square().sum(1)
        norms = rows.norm(dim=1) * y.norm(dim=1)
        cosines[at] = torch.where(norms > 0, (rows * y).sum(1) / norms, torch.nan)
        progress.advance(len(rows))
    bands = [] if counts is None else [
        _band(band, chosen, errors, energies, cosines, meter) for band, chosen in _bands(counts)
    ]  # fmt: skip
    return TableEvaluation(name, meter.result().to_json(), bands)


def _bands(counts: Tensor) -> list[tuple[str, Tensor]]:
    """Compute masks (N,) of ids by cumulative share of all uses, most frequent first, and of unused ids."""
    order = counts.argsort(descending=True, stable=True)
    share = counts[order].double().cumsum(0) / counts.double().sum()
    before = share - counts[order].double() / counts.double().sum()
    bands, low = [], 0.0
    for name, high in _BANDS:
        mask = torch.zeros(len(counts), dtype=torch.bool, device="cpu")
        mask[order[(before >= low) & (before < high) & (counts[order] > 0)]] = True
        bands.append((name, mask))
        low = high
    bands.append(("never used", counts == 0))
    return [(name, mask) for name, mask in bands if mask.any()]


def _band(name: str, mask: Tensor, errors: Tensor, energies: Tensor, cosines: Tensor, meter: QualityMeter) -> Band:
    energy = float(energies[mask].nansum())
    known = cosines[mask & cosines.isfinite()]
    queries = mask[meter.sample_ids].nonzero().flatten()
    found = None
    if len(queries):
        source, decoded = torch.cat(meter.source).float(), torch.cat(meter.decoded).float()
        if bool(source.isfinite().all()) and bool(decoded.isfinite().all()):
            found = recall(source, decoded, queries=queries)
    return Band(
        name=name,
        num_ids=int(mask.sum()),
        relative_mse=float(errors[mask].nansum()) / energy if energy else None,
        mean_cosine=float(known.mean()) if len(known) else None,
        recall_at_10=found,
    )


def _complete(path: Path, report: EvaluationReport, mine: FileEvaluation) -> None:
    """Write the evaluation into the report next to the file."""
    with open_checkpoint(path) as compressed:
        size, target = report_of(CompressedFile.from_checkpoint(compressed)), report_path(compressed.path)
    check_outputs([target], force=True)
    trials = _earlier_trials(target, size) if target.exists() else None
    values = {key: value for key, value in report.to_json().items() if key not in ("files", "kind")}
    write_report(target, replace(size, evaluation={**values, **asdict(mine)}, rate_distortion=trials))


def _earlier_trials(target: Path, size: SizeReport) -> dict[str, Any] | None:
    """Return the trials in the report that is replaced, if it is a readable one of this file.

    Raises:
        OutputError: the file is no size report.
    """
    values = read_json(target)
    if not SizeReport.is_one(values):
        raise OutputError(f"{str(target)!r} is no size report: it was not replaced")
    try:
        saved = SizeReport.from_json(values, str(target))
    except FormatError:
        return None
    return saved.rate_distortion if saved.file_bytes_after == size.file_bytes_after else None
