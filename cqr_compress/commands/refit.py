"""Refit a compressed file to its original on all rows of its tables, without training data."""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from pathlib import Path

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import CompressedOutput, Destination
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.parts import Part, copied_part, table_part
from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.errors import CqrCompressWarning, SpecError
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.scan import ScannedTable, source_rows
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import REFIT_ROUNDS
from cqr_compress.quantize.refine import can_refine, refine
from cqr_compress.quantize.trellis_refit import refine_trellis
from cqr_compress.table.quality import Quality, table_quality
from cqr_compress.table.spec import CodebookSpec, TrellisSpec
from cqr_compress.table.table import CompressedTable

_log = logging.getLogger(__name__)


def refit(
    source: str | Path,
    output: str | Path,
    *,
    original: str | Path,
    refine_rounds: int = REFIT_ROUNDS,
    frequencies: Frequencies = (),
    force: bool = False,
    progress: Progress | None = None,
) -> SizeReport:
    """Re-solve all codebooks by least squares and re-encode all rows, alternately.

    Unlike a conversion, which fits codebooks to a sample, a refit uses all rows in every round; scales and values
    of trellises are solved on the whole sample, and all rows encoded once. A table stays unchanged if its error
    does not decrease, if it is quantized to integers, or if its rotation is not orthogonal, as after a fit by
    `finetune`.

    Args:
        source: a compressed file.
        output: the safetensors file to write, with a report next to it.
        original: the dense checkpoint that was converted.
        refine_rounds: rounds of solving and re-encoding.
        frequencies: counts of the ids, see `read_frequencies`: the rows' squared errors are weighted by them.
        force: replace existing output.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Returns:
        The size report.

    Raises:
        CqrCompressError: see the subclasses in `errors`; nothing is left at `output`.
    """
    source, output, original = Path(source), Path(output), Path(original)
    if refine_rounds < 1:
        raise SpecError(f"refine_rounds is {refine_rounds}: give at least 1")
    with shown(progress) as progress, open_checkpoint(source) as compressed, open_checkpoint(original) as dense:
        destination = Destination(path=output, force=force, reading=[*compressed.files, *dense.files])
        destination.check()
        opened = CompressedFile.from_checkpoint(compressed)
        opened.verify()
        counts = read_frequencies(frequencies, {n: s.num_embeddings for n, s in opened.specs.items()})
        records, parts = dict(opened.header.tables), list[Part]()
        for name, spec in opened.specs.items():
            table = opened.table(name)
            scan = source_rows(dense, name, table, counts.get(name), progress)
            refined, errors = _refined(name, table, scan, refine_rounds, progress)
            if refined is not None:
                quality = table_quality(scan.blocks(), refined.decode, spec.num_embeddings, scan.weights)
                records[name] = replace(records[name], quality=quality)
            parts.append(table_part(name, spec, (refined or table).tensors))
            listed = " -> ".join(f"{error:.4f}" for error in errors)
            result = f"relative squared error {listed}" if errors else "left as it is, nothing to refit"
            _log.info("%s %s %s: %s", name, spec.method, spec.layout, result)
        parts += [copied_part(entry) for entry in opened.dense_entries.values()]
        header = replace(opened.header, tables=records)
        return CompressedOutput(destination, header, parts, compressed.metadata).write(progress)


def _refined(
    name: str, table: CompressedTable, scan: ScannedTable, refine_rounds: int, progress: Progress
) -> tuple[CompressedTable | None, tuple[float, ...]]:
    spec = table.spec
    if not isinstance(spec, CodebookSpec | TrellisSpec):
        return None, ()
    body = {short: table.tensors[short] for short in ("codes", "codebooks", "rotation") if short in table.tensors}
    if not can_refine(spec, body):
        warnings.warn(
            f"{name}: not refitted, because its rotation was fitted to a task and is not orthogonal",
            CqrCompressWarning,
            stacklevel=3,
        )
        return None, ()
    progress.start(f"refitting {name}", refine_rounds, "rounds")
    if isinstance(spec, TrellisSpec):
        made = refine_trellis(scan, table, refine_rounds, progress.advance)
        errors = tuple(
            _error(table_quality(scan.blocks(), each.decode, spec.num_embeddings, scan.weights))
            for each in (table, made)
        )
        return made if errors[1] < errors[0] else None, errors
    found = refine(scan, spec, body, refine_rounds, progress.advance)
    if not found.errors[-1] < found.errors[0]:
        return None, found.errors
    return CompressedTable(spec, {**table.tensors, **found.tensors}), found.errors


def _error(quality: Quality) -> float:
    """Return the relative squared error, weighted where rows have weights."""
    weighted = quality.weighted_relative_mse
    return quality.relative_mse if weighted is None else weighted
