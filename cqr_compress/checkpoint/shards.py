"""A safetensors output of one file or several shards, renamed into place when complete."""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry, read_blocks
from cqr_compress.checkpoint.formats.safetensors_files import open_safetensors
from cqr_compress.checkpoint.streaming_writer import SafetensorsWriter, atomic_file, lay_out
from cqr_compress.errors import VerificationError
from cqr_compress.table.blocks import BLOCK_BYTES
from cqr_compress.table.spec import TensorShape

PathShapes = dict[Path, dict[str, TensorShape]]


def shard_paths(output: Path, shapes: Mapping[str, TensorShape], shard_bytes: int | None) -> PathShapes:
    """Distribute tensors to files of at most `shard_bytes`, in order; a larger tensor has its own file.

    Returns:
        The tensors of each file, which is `output` itself if one file suffices.
    """
    groups: list[dict[str, TensorShape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if groups[-1] and shard_bytes is not None and size + shape.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += shape.nbytes
    if len(groups) == 1:
        return {output: groups[0]}
    stem = output.name.removesuffix(".safetensors")
    return {
        output.with_name(f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"): group
        for i, group in enumerate(groups, start=1)
    }


class Output:
    """Writer of all files of an output; a context manager, which removes files that were not committed.

    Args:
        output: output path of the user.
        shapes: shapes of all tensors.
        paths: files from `shard_paths`.
        metadata: metadata of the first file with `format`, not shorter than that passed to `finish`.
    """

    def __init__(
        self, output: Path, shapes: Mapping[str, TensorShape], paths: PathShapes, metadata: Mapping[str, str]
    ) -> None:
        self.shapes = shapes
        self.paths = list(paths)
        self._writers: list[SafetensorsWriter] = []
        self._writer_of: dict[str, SafetensorsWriter] = {}
        for path, group in paths.items():
            layout = lay_out(group, metadata if not self._writers else _of_other_shards(metadata))
            writer = SafetensorsWriter(path, layout)
            self._writers.append(writer)
            self._writer_of.update(dict.fromkeys(group, writer))
        self._index = None
        self.final_path = output
        if len(self._writers) > 1:
            self.final_path = output.with_name(
                f"{output.name.removesuffix('.safetensors')}.safetensors.index.json"
            )
            weight_map = {name: writer.path.name for name, writer in self._writer_of.items()}
            total = {"total_size": sum(shape.nbytes for shape in shapes.values())}
            self._index = (json.dumps({"metadata": total, "weight_map": weight_map}, indent=2) + "\n").encode()
        self._stack = contextlib.ExitStack()

    @property
    def file_bytes(self) -> int:
        """Total size of all files, known before anything is written."""
        return sum(writer.layout.file_bytes for writer in self._writers) + len(self._index or b"")

    def __enter__(self) -> Output:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.enter_context(writer)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def write(self, name: str, values: Tensor) -> None:
        """Append values to a tensor; see `SafetensorsWriter.write`."""
        self._writer_of[name].write(name, values)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Complete all temporary files."""
        for writer in self._writers:
            writer.finish(metadata if writer is self._writers[0] else _of_other_shards(metadata))

    def reopen(self) -> Checkpoint:
        """Open the temporary files that `finish` completed."""
        parts = [open_safetensors(writer.partial_path) for writer in self._writers]

        def close() -> None:
            for part in parts:
                part.close_files()

        entries = {name: entry for part in parts for name, entry in part.entries.items()}
        files = tuple(writer.partial_path for writer in self._writers)
        return replace(parts[0], entries=entries, files=files, close_files=close)

    def verify(self, opened: Checkpoint, step: Callable[[int], None]) -> None:
        """Read back every tensor, and compare its CRC-32 with that of the written bytes.

        Args:
            opened: checkpoint from `reopen`.
            step: called with the number of bytes of each block.

        Raises:
            VerificationError: a tensor differs.
        """
        for name in self.shapes:
            written = self._writer_of[name].checksums.get(name, 0)
            if _checksum_of(opened.entries[name], step) != written:
                raise VerificationError(f"tensor {name!r} of {str(self.final_path)!r} differs when read back")

    def commit(self) -> None:
        """Rename the files into place, the index last."""
        for writer in self._writers:
            writer.commit()
        if self._index is not None:
            with atomic_file(self.final_path) as file:
                file.write(self._index)


def _of_other_shards(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of the shards after the first: its format."""
    return {"format": metadata["format"]}


def _checksum_of(entry: TensorEntry, step: Callable[[int], None]) -> int:
    """Compute the CRC-32 of a tensor's bytes, read in blocks."""
    checksum = 0
    for _, block in read_blocks(entry, BLOCK_BYTES):
        checksum = zlib.crc32(block.contiguous().reshape(-1).view(torch.uint8).numpy().data, checksum)
        step(block.nbytes)
    return checksum
