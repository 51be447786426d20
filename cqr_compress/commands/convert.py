"""Compress the embedding tables of a checkpoint, from file to file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cqr_compress._version import __version__
from cqr_compress.checkpoint.base import DTYPES, Checkpoint, TensorEntry, read_blocks
from cqr_compress.checkpoint.compressed_file import (
    FORMAT_VERSION,
    METADATA_KEY,
    CompressedCheckpoint,
    dump_header,
    is_compressed,
    stored_name,
)
from cqr_compress.checkpoint.formats.nesting import is_text
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.shards import Output, shard_paths
from cqr_compress.checkpoint.size_report import SizeReport, report_path, size_report
from cqr_compress.checkpoint.streaming_writer import atomic_file, check_outputs
from cqr_compress.errors import BudgetError, CheckpointError, ShapeError, TableNotFoundError, VerificationError
from cqr_compress.planning.choose import TablePlan, plan_table
from cqr_compress.planning.encode import encode_table, kept_rows
from cqr_compress.planning.find import Candidate, find_tables, refuse_foreign, with_table_names
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.layouts import budget_bytes
from cqr_compress.planning.scan import ScannedTable, scan_table
from cqr_compress.progress import Progress, Silent
from cqr_compress.quantize.kmeans import row_weights
from cqr_compress.quantize.options import Request
from cqr_compress.table.blocks import BLOCK_BYTES
from cqr_compress.table.quality import Quality, QualityMeter
from cqr_compress.table.spec import AnySpec, TensorShape
from cqr_compress.table.table import CompressedTable

_HELD_SAMPLE_BYTES = 2**30


_WIDEST_FIGURE = -0.000123456
"""Stands in the header for a figure that is measured later; no figure of 6 digits is printed wider."""


@dataclass(frozen=True)
class _Work:
    """A table to compress: its plan and, while memory allows, its scan."""

    plan: TablePlan
    spec: AnySpec
    scan: ScannedTable


def default_output(source: Path) -> Path:
    """Where `convert` writes when no output is named: `ckpt.pt` gives `ckpt.cqr.safetensors` beside it."""
    if source.is_dir():
        return source / "model.cqr.safetensors"
    name = source.name
    for suffix in (".index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        name = name.removesuffix(suffix)
    return source.with_name(f"{name}.cqr.safetensors")


def convert(
    source: str | Path,
    output: str | Path | None = None,
    request: Request | None = None,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    frequencies: Frequencies = (),
    untie: bool = False,
    shard_bytes: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> SizeReport:
    """Compress a checkpoint's embedding tables into a safetensors file and a JSON report beside it.

    The output is written to a temporary file, read back and compared, and only then renamed into place.

    Args:
        source: anything `open_checkpoint` opens.
        output: the file to write; `default_output` if None.
        request: method and budget.
        tables: globs or "re:" patterns of tables to take instead of the found ones.
        exclude: the same, of tables to leave.
        frequencies: how often each id is used, by table or in files, see `read_frequencies`: errors at rows that
            are used often cost more.
        untie: keep a dense copy for the other names of a shared table.
        shard_bytes: split the output into files of about this size.
        force: replace existing output.
        dry_run: plan and predict sizes; nothing is written.
        progress: told of the work.

    Returns:
        The size report; of predicted sizes when `dry_run`.

    Raises:
        CqrCompressError: see the subclasses in `errors`; nothing is left at `output`.
    """
    source, request, progress = Path(source), request or Request(), progress or Silent()
    output = default_output(source) if output is None else Path(output)
    if not dry_run:
        check_outputs([output, report_path(output)], force, [source])
    with open_checkpoint(source) as opened:
        if is_compressed(opened):
            raise CheckpointError(f"{str(source)!r} is already compressed. Convert the checkpoint it was made of.")
        refuse_foreign(opened)
        checkpoint = with_table_names(opened)
        candidates = find_tables(checkpoint, tables, exclude)
        selected = [candidate for candidate in candidates if candidate.selected]
        if not selected:
            raise TableNotFoundError(_nothing_found(checkpoint, candidates))
        if untie:
            checkpoint = _untied(checkpoint, selected)
        counts = read_frequencies(frequencies, {candidate.name: candidate.shape[0] for candidate in selected})
        weights = {name: row_weights(count) for name, count in counts.items()}
        work, left = _plan_all(checkpoint, selected, request, weights, progress)
        left += [_left(c, c.reason) for c in candidates if not c.selected and c.confidence >= 0.3]
        header = _header(checkpoint, work, left, request)
        shapes = _shapes(checkpoint, work)
        paths = shard_paths(output, shapes, shard_bytes)
        metadata = {**checkpoint.metadata, "format": "pt", METADATA_KEY: dump_header(header)}
        out = Output(output, shapes, paths, metadata)
        specs = {name: item.spec for name, item in work.items()}
        if dry_run:
            return size_report(header, specs, str(out.final_path), out.file_bytes, measured=False)
        check_outputs([*paths, out.final_path], force, opened.files)
        with out:
            written = _write(out, checkpoint, work, request, progress)
            for name, (quality, _) in written.items():
                header["tables"][name]["quality"] = quality.to_json()
            out.finish({**metadata, METADATA_KEY: dump_header(header)})
            _verify(out, work, written, progress)
            report = size_report(header, specs, str(out.final_path), out.file_bytes, measured=True)
            out.commit()
    with atomic_file(report_path(output)) as file:
        file.write((json.dumps(report.to_json(), indent=2) + "\n").encode())
    return report


def _nothing_found(checkpoint: Checkpoint, candidates: list[Candidate]) -> str:
    if not candidates:
        return f"{str(checkpoint.path)!r} has no embedding table: none of its tensors is 2-D floating point"
    likely = sorted(candidates, key=lambda c: (-c.confidence, -c.nbytes))[:5]
    listed = "; ".join(f"{c.name} {c.shape[0]} x {c.shape[1]} ({c.reason})" for c in likely)
    return f"found no embedding table in {str(checkpoint.path)!r}. Name it with --tables. The likeliest: {listed}"


def _untied(checkpoint: Checkpoint, selected: list[Candidate]) -> Checkpoint:
    """Give each other name of a selected table an entry of its own."""
    names = {candidate.name for candidate in selected}
    loose = {alias: to for alias, to in checkpoint.aliases.items() if to in names}
    entries = dict(checkpoint.entries)
    for alias, to in loose.items():
        entries[alias] = TensorEntry(alias, entries[to].lazy)
    aliases = {alias: to for alias, to in checkpoint.aliases.items() if alias not in loose}
    return replace(checkpoint, entries=entries, aliases=aliases)


def _plan_all(
    checkpoint: Checkpoint,
    selected: list[Candidate],
    request: Request,
    weights: Mapping[str, Tensor],
    progress: Progress,
) -> tuple[dict[str, _Work], list[dict[str, Any]]]:
    """Scan and plan every table before anything is written; collect what is impossible and report it once."""
    work: dict[str, _Work] = {}
    left: list[dict[str, Any]] = []
    problems: list[str] = []
    held = 0
    for candidate in selected:
        if candidate.shape[0] < request.min_rows:
            plan = TablePlan(candidate.name, None, _few_rows(candidate, request))
            left.append(_left(candidate, plan.reason))
            continue
        scan = _scan(checkpoint.entries[candidate.name], request, progress)
        scan = replace(scan, weights=weights.get(candidate.name))
        progress.start(f"choosing a layout for {candidate.name}", 0, "trials")
        try:
            plan = plan_table(scan, request, progress.advance)
        except BudgetError as e:
            problems.append(str(e))
            continue
        if plan.spec is None:
            left.append(_left(candidate, plan.reason))
            continue
        held += scan.sample.nbytes
        if held > _HELD_SAMPLE_BYTES:
            scan = replace(scan, sample=torch.empty(0))
        work[candidate.name] = _Work(plan, plan.spec, scan)
        for alias in candidate.aliases:
            if alias in checkpoint.aliases:
                progress.warn(
                    f"{alias!r} shares its values with {candidate.name!r}: both will read the compressed table. "
                    "Pass --untie to compress only the latter."
                )
    if problems:
        raise BudgetError("\n".join(problems))
    if not work:
        reasons = "; ".join(f"{item['name']}: {item['reason']}" for item in left)
        raise TableNotFoundError(
            f"no table of {str(checkpoint.path)!r} would gain from compression ({reasons}). "
            "Pass a smaller --min-rows to compress small tables."
        )
    return work, left


def _few_rows(candidate: Candidate, request: Request) -> str:
    return f"{candidate.shape[0]} rows are fewer than min_rows = {request.min_rows}"


def _scan(entry: TensorEntry, request: Request, progress: Progress) -> ScannedTable:
    progress.start(f"reading {entry.name}", entry.shape[0], "rows")
    return scan_table(
        entry, request.keep_rows, request.nonfinite, request.seed, request.max_sample, progress.advance
    )


def _left(candidate: Candidate, reason: str) -> dict[str, Any]:
    return {
        "name": candidate.name,
        "shape": list(candidate.shape),
        "bytes": candidate.nbytes,
        "reason": reason,
    }


def _header(
    checkpoint: Checkpoint, work: Mapping[str, _Work], left: list[dict[str, Any]], request: Request
) -> dict[str, Any]:
    unknown = {
        name: Quality(
            relative_mse=_WIDEST_FIGURE,
            mean_cosine=_WIDEST_FIGURE,
            recall_at_10=_WIDEST_FIGURE,
            weighted_relative_mse=None if item.scan.weights is None else _WIDEST_FIGURE,
        ).to_json()
        for name, item in work.items()
    }
    return {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "seed": request.seed,
        "method": request.method,
        "tables": {
            name: {
                "spec": item.spec.to_json(),
                "quality": unknown[name],
                "reason": item.plan.reason,
                "budget": int(budget_bytes(item.scan, request) or item.spec.nbytes),
            }
            for name, item in work.items()
        },
        "aliases": dict(checkpoint.aliases),
        "extras": sorted(checkpoint.extras),
        "skeleton": checkpoint.skeleton,
        "source": {
            "file": checkpoint.path.name,
            "format": checkpoint.format,
            "bytes": checkpoint.file_bytes,
            "optimizer_bytes": checkpoint.optimizer_bytes,
            "placeholders": [{"path": met.path, "class_name": met.class_name} for met in checkpoint.placeholders],
        },
        "left_dense": left,
    }


def _shapes(checkpoint: Checkpoint, work: Mapping[str, _Work]) -> dict[str, TensorShape]:
    shapes: dict[str, TensorShape] = {}
    for name, entry in checkpoint.entries.items():
        if name == "__metadata__" or not is_text(name):
            raise CheckpointError(f"{str(checkpoint.path)!r} has a tensor {name!r}, which safetensors cannot name")
        if entry.dtype not in DTYPES.values():
            raise CheckpointError(f"tensor {name!r} has dtype {entry.dtype}, which safetensors cannot hold")
        new = {name: TensorShape(entry.shape, entry.dtype)}
        if name in work:
            new = {stored_name(name, short): s for short, s in work[name].spec.tensor_shapes().items()}
        for stored, shape in new.items():
            if stored in shapes or (name in work and stored in checkpoint.entries):
                raise ShapeError(
                    f"{str(checkpoint.path)!r} has a tensor {stored!r}, the name that table {name!r} needs. "
                    f"Pass --exclude {name!r}."
                )
            shapes[stored] = shape
    return shapes


def _write(
    out: Output, checkpoint: Checkpoint, work: Mapping[str, _Work], request: Request, progress: Progress
) -> dict[str, tuple[Quality, QualityMeter]]:
    """Write every tensor; return each table's quality and the decoded sample it was measured on."""
    dense = [entry for name, entry in checkpoint.entries.items() if name not in work]
    progress.start("copying other tensors", sum(entry.nbytes for entry in dense), "bytes")
    for entry in dense:
        for _, block in read_blocks(entry, BLOCK_BYTES):
            out.write(entry.name, block)
            progress.advance(block.nbytes)
    written = {}
    for name, item in work.items():
        scan = item.scan
        if len(scan.sample) == 0:
            scan = replace(_scan(checkpoint.entries[name], request, progress), weights=scan.weights)

        def put(short: str, tensor: Tensor, name: str = name) -> None:
            out.write(stored_name(name, short), tensor)

        meter = encode_table(scan, replace(item.plan, spec=item.spec), request.seed, put, progress)
        written[name] = meter.result(), meter
    return written


def _verify(
    out: Output,
    work: Mapping[str, _Work],
    written: Mapping[str, tuple[Quality, QualityMeter]],
    progress: Progress,
) -> None:
    """Read the finished file back and compare it with what was meant.

    Raises:
        VerificationError: a tensor or a decoded row differs.
    """
    progress.start("verifying", sum(shape.nbytes for shape in out.shapes.values()), "bytes")
    with contextlib.ExitStack() as stack:
        opened = CompressedCheckpoint.of(stack.enter_context(out.reopen()))
        out.verify(opened.checkpoint, progress.advance)
        for name, (_, meter) in written.items():
            table, scan = opened.table(name), work[name].scan
            if not _close(_lookup(table, meter.sample_ids), torch.cat(meter.decoded)):
                raise VerificationError(f"table {name!r} of {str(out.final_path)!r} decodes to other rows")
            kept = _lookup(table, scan.kept_ids)
            if not torch.equal(kept.view(torch.uint8), kept_rows(scan).view(torch.uint8)):
                raise VerificationError(f"table {name!r} of {str(out.final_path)!r} changed its kept rows")


def _lookup(table: CompressedTable, ids: Tensor) -> Tensor:
    """Look rows up a few at a time, so that memory does not grow with their number."""
    return torch.cat([table.lookup(block) for block in torch.split(ids, 1024)])


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of matrix products of another shape."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5, equal_nan=True)
