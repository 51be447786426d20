"""Compress the embedding tables of a model's folder, from folder to folder, for the library that it belongs to.

Folders of transformers, sentence-transformers and model2vec: their weights are `model.safetensors`,
`pytorch_model.bin` or shards with an index, in it and in folders of its modules. All other files are copied.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.compressed_writer import write_report
from cqr_compress.checkpoint.output_files import output_errors
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.convert import convert
from cqr_compress.commands.model_folder import (
    OTHER_WEIGHTS,
    WEIGHT_FILES,
    check_folders,
    commit,
    copy_others,
    describe,
    find_weights,
    output_name,
    read_config,
    staged,
    write_card,
)
from cqr_compress.errors import CheckpointError, SpecError, TableNotFoundError
from cqr_compress.finetuning.task import Task
from cqr_compress.option_fields import merged
from cqr_compress.planning.fields import Offsets
from cqr_compress.planning.frequencies import Frequencies
from cqr_compress.planning.rules import Rules
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import ConvertOptions


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """Report of a converted folder.

    Attributes:
        folder: the output.
        source: the folder that it was made of.
        measured: True if the folder was written, False in a plan.
        reports: a report for each file of weights with tables.
        copied: files that were copied as they are.
        left_out: files of the source that are not in the output: weights in other formats, and links to files
            outside the folder, to other folders or to nothing.
    """

    folder: str
    source: str
    measured: bool
    reports: tuple[SizeReport, ...]
    copied: tuple[str, ...]
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        fields = {k: v for k, v in asdict(self).items() if k != "reports"}
        return {"kind": "folder_report", **fields, "reports": [report.to_json() for report in self.reports]}


def is_folder_conversion(source: str | Path, output: str | Path | None) -> bool:
    """Return whether a conversion goes from folder to folder: the output has no suffix of a file."""
    if output is None or not Path(source).is_dir():
        return False
    return (
        Path(output).is_dir()
        or str(output).endswith(("/", os.sep))
        or not Path(output).name.endswith(OTHER_WEIGHTS)
    )


def convert_folder(
    source: str | Path,
    output: str | Path,
    options: ConvertOptions | None = None,
    *,
    tables: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rules: Rules = (),
    offsets: Offsets = (),
    frequencies: Frequencies = (),
    task: Task | str | Path | None = None,
    device: torch.device | str | None = None,
    plan: str | Path | None = None,
    untie: bool = False,
    shard_bytes: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    **option_fields: Any,
) -> FolderReport:
    """Compress the embedding tables of a model's folder into a folder that the model's library loads.

        cqr.convert_folder("all-MiniLM-L6-v2", "small", ratio=16)
        import cqr_compress
        model = AutoModel.from_pretrained("small")  # or SentenceTransformer("small")

    `config.json` gets a `quantization_config`, by which transformers finds the loader that `import cqr_compress`
    registers; without it, loading fails. The model card gets a section with the measured sizes and errors. The
    folder appears at its path when it is complete.

    Args:
        source: a folder of transformers, sentence-transformers or model2vec.
        output: the folder to write.
        options: method and budget of each table.
        tables: globs or "re:" patterns of tables to compress instead of the found ones.
        exclude: the same, of tables to leave dense.
        rules: options of single tables, see `convert`.
        offsets: first rows of the fields of fused tables, see `convert`.
        frequencies: counts of the ids, see `convert`.
        task: a task whose loss says which errors matter, see `convert`; for a single file of weights.
        device: device to run the task on.
        plan: a JSON file of layouts that is followed or written, see `convert`; for a single file of weights.
        untie: store a dense copy under the other names of a tied table.
        shard_bytes: split the weights into files of about this size.
        force: replace a folder that this function wrote.
        dry_run: plan and predict sizes; nothing is written.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.
        **option_fields: fields of `ConvertOptions`, such as `ratio=16`.

    Raises:
        CqrCompressError: see `convert`; nothing is left at `output`.
    """
    source, output = Path(source), Path(output)
    options = merged(ConvertOptions, options, option_fields)
    check_folders(source, output, force)
    weights = find_weights(source)
    if not weights:
        raise CheckpointError(f"folder {str(source)!r} has no {', '.join(WEIGHT_FILES[:4])} in it or below it")
    if len(weights) > 1 and (options.has_file_budget or plan is not None or task is not None):
        what = "a plan" if plan is not None else "a task" if task is not None else "a size"
        raise SpecError(f"{str(source)!r} has {len(weights)} files of weights, and {what} is of one: leave it out")
    for file in weights:
        try:
            read_config(file, source)
        except CheckpointError:  # before the work, if there will be any
            with contextlib.suppress(TableNotFoundError):
                convert(
                    file, output, options, tables=tables, exclude=exclude, rules=rules, dry_run=True,
                    progress=progress,
                )  # fmt: skip
                raise
    reports: dict[Path, SizeReport] = {}
    missing: list[TableNotFoundError] = []
    with shown(progress) as progress, staged(output.resolve(), dry_run) as staging:
        for file in weights:
            written = (staging / file.relative_to(source)).with_name(output_name(file))
            if not dry_run:
                written.parent.mkdir(parents=True, exist_ok=True)
            try:
                report = convert(
                    file, written, options, tables=tables, exclude=exclude, rules=rules, offsets=offsets,
                    frequencies=frequencies,
                    task=task, device=device, plan=plan, untie=untie, shard_bytes=shard_bytes, dry_run=dry_run,
                    progress=progress,
                )  # fmt: skip
            except TableNotFoundError as e:
                missing.append(e)
                continue
            final = output / Path(report.file).relative_to(staging)
            reports[file] = replace(report, file=str(final))
            if not dry_run:
                write_report(report_path(written), reports[file])
        if not reports:
            raise missing[0]
        return _complete(source, staging, output, reports, dry_run)


def folder_weights(source: Path, output: Path, force: bool) -> None:
    """Check that `write_folder` can write a folder, before the work on its weights.

    Raises:
        SpecError: the folder has several files of weights.
        CqrCompressError: see `convert_folder`.
    """
    check_folders(source, output, force)
    weights = find_weights(source)
    if len(weights) != 1 or weights[0].parent != source:
        raise SpecError(
            f"{str(source)!r} has {len(weights)} files of weights in it and in its folders: sweep the file with "
            "the tables, and convert the folder with the ratio that is found"
        )
    read_config(weights[0], source)


def write_folder(source: Path, compressed: Path, report: SizeReport, output: Path, force: bool) -> FolderReport:
    """Write a folder with weights that are compressed already, and all other files of the source.

    Args:
        source: a folder that `folder_weights` has checked.
        compressed: the file of its compressed weights.
        report: of that file.
        output: the folder to write.
        force: replace a folder that `convert_folder` wrote.
    """
    check_folders(source, output, force)
    (weights,) = find_weights(source)
    with staged(output.resolve(), dry_run=False) as staging:
        written = staging / output_name(weights)
        with output_errors(written):
            shutil.copyfile(compressed, written)
        held = replace(report, file=str(output / written.name))
        write_report(report_path(written), held)
        return _complete(source, staging, output, {weights: held}, dry_run=False)


def _complete(
    source: Path, staging: Path, output: Path, reports: Mapping[Path, SizeReport], dry_run: bool
) -> FolderReport:
    """Add all other files of the source to the compressed weights, and rename the folder to its path."""
    copied, left_out = copy_others(source, staging, list(reports), dry_run)
    if not dry_run:
        for file in reports:
            describe(file, source, staging)
        write_card(staging / "README.md", list(reports.values()))
        commit(staging, output.resolve())
    return FolderReport(
        folder=str(output), source=str(source), measured=not dry_run, reports=tuple(reports.values()),
        copied=tuple(copied), left_out=tuple(left_out),
    )  # fmt: skip
