"""The files of a model's folder: its weights, what is copied beside them, and the folder that is written."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.formats.mapped_storage import lies_in
from cqr_compress.checkpoint.formats.open import files_of, open_checkpoint
from cqr_compress.checkpoint.header import METADATA_KEY, tables_for_config
from cqr_compress.checkpoint.json_file import read_json
from cqr_compress.checkpoint.output_files import output_errors
from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.commands.sweep_state import STATE_FILE
from cqr_compress.errors import CheckpointError, OutputError, OutputExistsError

_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
_SUFFIXES = (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin")
WEIGHT_FILES = tuple(f"{stem}{suffix}" for suffix in _SUFFIXES for stem in _STEMS)
"""Names of a folder's weights, in the order of preference."""
OTHER_WEIGHTS = (
    ".bin", ".gguf", ".h5", ".index.json", ".mlmodel", ".msgpack", ".onnx", ".onnx_data", ".ot", ".pt", ".pth",
    ".safetensors", ".tflite",
)  # fmt: skip
"""Suffixes of files of the same weights in other formats, which are not copied."""
_NOT_COPIED = frozenset([".git", ".cache", "__pycache__"])
_CARD = "## Compressed embedding tables"


def check_folders(source: Path, output: Path, force: bool) -> None:
    """Check that a folder can be written.

    Raises:
        CheckpointError: the source is no folder.
        OutputExistsError: the output has files, and `force` is False.
        OutputError: the output is the source, in it or around it, or no folder that `convert_folder` wrote.
    """
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


def find_weights(source: Path) -> list[Path]:
    """Return the file or index of the weights of each folder."""
    found = []
    for folder, folders, names in os.walk(source):
        folders[:] = sorted(name for name in folders if _is_copied(Path(folder) / name))
        name = next((name for name in WEIGHT_FILES if name in names), None)
        if name is not None:
            found.append(Path(folder) / name)
    return found


def output_name(weights: Path) -> str:
    """Return the name of the compressed weights: that of safetensors files, whatever the source has."""
    stem = next(stem for stem in _STEMS if weights.name.startswith(f"{stem}."))
    return "model.safetensors" if stem == "pytorch_model" else f"{stem}.safetensors"


@contextlib.contextmanager
def staged(output: Path, dry_run: bool) -> Iterator[Path]:
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


def copy_others(
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
        has_own = Path(folder) in folders_read or not any(name in WEIGHT_FILES for name in names)
        for name in sorted(names):
            path = Path(folder) / name
            relative = path.relative_to(source)
            if not path.is_file():  # a link to nothing or to itself, a pipe
                left_out.append(str(relative))
                continue
            if path.resolve() in read:
                continue
            is_weights = has_own and name.endswith(OTHER_WEIGHTS) and not name.startswith("training_args")
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


def read_config(weights: Path, source: Path) -> dict[str, Any] | None:
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


def describe(weights: Path, source: Path, staging: Path) -> None:
    """Add `quantization_config` to the config.json of compressed weights."""
    config = staging / weights.parent.relative_to(source) / "config.json"
    values = read_config(weights, source)
    if values is None:
        return
    written = (staging / weights.relative_to(source)).with_name(output_name(weights))
    with open_checkpoint(written if written.exists() else written.parent) as checkpoint:
        header = CompressedFile.from_checkpoint(checkpoint).header
    if (
        "dtype" not in values and "torch_dtype" not in values
    ):  # else that of the first tensor, which may be a codebook
        values["torch_dtype"] = next(iter(header.specs.values())).dtype
    values["quantization_config"] = {"quant_method": METADATA_KEY, "tables": tables_for_config(header)}
    _write_text(config, json.dumps(values, indent=2) + "\n")


def write_card(path: Path, reports: Sequence[SizeReport]) -> None:
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


def commit(staging: Path, output: Path) -> None:
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
