"""Fit the codes and codebooks of a compressed file to its source again, over all of its rows: no data needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cqr_compress.checkpoint.compressed_file import CompressedCheckpoint
from cqr_compress.checkpoint.compressed_writer import rewrite_tables
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.checkpoint.streaming_writer import check_outputs
from cqr_compress.errors import SpecError
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.scan import ScannedTable, source_rows
from cqr_compress.progress import Progress, Silent
from cqr_compress.quantize.refine import can_improve, improve
from cqr_compress.table.quality import Quality, table_quality
from cqr_compress.table.spec import CodebookSpec
from cqr_compress.table.table import CompressedTable


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
