"""Fit the codes and codebooks of a compressed file to its source again, over all of its rows: no data needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cqr_compress.checkpoint import Checkpoint, open_checkpoint
from cqr_compress.checkpoint.compressed import CompressedCheckpoint
from cqr_compress.checkpoint.writer import check_outputs
from cqr_compress.discover import with_table_names
from cqr_compress.errors import ShapeError, SpecError, TableNotFoundError
from cqr_compress.frequencies import Frequencies, read_frequencies
from cqr_compress.progress import Progress, Silent
from cqr_compress.quality import Quality, table_quality
from cqr_compress.quantize import row_weights
from cqr_compress.quantize.refit import can_improve, improve
from cqr_compress.report import SizeReport, report_path
from cqr_compress.rows import ScannedTable, scan_table
from cqr_compress.saving import rewrite_tables
from cqr_compress.spec import CodebookSpec
from cqr_compress.table import CompressedTable


def refit(
    source: str | Path,
    output: str | Path,
    teacher: str | Path,
    *,
    rounds: int = 5,
    frequencies: Frequencies = (),
    force: bool = False,
    progress: Progress | None = None,
) -> SizeReport:
    """Improve a compressed file without data: codebooks by least squares and codes by search, in turns.

    Unlike a conversion, which fits codebooks to a sample, every row takes part in every round. A table whose error
    does not fall stays as it was.

    Args:
        source: a compressed file.
        output: the safetensors file to write, with a report beside it.
        teacher: the dense checkpoint that was converted.
        rounds: of solving and encoding.
        frequencies: how often each id is used, see `read_frequencies`: errors at frequent rows cost more.
        force: replace existing output.
        progress: told of the work.

    Returns:
        The size report; the file's metadata has the errors of all rounds.

    Raises:
        CqrCompressError: see the subclasses in `errors`; nothing is left at `output`.
    """
    source, output, teacher, progress = Path(source), Path(output), Path(teacher), progress or Silent()
    if rounds < 1:
        raise SpecError(f"rounds is {rounds}: it is at least 1")
    check_outputs([output, report_path(output)], force, [source, teacher])
    with open_checkpoint(source) as compressed, open_checkpoint(teacher) as dense:
        opened = CompressedCheckpoint.of(compressed)
        counts = read_frequencies(frequencies, {n: s.num_embeddings for n, s in opened.specs.items()})
        made: dict[str, CompressedTable] = {}
        changes: dict[str, dict[str, Any]] = {}
        for name, spec in opened.specs.items():
            scan = source_rows(dense, name, opened.table(name), counts.get(name), progress)
            table, errors = _improved(name, opened.table(name), scan, rounds, progress)
            if table is not None:
                made[name] = table
                quality = _quality(table, scan)
                changes[name] = {"quality": quality.to_json()}
            shown = " -> ".join(f"{error:.4f}" for error in errors) or "nothing to refit"
            progress.say(f"{name} {spec.method} {spec.layout}: relative squared error {shown}")
        return rewrite_tables(opened, made, changes, output, force, progress)


def _improved(
    name: str, table: CompressedTable, scan: ScannedTable, rounds: int, progress: Progress
) -> tuple[CompressedTable | None, tuple[float, ...]]:
    spec = table.spec
    if not isinstance(spec, CodebookSpec):
        return None, ()
    body = {short: table.tensors[short] for short in ("codes", "codebooks", "rotation") if short in table.tensors}
    if not can_improve(spec, body):
        progress.warn(f"{name}: its rotation was fitted to a task and is not orthogonal, so it stays as it is")
        return None, ()
    progress.start(f"refitting {name}", rounds, "rounds")
    found = improve(scan, spec, body, rounds, progress.advance)
    if not found.errors[-1] < found.errors[0]:
        return None, found.errors
    return CompressedTable(spec, {**table.tensors, **found.tensors}), found.errors


def _quality(table: CompressedTable, scan: ScannedTable) -> Quality:
    return table_quality(scan.blocks(), table.decode, table.spec.num_embeddings, scan.weights)


def source_rows(
    checkpoint: Checkpoint, name: str, table: CompressedTable, counts: Tensor | None, progress: Progress
) -> ScannedTable:
    """Read the dense rows that a table stands for.

    Raises:
        TableNotFoundError: they are not there.
        ShapeError: they have another shape.
    """
    spec, entry = table.spec, with_table_names(checkpoint).entries.get(name)
    if entry is None:
        raise TableNotFoundError(
            f"{str(checkpoint.path)!r} has no {name!r}: give the dense checkpoint that was converted"
        )
    if entry.shape != (spec.num_embeddings, spec.embedding_dim):
        here = spec.num_embeddings, spec.embedding_dim
        raise ShapeError(f"{name!r} is {entry.shape} in {str(checkpoint.path)!r}, and {here} in compressed")
    kept = table.tensors.get("kept_ids")
    keep = [] if kept is None else kept[: spec.num_kept_rows].tolist()
    progress.start(f"reading {name}", spec.num_embeddings, "rows")
    scan = scan_table(entry, keep, "keep", getattr(spec, "seed", 0), step=progress.advance)
    return scan if counts is None else replace(scan, weights=row_weights(counts))
