"""Compress the embedding tables of a model's folder, from folder to folder, for the library that it belongs to.

Folders of transformers, sentence-transformers and model2vec: their weights are `model.safetensors`,
`pytorch_model.bin` or shards with an index, in it and in folders of its modules. All other files are copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.compressed_writer import write_report
from cqr_compress.checkpoint.formats.mapped_storage import lies_in
from cqr_compress.checkpoint.formats.open import files_of, open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY, tables_for_config
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import output_errors
from cqr_compress.checkpoint.size_report import SizeReport, report_path
from cqr_compress.commands.convert import convert
from cqr_compress.commands.sweep_state import STATE_FILE
from cqr_compress.errors import CheckpointError, OutputError, OutputExistsError, SpecError, TableNotFoundError
from cqr_compress.finetuning.task import Task
from cqr_compress.option_fields import merged
from cqr_compress.planning.fields import Offsets
from cqr_compress.planning.frequencies import Frequencies
from cqr_compress.planning.rules import Rules
from cqr_compress.progress import Progress, shown
from cqr_compress.quantize.options import ConvertOptions

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
_SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
_WEIGHTS = tuple(f"{stem}{suffix}" for suffix in _SUFFIXES for stem in _STEMS)
"""Names of a folder's weights, in the order of preference."""
_OTHER_WEIGHTS = (
    ".bin", ".gguf", ".h5", ".index.json", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth",
    ".safetensors", ".tflite",
)  # fmt: skip
"""Suffixes of files of the same weights in other formats, which are not copied."""
_NOT_COPIED = frozenset([".git", ".cache", "__pycache__"])
_CARD = "## Compressed embedding tables"


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
        or not Path(output).name.endswith(_OTHER_WEIGHTS)
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
    _check(source, output, force)
    weights = _find_weights(source)
    if not weights:
        raise CheckpointError(f"folder {str(source)!r} has no {', '.join(_WEIGHTS[:4])} in it or below it")
    if len(weights) > 1 and (options.has_file_budget or plan is not None or task is not None):
        what = "a plan" if plan is not None else "a task" if task is not None else "a size"
        raise SpecError(f"{str(source)!r} has {len(weights)} files of weights, and {what} is of one: leave it out")
    for file in weights:
        try:
            _read_config(file, source)
        except CheckpointError:  # before the work, if there will be any
            with contextlib.suppress(TableNotFoundError):
                convert(
                    file, output, options, tables=tables, exclude=exclude, rules=rules, dry_run=True,
                    progress=progress,
                )  # fmt: skip
                raise
    reports: dict[Path, SizeReport] = {}
    missing: list[TableNotFoundError] = []
    with shown(progress) as progress, _staged(output.resolve(), dry_run) as staging:
        for file in weights:
            written = (staging / file.relative_to(source)).with_name(_output_name(file))
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
    _check(source, output, force)
    weights = _find_weights(source)
    if len(weights) != 1 or weights[0].parent != source:
        raise SpecError(
            f"{str(source)!r} has {len(weights)} files of weights in it and in its folders: sweep the file with "
            "the tables, and convert the folder with the ratio that is found"
        )
    _read_config(weights[0], source)


def write_folder(source: Path, compressed: Path, report: SizeReport, output: Path, force: bool) -> FolderReport:
    """Write a folder with weights that are compressed already, and all other files of the source.

    Args:
        source: a folder that `folder_weights` has checked.
        compressed: the file of its compressed weights.
        report: of that file.
        output: the folder to write.
        force: replace a folder that `convert_folder` wrote.
    """
    _check(source, output, force)
    (weights,) = _find_weights(source)
    with _staged(output.resolve(), dry_run=False) as staging:
        written = staging / _output_name(weights)
        with output_errors(written):
            shutil.copyfile(compressed, written)
        held = replace(report, file=str(output / written.name))
        write_report(report_path(written), held)
        return _complete(source, staging, output, {weights: held}, dry_run=False)


def _complete(
    source: Path, staging: Path, output: Path, reports: Mapping[Path, SizeReport], dry_run: bool
) -> FolderReport:
    """Add all other files of the source to the compressed weights, and rename the folder to its path."""
    copied, left_out = _copy_others(source, staging, list(reports), dry_run)
    if not dry_run:
        for file in reports:
            _describe(file, source, staging)
        _write_card(staging / "README.md", list(reports.values()))
        _commit(staging, output.resolve())
    return FolderReport(
        folder=str(output), source=str(source), measured=not dry_run, reports=tuple(reports.values()),
        copied=tuple(copied), left_out=tuple(left_out),
    )  # fmt: skip


def _check(source: Path, output: Path, force: bool) -> None:
    if not source.is_dir():
        raise CheckpointError(f"{str(source)!r} is no folder")
    here, there = source.resolve(), output.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise OutputError(f"{str(output)!r} is the folder itself, in it, or around it: give another folder")
    if not output.parent.is_dir():
        raise OutputError(f"no such folder: {str(output.parent)!r}, to write {output.name!r} to. Create it first.")
    if output.is_symlink() and not output.exists():
        raise OutputError(f"{str(output)!r} is a link to a folder that does not exist: remove it first")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{str(output)!r} is a file: give a folder")
    if output.is_dir() and any(output.iterdir()):
        if not force:
            raise OutputExistsError(f"{str(output)!r} already exists. Pass --force to replace it.")
        if not _is_ours(output):
            raise OutputError(f"{str(output)!r} is no folder that `convert` wrote: remove it yourself")


def _is_ours(folder: Path) -> bool:
    """Return whether a folder is one that `convert_folder` wrote, and not one around it."""
    card = folder / "README.md"
    return (
        card.is_file()
        and _CARD.encode() in card.read_bytes()
        and any(
            SizeReport.is_one(read_json(path)) for name in _STEMS for path in folder.rglob(f"{name}.report.json")
        )
    )


def _find_weights(source: Path) -> list[Path]:
    """Return the file or index of the weights of each folder."""
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if _is_copied(Path(folder) / name))
        name = next((name for name in _WEIGHTS if name in names), None)
        if name is not None:
            found.append(Path(folder) / name)
    return found


def _output_name(weights: Path) -> str:
    """Return the name of the compressed weights: that of safetensors files, whatever the source has."""
    stem = next(stem for stem in _STEMS if weights.name.startswith(f"{stem}."))
    return "model.safetensors" if stem == "pytorch_model" else f"{stem}.safetensors"


@contextlib.contextmanager
def _staged(output: Path, dry_run: bool) -> Iterator[Path]:
    """Create a folder next to the output, which is removed at the end unless it was renamed."""
    staging = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    if dry_run:
        yield staging
        return
    with output_errors(output):
        staging.mkdir()
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy_others(
    source: Path, staging: Path, converted: Sequence[Path], dry_run: bool
) -> tuple[list[str], list[str]]:
    """Copy all files but weights, where those of the folder are converted or for another runtime.

    Returns:
        Paths in the folder of the files that were copied, and of those that were not, without what was converted.
    """
    copied, left_out = [], []
    read = {file.resolve() for file in files_of(*converted)}
    folders_read = {file.parent for file in converted}
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if _is_copied(Path(folder) / name))
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]  # which os.walk does not enter
        left_out += [str((Path(folder) / name).relative_to(source)) for name in linked]
        has_own = Path(folder) in folders_read or not any(name in _WEIGHTS for name in names)
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(source)
            if not path.is_file():  # a link to nothing or to itself, a pipe
                left_out.append(str(relative))
                continue
            if path.resolve() in read:
                continue
            is_weights = has_own and name.endswith(_OTHER_WEIGHTS) and not name.startswith("training_args")
            if is_weights or not lies_in(path, source):
                left_out.append(str(relative))
                continue
            copied.append(str(relative))
            if not dry_run:
                target = staging / relative
                with output_errors(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
    return copied, left_out


def _is_copied(folder: Path) -> bool:
    """Return whether a folder belongs to the model: no metadata, and no results of a sweep."""
    return folder.name not in _NOT_COPIED and not (folder / STATE_FILE).is_file()


def _read_config(weights: Path, source: Path) -> dict[str, Any] | None:
    """Read the config.json of weights; None if there is none, or a link that is not copied.

    Raises:
        CheckpointError: no JSON object, or one of a model that is quantized already.
    """
    config = weights.with_name("config.json")
    if not config.is_file() or not lies_in(config, source):
        return None
    values = read_json(config)
    if not isinstance(values, dict):
        raise CheckpointError(f"{str(config)!r} is not a JSON object")
    if values.get("quantization_config"):
        raise CheckpointError(
            f"{str(config)!r} has a quantization_config already: convert the model that it was quantized from"
        )
    return values


def _describe(weights: Path, source: Path, staging: Path) -> None:
    """Add `quantization_config` to the config.json of compressed weights."""
    config = staging / weights.parent.relative_to(source) / "config.json"
    values = _read_config(weights, source)
    if values is None:
        return
    written = (staging / weights.relative_to(source)).with_name(_output_name(weights))
    with open_checkpoint(written if written.exists() else written.parent) as checkpoint:
        header = CompressedFile.from_checkpoint(checkpoint).header
    if (
        "dtype" not in values and "torch_dtype" not in values
    ):  # else that of the first tensor, which may be a codebook
        values["torch_dtype"] = next(iter(header.specs.values())).dtype
    values["quantization_config"] = {"quant_method": METADATA_KEY, "tables": tables_for_config(header)}
    _write_text(config, json.dumps(values, indent=2) + "\n")


def _write_card(path: Path, reports: Sequence[SizeReport]) -> None:
    """Append a section with the measured figures to the model card."""
    card = path.read_text(encoding="utf-8", errors="surrogateescape") if path.exists() else ""
    lines = [
        _CARD,
        "",
        "Made by [cqr-compress](https://pypi.org/project/cqr-compress/): `pip install cqr-compress`, and",
        "`import cqr_compress` before `from_pretrained`.",
        "",
        "| table | rows x dimensions | layout | bytes before | after | relative squared error | recall@10 |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        for table in report.tables:
            rows, dim = table.shape
            lines.append(
                f"| {table.name} | {rows:,} x {dim} | {table.method} {table.layout} | {table.bytes_before:,} "
                f"| {table.bytes_after:,} | {_figure(table.relative_mse)} | {_figure(table.recall_at_10)} |"
            )
    before, after = (sum(getattr(r, f"file_bytes_{when}") for r in reports) for when in ("before", "after"))
    lines += ["", f"Files of weights: {before:,} bytes before, {after:,} bytes after.", ""]
    _write_text(path, f"{card.rstrip()}\n\n" * bool(card.strip()) + "\n".join(lines))


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _write_text(path: Path, text: str) -> None:
    with output_errors(path):
        path.write_text(text, encoding="utf-8", errors="surrogateescape")


def _commit(staging: Path, output: Path) -> None:
    """Rename a complete folder to its path."""
    with output_errors(output):
        if output.is_dir() and any(output.iterdir()):
            earlier = staging.with_name(f"{staging.name}-earlier")
            try:
                output.rename(earlier)
                staging.rename(output)
            finally:  # also of KeyboardInterrupt
                if output.exists():
                    shutil.rmtree(earlier, ignore_errors=True)
                else:
                    earlier.rename(output)
        else:
            staging.replace(output)
