"""Compress the embedding tables of a checkpoint, from file to file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.compressed_file import is_compressed
from cqr_compress.checkpoint.compressed_writer import Destination
from cqr_compress.checkpoint.formats.open import open_checkpoint
from cqr_compress.checkpoint.formats.word_vectors import VOCABULARY
from cqr_compress.checkpoint.output_files import check_outputs
from cqr_compress.checkpoint.shards import index_path
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.conversion import Conversion, check_names
from cqr_compress.errors import CheckpointError, OutputError, SpecError, TableNotFoundError
from cqr_compress.finetuning.sensitivity import Sensitivity, measure_sensitivity
from cqr_compress.finetuning.task import Task
from cqr_compress.option_fields import merged
from cqr_compress.planning.fields import Offsets, with_fields
from cqr_compress.planning.find import Candidate, find_tables, refuse_foreign, with_table_names
from cqr_compress.planning.frequencies import Frequencies, read_frequencies
from cqr_compress.planning.plan_file import read_plan, write_plan
from cqr_compress.planning.rate_distortion import rate_distortion
from cqr_compress.planning.rules import Rules, read_rules
from cqr_compress.planning.size_budget import Curves
from cqr_compress.planning.token_frequencies import token_frequencies
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import ConvertOptions

_SUFFIXES = (
    ".index.json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".txt", ".vec", ".kv", ".npy", ".npz",
)  # fmt: skip


def default_output(source: Path) -> Path:
    """Return the default output of `convert`: `ckpt.cqr.safetensors` in the same folder for `ckpt.pt`."""
    if source.is_dir():
        return source / "model.cqr.safetensors"
    name = source.name
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return source.with_name(f"{name}.cqr.safetensors")


def convert(
    source: str | Path,
    output: str | Path | None = None,
    options: ConvertOptions | None = None,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Rules = (),
    offsets: Offsets = (),
    frequencies: Frequencies = (),
    task: Task | Sensitivity | str | Path | None = None,
    device: torch.device | str | None = None,
    plan: str | Path | None = None,
    untie: bool = False,
    shard_bytes: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    measured: Curves | None = None,
    **option_fields: Any,
) -> SizeReport:
    """Compress a checkpoint's embedding tables into a safetensors file, with a JSON report next to it.

        cqr.convert("ckpt.pt", "small.safetensors", ratio=16)

    The output is written to a temporary file, read back and compared, and only then renamed into place.

    Args:
        source: anything `open_checkpoint` opens.
        output: the file to write; `default_output` if None.
        options: method and budget.
        tables: globs or "re:" patterns of tables to compress instead of the found ones.
        exclude: the same, of tables to leave dense.
        rules: options of single tables, see `read_rules`, such as `{"emb_l.0.*": "int8", "re:user": "keep"}`.
        offsets: first rows of the fields of fused tables, see `with_fields`; those that buffers of the checkpoint
            have are found. Fields get rows of their own sizes, and small ones are exact.
        frequencies: counts of the ids, by table or in files, see `read_frequencies`: the rows' squared errors are
            weighted by them.
        task: a task of the model, a task file, or a sensitivity that was measured: the sensitivity of the loss
            weighs the rows' squared errors, and compares tables that share a budget; see `measure_sensitivity`.
        device: device to run the task on; if None, CUDA if available.
        plan: a JSON file with the layouts of all tables. If it exists, they are taken from it, and nothing is
            tried; else it is written, also if `dry_run`.
        untie: store a dense copy under the other names of a tied table.
        shard_bytes: split the output into files of about this size.
        force: replace existing output.
        dry_run: plan and predict sizes; nothing is written.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.
        measured: a dict that several conversions of one checkpoint, with options that differ in the budget only,
            share: errors at several sizes of tables that share a budget are measured by the first one only.
        **option_fields: fields of `ConvertOptions`, such as `ratio=16`; they override those of `options`.

    Returns:
        The size report, with predicted sizes if `dry_run`.

    Raises:
        CqrCompressError: see the subclasses in `errors`; nothing is left at `output`.
    """
    source, options = Path(source), merged(ConvertOptions, options, option_fields)
    output = default_output(source) if output is None else Path(output)
    with shown(progress) as progress, open_checkpoint(source) as opened:
        destination = Destination(path=output, shard_bytes=shard_bytes, force=force, reading=opened.files)
        if not dry_run:
            destination.check()
        if plan is not None:
            _check_plan(Path(plan), output, opened.files)
        if is_compressed(opened):
            raise CheckpointError(
                f"{str(source)!r} is already compressed. Convert the checkpoint that it was made of."
            )
        refuse_foreign(opened)
        checkpoint = with_table_names(opened)
        candidates = find_tables(checkpoint, tables, exclude, read_rules(rules))
        plan_path = None if plan is None else Path(plan)
        earlier = None
        if plan_path is not None and plan_path.exists():
            if tables or exclude or rules:
                raise SpecError(
                    f"{str(plan)!r} says which tables are compressed: give no tables, exclude or rules"
                )
            earlier = read_plan(plan_path)
            options, candidates = earlier.options(options), earlier.select(checkpoint, candidates)
        candidates = with_fields(checkpoint, candidates, offsets)
        selected = [candidate for candidate in candidates if candidate.selected]
        if not selected:
            raise TableNotFoundError(_nothing_found(checkpoint, candidates))
        if untie:
            checkpoint = _untied(checkpoint, selected)
        num_rows = {candidate.name: candidate.shape[0] for candidate in selected}
        counts = read_frequencies(frequencies, num_rows)
        sensitivity = Sensitivity()
        if isinstance(task, Sensitivity):
            sensitivity = task
        elif task is not None:
            sensitivity = measure_sensitivity(task, checkpoint, list(num_rows), options.seed, device, progress)
        elif options.weight == "task" and earlier is None:
            raise SpecError("weight is 'task' without a task: give the task whose loss compares tables")
        has_words = VOCABULARY in checkpoint.entries  # of word vectors, to which no tokenizer belongs
        by_tokenizer = options.prior == "tokenizer" and not (frequencies or has_words) and task is None
        has_layers = any(candidate.name not in num_rows for candidate in candidates)
        estimated = token_frequencies(source, num_rows, has_layers) if by_tokenizer else {}
        work = Conversion(
            checkpoint, candidates, options, estimated, destination, progress, sensitivity, earlier, measured
        )
        planned = work.plan(sensitivity.counts | counts | estimated, estimated=dry_run)
        check_names(checkpoint, planned)
        if plan_path is not None and earlier is None:
            write_plan(plan_path, planned, options)
        out = work.output(planned)
        details = rate_distortion(planned)
        if dry_run:
            report = out.predicted({name: table.plan.error for name, table in planned.tables.items()})
            return replace(report, rate_distortion=details)
        complete = lambda header: replace(header, tables=work.records(planned))  # noqa: E731
        return out.write(progress, complete, details)


def _check_plan(plan: Path, output: Path, sources: Sequence[Path]) -> None:
    """Check that a plan exists or can be written, and that it is no file of the output."""
    if plan.resolve() in {path.resolve() for path in (output, index_path(output), report_path(output))}:
        raise OutputError(f"{str(plan)!r} is the plan and a part of the output: give another plan")
    if not plan.exists():
        check_outputs([plan], force=False, sources=sources)


def _nothing_found(checkpoint: Checkpoint, candidates: list[Candidate]) -> str:
    if not candidates:
        return f"{str(checkpoint.path)!r} has no embedding table: none of its tensors is 2-D floating point"
    likely = sorted(candidates, key=lambda c: (-c.confidence, -c.nbytes))[:5]
    listed = "; ".join(f"{c.name} {c.shape[0]} x {c.shape[1]} ({c.reason})" for c in likely)
    return (
        f"found no embedding table in {str(checkpoint.path)!r}. Select tables with --tables. Most likely: {listed}"
    )


def _untied(checkpoint: Checkpoint, selected: list[Candidate]) -> Checkpoint:
    """Replace the aliases of the selected tables by separate entries."""
    names = {candidate.name for candidate in selected}
    loose = {alias: to for alias, to in checkpoint.aliases.items() if to in names}
    entries = dict(checkpoint.entries)
    for alias, to in loose.items():
        entries[alias] = TensorEntry(alias, entries[to].stored)
    aliases = {alias: to for alias, to in checkpoint.aliases.items() if alias not in loose}
    return replace(checkpoint, entries=entries, aliases=aliases)
