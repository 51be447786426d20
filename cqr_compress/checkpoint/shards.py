"""A safetensors output of one file or several shards, which replaces an earlier output when it is complete.

The shards of a write have names of their own, with a digest of their content: an interrupted write leaves the
earlier output as it was, its shards and its index. The index is renamed last; then the shards that it does not
list are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.checkpoint.checksums import (
    CHECKSUMS_KEY,
    WRITE_DIGITS,
    WRITE_KEY,
    checksum_of,
    checksums_to_text,
)
from cqr_compress.checkpoint.formats.safetensors_files import open_safetensors
from cqr_compress.checkpoint.json_file import read_json, require_file
from cqr_compress.checkpoint.output_files import atomic_file, remove_abandoned
from cqr_compress.checkpoint.streaming_writer import SafetensorsWriter, lay_out
from cqr_compress.errors import CheckpointError, VerificationError
from cqr_compress.table.base_spec import TensorShape

_DIGITS_IN_NAMES = 8
_UNKNOWN_WRITE = "0" * WRITE_DIGITS


def index_path(output: Path) -> Path:
    """Return the path of the index of an output, if it has several shards."""
    return output.with_name(f"{output.name.removesuffix('.safetensors')}.safetensors.index.json")


def split_shards(shapes: Mapping[str, TensorShape], shard_bytes: int | None) -> list[dict[str, TensorShape]]:
    """Distribute tensors to shards of at most `shard_bytes`, in order; a larger tensor has its own shard."""
    groups: list[dict[str, TensorShape]] = [{}]
    size = 0
    for name, shape in shapes.items():
        if groups[-1] and shard_bytes is not None and size + shape.nbytes > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = shape
        size += shape.nbytes
    return groups


@dataclass(frozen=True)
class _Names:
    """Names of the files of an output."""

    output: Path
    num_shards: int

    @property
    def stem(self) -> str:
        return self.output.name.removesuffix(".safetensors")

    def shard(self, number: int, write: str) -> Path:
        """Path of a shard of a write; its temporary name has the digits of `_UNKNOWN_WRITE`."""
        if self.num_shards == 1:
            return self.output
        digits = write[:_DIGITS_IN_NAMES]
        count = f"{number + 1:05d}-of-{self.num_shards:05d}"
        return self.output.with_name(f"{self.stem}-{digits}-{count}.safetensors")

    def patterns(self) -> list[str]:
        """Regular expressions of the names of all files, with one group: the digits of the write of a shard."""
        shard = rf"{re.escape(self.stem)}-([0-9a-f]{{{_DIGITS_IN_NAMES}}})-\d+-of-\d+\.safetensors"
        return [shard, re.escape(self.output.name), re.escape(index_path(self.output).name)]


class Output:
    """Writer of all files of an output; a context manager, which removes files that were not committed.

    Args:
        path: output path of the user.
        shards: tensors of each file, from `split_shards`.
        metadata: metadata of the first file with `format`, not shorter than that passed to `finish`.
        with_checksums: whether to store the checksums of the tensors.
        reading: files that are read, which are never removed.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[Mapping[str, TensorShape]],
        metadata: Mapping[str, str],
        with_checksums: bool,
        reading: Sequence[Path] = (),
    ) -> None:
        self.shapes = {name: shape for shard in shards for name, shape in shard.items()}
        self.final_path = path if len(shards) == 1 else index_path(path)
        self._names = _Names(path, len(shards))
        self._with_checksums = with_checksums
        self._reading = reading
        self._writers: list[SafetensorsWriter] = []
        for number, shard in enumerate(shards):
            blank = self._metadata(number, metadata, dict.fromkeys(shard, 0), _UNKNOWN_WRITE)
            writer = SafetensorsWriter(self._names.shard(number, _UNKNOWN_WRITE), lay_out(shard, blank))
            self._writers.append(writer)
        self._writer_of = {
            name: writer for writer, shard in zip(self._writers, shards, strict=True) for name in shard
        }
        self._write_id = _UNKNOWN_WRITE
        self._stack = contextlib.ExitStack()

    @property
    def file_bytes(self) -> int:
        """Total size of all files, known before anything is written."""
        index = 0 if len(self._writers) == 1 else len(self._index())
        return sum(writer.layout.file_bytes for writer in self._writers) + index

    def __enter__(self) -> Output:
        with contextlib.ExitStack() as stack:
            for writer in self._writers:
                stack.enter_context(writer)
            own = [writer.partial_path for writer in self._writers]
            remove_abandoned(self.final_path.parent, self._names.patterns(), own)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def write(self, name: str, values: Tensor) -> None:
        """Append values to a tensor; see `SafetensorsWriter.write`."""
        self._writer_of[name].write(name, values)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Complete all temporary files."""
        unsigned = [
            self._metadata(number, metadata, writer.checksums, _UNKNOWN_WRITE)
            for number, writer in enumerate(self._writers)
        ]
        content = json.dumps([unsigned, {name: str(shape) for name, shape in self.shapes.items()}])
        self._write_id = hashlib.sha256(content.encode()).hexdigest()[:WRITE_DIGITS]
        for number, writer in enumerate(self._writers):
            writer.finish(self._metadata(number, metadata, writer.checksums, self._write_id))

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
            written = self._writer_of[name].checksums[name]
            if checksum_of(opened.entries[name], step) != written:
                raise VerificationError(f"tensor {name!r} of {str(self.final_path)!r} differs when read back")

    def commit(self) -> None:
        """Rename the files into place, the index last, and remove the files of the output that this replaces."""
        if len(self._writers) == 1:
            self._writers[0].commit()
        else:
            self._commit_shards()
        with contextlib.suppress(OSError):  # the output is complete; what cannot be removed stays
            for path in self._replaced():
                path.unlink()

    def _commit_shards(self) -> None:
        renamed: list[Path] = []
        try:
            for number, writer in enumerate(self._writers):
                target = self._names.shard(number, self._write_id)
                existed = target.exists()  # with the same content
                writer.commit(target)
                renamed += [] if existed else [target]
            with atomic_file(self.final_path) as file:
                file.write(self._index())
        except BaseException:
            if _write_in(self.final_path) != self._write_id:  # else the index has been renamed already
                for path in renamed:
                    path.unlink(missing_ok=True)
            raise

    def _replaced(self) -> Iterator[Path]:
        """List the files of earlier outputs at the path: shards of other writes, and the other kind of output.

        A shard is one of ours if its metadata has the write of its name; an index, if it has a write. A shard that
        another index of the folder lists stays, as does what is being read.
        """
        folder, index = self.final_path.parent, index_path(self._names.output)
        if self.final_path == index and self._names.output.is_file():
            yield self._names.output
        if self.final_path != index and _write_in(index):
            yield index
        pattern = re.compile(self._names.patterns()[0])
        current = self._write_id[:_DIGITS_IN_NAMES] if self.final_path == index else ""
        kept = {path.resolve() for path in self._reading}
        for other in folder.glob("*.index.json"):
            kept |= {(folder / name).resolve() for name in _shards_in(other)} if other != index else set()
        for path in sorted(folder.iterdir()):
            found = pattern.fullmatch(path.name)
            wanted = found and found[1] != current and path.resolve() not in kept
            if found and wanted and _write_of(path).startswith(found[1]):
                yield path

    def _index(self) -> bytes:
        numbers = {id(writer): number for number, writer in enumerate(self._writers)}
        weight_map = {
            name: self._names.shard(numbers[id(writer)], self._write_id).name
            for name, writer in self._writer_of.items()
        }
        total = sum(shape.nbytes for shape in self.shapes.values())
        metadata = {"total_size": total, WRITE_KEY: self._write_id}
        return (json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()

    def _metadata(
        self, number: int, metadata: Mapping[str, str], checksums: Mapping[str, int], write: str
    ) -> dict[str, str]:
        """Return the metadata of a file: all of it in the first, the format in the others."""
        chosen = {k: v for k, v in metadata.items() if number == 0 or k == "format"}
        own = {CHECKSUMS_KEY: checksums_to_text(checksums, chosen) if self._with_checksums else None}
        own[WRITE_KEY] = write if self._names.num_shards > 1 else None
        return {k: v for k, v in {**chosen, **own}.items() if v is not None}


def _write_of(shard: Path) -> str:
    """Return the write that a safetensors file belongs to, or an empty text."""
    try:
        require_file(shard)
        with open_safetensors(shard) as opened:
            return opened.metadata.get(WRITE_KEY, "")
    except (CheckpointError, OSError):
        return ""


def _write_in(index: Path) -> str:
    """Return the write that an index belongs to, or an empty text."""
    try:
        content = read_json(index)
    except CheckpointError:
        return ""
    metadata = content.get("metadata") if isinstance(content, dict) else None
    return str(metadata.get(WRITE_KEY, "")) if isinstance(metadata, dict) else ""


def _shards_in(index: Path) -> set[str]:
    """Return the names of the shards that an index lists; empty where it is no index."""
    try:
        content = read_json(index)
    except CheckpointError:
        return set()
    listed = content.get("weight_map") if isinstance(content, dict) else None
    names = listed.values() if isinstance(listed, dict) else ()
    return {name for name in names if isinstance(name, str) and "\0" not in name}
