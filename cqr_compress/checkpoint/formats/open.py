"""Open a checkpoint of any format, with the first matching format of FORMATS."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from cqr_compress.checkpoint.base import Checkpoint, Format, TensorEntry
from cqr_compress.checkpoint.checksums import WRITE_KEY
from cqr_compress.checkpoint.formats.foreign import explain
from cqr_compress.checkpoint.formats.mapped_storage import changed_error, lies_in
from cqr_compress.checkpoint.formats.numpy_archive import NUMPY_ARCHIVE
from cqr_compress.checkpoint.formats.safetensors_files import SAFETENSORS
from cqr_compress.checkpoint.formats.torch_files import BARE_PICKLE, TORCH_LEGACY, TORCH_TAR, TORCH_ZIP
from cqr_compress.checkpoint.formats.word_vectors import GENSIM, WORD_VECTOR_FORMATS
from cqr_compress.checkpoint.json_file import read_json, require_file
from cqr_compress.errors import CheckpointError, brief

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
    try:
        if path.is_dir():
            path = _in_folder(path)
    except OSError as e:
        raise CheckpointError(f"{brief(str(path))} cannot be read: {e.strerror}") from e
    return _open_file(path, FORMATS)


def _open_file(path: Path, formats: tuple[Format, ...]) -> Checkpoint:
    """Open a file; the formats and their libraries open it several times, and each must find the same file."""
    before = require_file(path)
    try:
        opened = _open_as(path, formats)
    except Exception as e:
        if error := _change_since(before, path):
            raise error from e
        raise
    if error := _change_since(before, path):
        opened.close_files()
        raise error
    return opened


def _change_since(before: os.stat_result, path: Path) -> CheckpointError | None:
    try:
        now = path.stat()
    except FileNotFoundError:
        return CheckpointError(f"{str(path)!r} was removed while it was read")
    if all(getattr(before, name) == getattr(now, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")):
        return None
    return changed_error(path, before.st_size, now.st_size)


def _open_as(path: Path, formats: tuple[Format, ...]) -> Checkpoint:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty")
    for form in formats:
        if form.matches(path, head):
            try:
                return form.open(path)
            except CheckpointError as e:
                if known := explain(path, head):
                    raise CheckpointError(f"{e} {known[:1].upper()}{known[1:]}") from e
                raise
    known = explain(path, head) or (
        f"known are {_known_suffixes()}, an index of shards, or a folder with one of these."
    )
    raise CheckpointError(
        f"{str(path)!r} starts with {head[:8]!r}: not a torch or safetensors checkpoint; {known}"
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
    known = explain(folder, b"") or f"no index of shards (*.index.json), {_known_suffixes()}"
    raise CheckpointError(f"folder {str(folder)!r} contains no checkpoint: {known}")


def _known_suffixes() -> str:
    return " ".join(suffix for form in FORMATS if form is not INDEX for suffix in form.suffixes)


def _open_sharded(index: Path) -> Checkpoint:
    """Open the shards of an index's weight_map as one checkpoint."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{str(index)!r} is not an index of shards: it needs a 'weight_map' object")
    for shard in weight_map.values():
        if not isinstance(shard, str):
            raise CheckpointError(f"{str(index)!r} lists {brief(shard)} in place of the name of a shard")
    shards: dict[str, Checkpoint] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            shards[shard] = _open_file(_shard_path(index, shard), FORMATS_OF_FILES)
        return _merge(index, weight_map, shards, content.get("metadata"))
    except BaseException:
        for opened in shards.values():
            opened.close_files()
        raise


def _shard_path(index: Path, shard: str) -> Path:
    """Return the path of a shard: a file in the folder of the index.

    An index of a stranger can name any path, and an unpacked archive can contain links. Links that leave the
    folder are followed into the store of a Hugging Face cache only, where `snapshots/REVISION/NAME` is a link to
    `blobs/DIGEST`.

    Raises:
        CheckpointError: a name with a folder, or a link that leaves the folder.
    """
    if shard in ("", ".", "..") or any(letter in shard for letter in "/\\\0"):
        raise CheckpointError(f"{str(index)!r} lists the shard {brief(shard)}, which is no plain file name")
    path = index.parent / shard
    try:
        is_inside = lies_in(path, index.parent)
    except (OSError, RuntimeError, ValueError) as e:
        raise CheckpointError(f"{str(index)!r} lists the shard {brief(shard)}, which cannot be read: {e}") from e
    if not is_inside:
        raise CheckpointError(
            f"{str(index)!r} lists the shard {brief(shard)}, a link to {str(path.resolve())!r} outside its "
            "folder: copy the file into the folder if you trust it"
        )
    return path


def _merge(index: Path, weight_map: dict[str, str], shards: dict[str, Checkpoint], metadata: object) -> Checkpoint:
    strings = {str(k): v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    _check_writes(index, strings, shards)
    entries, aliases = _listed(index, weight_map, shards)
    first = next(iter(shards.values()))

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
        checksums={
            name: shards[weight_map[name]].checksums[name]
            for name in entries
            if name in shards[weight_map[name]].checksums
        },
        close_files=close,
    )


def _check_writes(index: Path, metadata: dict[str, str], shards: dict[str, Checkpoint]) -> None:
    """Refuse shards of different writes: their tensors do not belong together."""
    writes = {name: opened.metadata.get(WRITE_KEY) for name, opened in shards.items()}
    if WRITE_KEY in metadata:
        writes[index.name] = metadata[WRITE_KEY]
    if len(set(writes.values())) > 1:
        listed = ", ".join(f"{name} of {brief(write)}" for name, write in list(writes.items())[:5])
        raise CheckpointError(
            f"{str(index)!r} has shards of different writes, which do not belong together: {listed}. Copy all "
            "files of one write again."
        )


def _listed(
    index: Path, weight_map: dict[str, str], shards: dict[str, Checkpoint]
) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Look up the tensors of an index and their aliases; an alias is one of a tensor in its own shard.

    Where the index lists aliases of a tensor but not the tensor's own name, the first of them takes its place.
    """
    entries: dict[str, TensorEntry] = {}
    names_in_shards: dict[tuple[str, str], str] = {}
    for name, shard in weight_map.items():
        if name in shards[shard].entries:
            entries[name] = shards[shard].entries[name]
            names_in_shards[shard, name] = name
    aliases: dict[str, str] = {}
    missing = []
    for name, shard in weight_map.items():
        if name in entries:
            continue
        target = shards[shard].aliases.get(name)
        if target is None:
            missing.append(f"{brief(name)} in {shard}")
        elif (shard, target) in names_in_shards:
            aliases[name] = names_in_shards[shard, target]
        else:
            entries[name] = replace(shards[shard].entries[target], name=name)
            names_in_shards[shard, target] = name
    if missing:
        raise CheckpointError(
            f"{str(index)!r} lists tensors that the shards do not have: {', '.join(missing[:5])}"
        )
    return entries, aliases


INDEX = Format(
    suffixes=(".safetensors.index.json", ".bin.index.json"),
    matches=lambda path, head: path.name.endswith(".index.json"),
    open=_open_sharded,
)
FORMATS_OF_FILES = (
    SAFETENSORS, NUMPY_ARCHIVE, TORCH_ZIP, GENSIM, TORCH_LEGACY, TORCH_TAR, BARE_PICKLE, *WORD_VECTOR_FORMATS,
)  # fmt: skip
FORMATS = (INDEX, *FORMATS_OF_FILES)
"""All formats, in the order in which they are tried, for files and for the files of a folder."""
