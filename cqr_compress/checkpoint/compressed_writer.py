"""Write compressed and dense safetensors files atomically, given the shapes of all tensors in advance.

All commands share the steps: write temporary files, finish, reopen, verify, rename, report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.header import METADATA_KEY, Header
from cqr_compress.checkpoint.output_files import atomic_file, check_outputs, set_aside
from cqr_compress.checkpoint.parts import Part
from cqr_compress.checkpoint.shards import Output, index_path, split_shards
from cqr_compress.checkpoint.size_report import SizeReport, report_path, size_report
from cqr_compress.errors import OutputError
from cqr_compress.progress import Progress
from cqr_compress.table.base_spec import TensorShape


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The destination of an output.

    Attributes:
        path: output path of the user.
        shard_bytes: split it into files of about this size, or None.
        force: whether existing files may be replaced.
        reading: files that are read, which must not be replaced.
    """

    path: Path
    shard_bytes: int | None = None
    force: bool = False
    reading: Sequence[Path] = ()

    def check(self, with_report: bool = True) -> None:
        """Check the paths of the file, its index and its report before any work is done; see `check_outputs`.

        Raises:
            OutputError: also if the path does not end in .safetensors.
        """
        check_outputs([self.path], self.force, self.reading)
        if self.path.suffix != ".safetensors":
            raise OutputError(f"{str(self.path)!r} does not end in .safetensors, the format of the output")
        reports = [report_path(self.path)] if with_report else []
        check_outputs([index_path(self.path), *reports], self.force, self.reading)


@dataclass(frozen=True)
class CompressedOutput:
    """A compressed file to be written.

    Attributes:
        destination: destination of the file.
        header: its header; unknown metrics have the values of `Quality.widest`.
        parts: its tensors.
        metadata: other metadata of the safetensors file.
    """

    destination: Destination
    header: Header
    parts: Sequence[Part]
    metadata: Mapping[str, str]

    @cached_property
    def _output(self) -> Output:
        return _output(self.destination, self.parts, _with_header(self.metadata, self.header), with_checksums=True)

    @property
    def file_bytes(self) -> int:
        """Bytes that the file will have, exactly."""
        return self._output.file_bytes

    def predicted(self, errors: Mapping[str, float | None]) -> SizeReport:
        """Create the report without writing anything; its sizes are exact.

        Args:
            errors: estimated relative squared errors by table, where they are known.
        """
        out = self._output
        report = size_report(self.header, str(out.final_path), out.file_bytes, measured=False)
        return replace(report, tables=[replace(t, relative_mse=errors.get(t.name)) for t in report.tables])

    def write(
        self,
        progress: Progress,
        complete: Callable[[Header], Header] = lambda header: header,
        rate_distortion: dict[str, Any] | None = None,
    ) -> SizeReport:
        """Write the file, with a JSON report next to it.

        Args:
            progress: receives the progress of the work.
            complete: maps the header to the final one, which must not be longer, after all tensors are written.
            rate_distortion: that of the report.

        Returns:
            The size report.

        Raises:
            VerificationError: the file differs when read back; nothing is left at the destination.
            OutputError: the file cannot be written; or it is complete, but its report cannot be written.
        """
        out, held = self._output, self.header

        def metadata() -> dict[str, str]:
            nonlocal held
            held = complete(self.header)
            return _with_header(self.metadata, held)

        def check(opened: Checkpoint) -> None:
            compressed = CompressedFile.from_checkpoint(opened)
            for part in self.parts:
                part.check(compressed)

        path = report_path(self.destination.path)
        self.destination.check()
        _write(out, self.parts, metadata, check, path, progress)
        report = size_report(held, str(out.final_path), out.file_bytes, measured=True)
        report = replace(report, rate_distortion=rate_distortion)
        try:
            write_report(path, report)
        except OutputError as e:
            raise OutputError(f"{str(out.final_path)!r} is written and complete, but not its report: {e}") from e
        return report


def write_dense(
    destination: Destination, parts: Sequence[Part], metadata: Mapping[str, str], progress: Progress
) -> int:
    """Write a dense safetensors file.

    Returns:
        Total bytes of its files.
    """
    metadata = {**metadata, "format": "pt"}
    out = _output(destination, parts, metadata, with_checksums=False)
    destination.check(with_report=False)
    _write(out, parts, lambda: metadata, lambda opened: None, None, progress)
    return out.file_bytes


def write_report(path: Path, report: SizeReport) -> None:
    """Write a report as JSON."""
    with atomic_file(path) as file:
        file.write((json.dumps(report.to_json(), indent=2) + "\n").encode())


def _output(
    destination: Destination, parts: Sequence[Part], metadata: Mapping[str, str], with_checksums: bool
) -> Output:
    shapes: dict[str, TensorShape] = {}
    for part in parts:
        shapes.update(part.shapes)
    shards = split_shards(shapes, destination.shard_bytes)
    return Output(destination.path, shards, metadata, with_checksums, destination.reading)


def _with_header(metadata: Mapping[str, str], header: Header) -> dict[str, str]:
    return {**metadata, "format": "pt", METADATA_KEY: header.dumps()}


def _write(
    out: Output,
    parts: Sequence[Part],
    metadata: Callable[[], Mapping[str, str]],
    check: Callable[[Checkpoint], None],
    earlier_report: Path | None,
    progress: Progress,
) -> None:
    silent = [part for part in parts if not part.shows_progress]

    def put(name: str, values: Tensor) -> None:
        out.write(name, values)
        progress.advance(values.nbytes)

    with out:
        nbytes = sum(shape.nbytes for part in silent for shape in part.shapes.values())
        progress.start("writing tensors", nbytes, "bytes")
        for part in sorted(parts, key=lambda part: part.shows_progress):
            part.write(out.write if part.shows_progress else put)
        out.finish(metadata())
        progress.start("verifying", sum(shape.nbytes for shape in out.shapes.values()), "bytes")
        with out.reopen() as opened:
            out.verify(opened, progress.advance)
            check(opened)
        with nullcontext() if earlier_report is None else set_aside(earlier_report, out.final_path):
            out.commit()
