"""Open a checkpoint of any format, with the first matching format of FORMATS."""

from __future__ import annotations

import json
from pathlib import Path

from cqr_compress.checkpoint.base import Checkpoint, Format, TensorEntry
from cqr_compress.checkpoint.formats.safetensors_files import SAFETENSORS
from cqr_compress.checkpoint.formats.torch_files import BARE_PICKLE, TORCH_LEGACY, TORCH_TAR, TORCH_ZIP
from cqr_compress.errors import CheckpointError

_HEAD_BYTES = 512


def files_of(*paths: Path | None) -> list[Path]:
    """Return all files of checkpoints, which an output must not replace; None is skipped.

    Raises:
        CheckpointError: see `open_checkpoint`.
    """
    files: list[Path] = []
    for path in paths:
        if path is not None:
            with open_checkpoint(path) as checkpoint:
                files += checkpoint.files
    return files


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint; its format is determined by its content, not by its suffix.

    Args:
        path: a torch or safetensors file, an index of shards (`*.safetensors.index.json`,
            `pytorch_model.bin.index.json`), or a folder that contains one of those.

    Raises:
        CheckpointError: no such file, an unknown format, or a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such file or folder: {str(path)!r}")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty")
    for form in FORMATS:
        if form.matches(path, head):
            return form.open(path)
    raise CheckpointError(
        f"{str(path)!r} starts with {head[:8]!r}: not a torch or safetensors checkpoint. "
        f"Known: {_known_suffixes()}, an index of shards, or a folder with one of these."
    )


def _in_folder(folder: Path) -> Path:
    """Choose the checkpoint in a folder: the file of the first format that has any."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    files = [p for p in files if ".cqr" not in p.name] or files  # ignore output of `convert`
    for form in FORMATS:
        choices = [p for suffix in form.suffixes for p in files if p.name.endswith(suffix)]
        if form is INDEX:
            choices = choices[:1]
        if len(choices) == 1:
            return choices[0]
        if choices:
            raise CheckpointError(
                f"folder {str(folder)!r} contains {len(choices)} checkpoints and no index: give one of "
                f"{', '.join(p.name for p in choices[:8])}"
            )
    raise CheckpointError(
        f"folder {str(folder)!r} contains no checkpoint: no index of shards (*.index.json), {_known_suffixes()}"
    )


def _known_suffixes() -> str:
    return " ".join(suffix for form in FORMATS if form is not INDEX for suffix in form.suffixes)


def _open_sharded(index: Path) -> Checkpoint:
    """Open the shards of an index's weight_map as one checkpoint."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = {str(name): str(shard) for name, shard in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{str(index)!r} is not an index of shards: it needs a 'weight_map' object") from e
    shards: dict[str, Checkpoint] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{str(index)!r} lists the shard {shard!r} outside its folder")
            shards[shard] = open_checkpoint(index.parent / shard)
        return _merge(index, weight_map, shards, content.get("metadata"))
    except BaseException:
        for opened in shards.values():
            opened.close_files()
        raise


def _merge(index: Path, weight_map: dict[str, str], shards: dict[str, Checkpoint], metadata: object) -> Checkpoint:
    entries: dict[str, TensorEntry] = {}
    aliases: dict[str, str] = {}
    missing = []
    for name, shard in weight_map.items():
        opened = shards[shard]
        if name in opened.entries:
            entries[name] = opened.entries[name]
        elif name in opened.aliases:
            aliases[name] = opened.aliases[name]
        else:
            missing.append(f"{name!r} in {shard}")
    if missing:
        raise CheckpointError(
            f"{str(index)!r} lists tensors that the shards do not have: {', '.join(missing[:5])}"
        )
    first = next(iter(shards.values()))
    strings = {str(k): v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}

    def close() -> None:
        for opened in shards.values():
            opened.close_files()

    return Checkpoint(
        path=index,
        format=f"sharded {first.format}",
        entries=entries,
        aliases=aliases,
        unbuilt_objects=tuple(met for opened in shards.values() for met in opened.unbuilt_objects),
        optimizer_bytes=sum(opened.optimizer_bytes for opened in shards.values()),
        files=(index, *(file for opened in shards.values() for file in opened.files)),
        metadata={**first.metadata, **strings},
        close_files=close,
    )


INDEX = Format(
    suffixes=(".safetensors.index.json", ".bin.index.json"),
    matches=lambda path, head: path.name.endswith(".index.json"),
    open=_open_sharded,
)
FORMATS = (INDEX, SAFETENSORS, TORCH_ZIP, TORCH_LEGACY, TORCH_TAR, BARE_PICKLE)
"""All formats, in the order in which they are tried, for files and for the files of a folder."""
