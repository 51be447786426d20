"""Checkpoints on disk: open any format lazily, write safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.formats.safetensors_files import open_safetensors
from cqr_compress.checkpoint.formats.torch_files import LEGACY_MAGIC, open_torch_legacy, open_torch_zip
from cqr_compress.errors import CheckpointError

_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint by what its bytes are, whatever its suffix says.

    Args:
        path: a torch or safetensors file, an index of shards (`*.safetensors.index.json`,
            `pytorch_model.bin.index.json`), or a folder that holds one of those.

    Raises:
        CheckpointError: nothing there, an unknown format, or a damaged file; the message says which.
    """
    path = Path(path)
    if path.is_dir():
        path = _in_folder(path)
    if not path.exists():
        raise CheckpointError(f"no such file or folder: {str(path)!r}")
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as e:
        raise CheckpointError(f"{str(path)!r} cannot be read: {e.strerror}") from e
    return _opener(path, head)(path)


def _opener(path: Path, head: bytes) -> Callable[[Path], Checkpoint]:
    if not head:
        raise CheckpointError(f"{str(path)!r} is empty")
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return open_torch_zip
    if head.startswith(LEGACY_MAGIC):
        return open_torch_legacy
    if len(head) > 8 and head[8:9] == b"{":
        return open_safetensors
    if path.suffix == ".safetensors":
        return open_safetensors
    if b"ustar" in head or head.startswith(b"storages"):
        raise CheckpointError(
            f"{str(path)!r} is a tar file of torch before 0.1.10. Open it with torch.load of torch 1.x and save "
            "it again with torch.save."
        )
    if head.startswith(b"\x80"):
        raise CheckpointError(
            f"{str(path)!r} is a bare pickle, not a file of torch.save. Open it in an environment you trust and "
            "save its tensors with torch.save or safetensors.torch.save_file."
        )
    raise CheckpointError(
        f"{str(path)!r} starts with {head[:8]!r}: not a torch or safetensors checkpoint. "
        "Known: .pt .pth .ckpt .bin .safetensors, an index of shards, or a folder with one of these."
    )


def _in_folder(folder: Path) -> Path:
    """Choose what a folder's checkpoint is: an index before single files."""
    files = sorted(p for p in folder.iterdir() if p.is_file())
    files = [p for p in files if ".cqr" not in p.name] or files  # not what `convert` itself wrote here
    indices = [p for suffix in _INDEX_SUFFIXES for p in files if p.name.endswith(suffix)]
    singles = [p for p in files if p.suffix == ".safetensors"]
    singles = singles or [p for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    choices = indices[:1] or singles
    if len(choices) == 1:
        return choices[0]
    if choices:
        raise CheckpointError(
            f"folder {str(folder)!r} holds {len(choices)} checkpoints and no index: name one of "
            f"{', '.join(p.name for p in choices[:8])}"
        )
    raise CheckpointError(
        f"folder {str(folder)!r} holds no checkpoint: no *.safetensors.index.json, pytorch_model.bin.index.json, "
        ".safetensors, .bin, .pt, .pth or .ckpt"
    )


def _open_sharded(index: Path) -> Checkpoint:
    """Open the shards that an index's weight_map names as one checkpoint."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        weight_map = {str(name): str(shard) for name, shard in content["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{str(index)!r} is not an index of shards: it needs a 'weight_map' object") from e
    shards: dict[str, Checkpoint] = {}
    try:
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard:
                raise CheckpointError(f"{str(index)!r} names the shard {shard!r} outside its folder")
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
        raise CheckpointError(f"{str(index)!r} lists tensors that are not there: {', '.join(missing[:5])}")
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
