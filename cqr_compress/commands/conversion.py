"""One conversion: the plans of its tables, and the file that they make."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import DTYPES, Checkpoint
from cqr_compress.checkpoint.compressed_file import OPTIONAL_PARTS, CompressedFile, stored_name, stored_shapes
from cqr_compress.checkpoint.compressed_writer import CompressedOutput, Destination
from cqr_compress.checkpoint.formats.nesting import is_text
from cqr_compress.checkpoint.header import Header, SourceRecord, TableRecord
from cqr_compress.checkpoint.parts import Part, Put, copied_part
from cqr_compress.checkpoint.rest_record import RestRecord
from cqr_compress.errors import (
    BudgetError,
    CheckpointError,
    CqrCompressWarning,
    ShapeError,
    TableNotFoundError,
    VerificationError,
)
from cqr_compress.finetuning.sensitivity import Sensitivity
from cqr_compress.planning.encode import exact_rows_of
from cqr_compress.planning.find import Candidate
from cqr_compress.planning.plan_file import PlanFile
from cqr_compress.planning.plan_tables import Planned, PlannedTable, left_dense, plan_tables
from cqr_compress.planning.quality_budget import QualityTarget
from cqr_compress.planning.rest import plan_rest
from cqr_compress.planning.size_budget import Curves, SizePlanner
from cqr_compress.progress import Progress
from cqr_compress.quantize.base import row_weights
from cqr_compress.quantize.options import ConvertOptions
from cqr_compress.table.quality import QualityMeter
from cqr_compress.table.table import CompressedTable

_SIZE_ROUNDS, _RECORD_BYTES = 5, 700
_SIZE_REACHED = 0.995
"""Share of the size of a file that a plan has to use before no better one is searched for."""


@dataclass
class Conversion:
    """One conversion: plans of its tables, and the file that they make.

    Attributes:
        checkpoint: the source.
        candidates: what may be tables, selected or not.
        options: method and budget.
        estimated: frequencies of tokens that are estimated, by table.
        destination: where the file is written.
        progress: receives the progress of the work.
        sensitivity: that of a task's loss to the tables, if there is one.
        earlier: a plan to follow.
        measured: errors at several sizes, by table, that were measured before.
        meters: quality of the tables, known once they are written.
        rests: dtypes of the other tensors, by the names of the compressed tables.
    """

    checkpoint: Checkpoint
    candidates: Sequence[Candidate]
    options: ConvertOptions
    estimated: Mapping[str, Tensor]
    destination: Destination
    progress: Progress
    sensitivity: Sensitivity = field(default_factory=Sensitivity)
    earlier: PlanFile | None = None
    measured: Curves | None = None
    meters: dict[str, QualityMeter] = field(default_factory=dict)
    rests: dict[frozenset[str], RestRecord | None] = field(default_factory=dict)

    def plan(self, counts: Mapping[str, Tensor], estimated: bool) -> Planned:
        """Plan all tables, each within its budget or all within that of the file; see `plan_tables`."""
        selected = [candidate for candidate in self.candidates if candidate.selected]
        weights = {name: row_weights(count) for name, count in counts.items()}
        if self.earlier is not None:
            return self._complete(
                self.earlier.planned(self.checkpoint, selected, self.options, weights, self.progress)
            )
        if not self.options.shares_budget:
            planned = plan_tables(self.checkpoint, selected, self.options, weights, self.progress, estimated)
            return self._complete(planned)
        importance = self.sensitivity.importance if self.options.weight in (None, "task") else {}
        planner = SizePlanner.measure(
            self.checkpoint, selected, self.options, weights, importance, self.progress, self.measured
        )
        if not self.options.has_file_budget:
            assert self.options.ratio is not None
            return self._complete(planner.plan_ratio(self.options.ratio))
        return self._complete(self._plan_size(planner, _file_budget(self.checkpoint, self.options)))

    def output(self, planned: Planned) -> CompressedOutput:
        """Describe the file with these tables; nothing is written yet."""
        compressed = frozenset(planned.tables)
        if compressed not in self.rests:
            self.rests[compressed] = plan_rest(self.checkpoint, compressed, self.options.rest_dtype, self.progress)
        rest = self.rests[compressed]
        header = replace(_header(self.checkpoint, planned, self.options), rest=rest)
        dtypes = {} if rest is None else rest.stored_dtypes()
        parts = [
            _encoded_part(name, planned.tables[name], self.meters, self.progress)
            if name in planned.tables
            else copied_part(entry, dtype=dtypes.get(name))
            for name, entry in self.checkpoint.entries.items()
        ]
        return CompressedOutput(self.destination, header, parts, self.checkpoint.metadata)

    def records(self, planned: Planned) -> dict[str, TableRecord]:
        """Return the tables' entries in the header, with their quality, once they are written."""
        records = {}
        for name, table in planned.tables.items():
            quality = self.meters[name].result()
            records[name] = table.record(quality)
            options = next(c for c in self.candidates if c.name == name).options(self.options)
            if missed := QualityTarget.of(options).missed(quality):
                message = f"{name!r} has {missed}, which the trials did not show: ask for a little more"
                warnings.warn(message, CqrCompressWarning, stacklevel=2)
        return records

    def _complete(self, planned: Planned) -> Planned:
        """Add tables that were not selected, and notes on weights that are estimated."""
        planned = replace(planned, left_dense=[*planned.left_dense, *left_dense(self.candidates)])
        planned = planned.noting(self.sensitivity.counts, "rows weighted by the sensitivity of the task's loss")
        return planned.noting(self.estimated, "rows weighted by the order of the tokenizer's tokens")

    def _plan_size(self, planner: SizePlanner, size: int) -> Planned:
        """Plan tables so that the whole file has at most `size` bytes, and nearly as many.

        Raises:
            BudgetError: the smallest file is larger.
            TableNotFoundError: the file has no more bytes than that with dense tables.
        """
        file_bytes = self.output(self._complete(planner.dense)).file_bytes
        if file_bytes <= size and not planner.dense.tables:
            raise TableNotFoundError(
                f"the file has {file_bytes:,} bytes with dense tables: no need to compress them"
            )
        others = file_bytes - planner.nbytes(planner.dense) + _RECORD_BYTES * len(planner.curves)
        best = None
        for _ in range(_SIZE_ROUNDS):
            try:
                planned = planner.plan(size - others)
            except BudgetError as e:
                if best is not None:
                    break
                raise BudgetError(
                    f"a file of {size:,} bytes has no room for these tables: at their smallest they take "
                    f"{planner.smallest:,} bytes, and all else {others:,}. Pass a larger size or --rest-dtype."
                ) from e
            file_bytes = self.output(self._complete(planned)).file_bytes
            others = file_bytes - planner.nbytes(planned)
            if file_bytes <= size:
                best = planned
                if file_bytes >= _SIZE_REACHED * size:
                    break
        if best is None:
            raise BudgetError(f"no plan of {size:,} bytes was found: pass a size that differs by some bytes")
        return best


def _file_budget(checkpoint: Checkpoint, options: ConvertOptions) -> int:
    """Return the bytes that the file may have."""
    if isinstance(options.size, int):
        return options.size
    assert options.file_ratio is not None
    return int(max(checkpoint.file_bytes - checkpoint.optimizer_bytes, 0) / options.file_ratio)


def _header(checkpoint: Checkpoint, planned: Planned, options: ConvertOptions) -> Header:
    source = SourceRecord(
        file=checkpoint.path.name,
        format=checkpoint.format,
        nbytes=checkpoint.file_bytes,
        optimizer_bytes=checkpoint.optimizer_bytes,
        unbuilt_objects=checkpoint.unbuilt_objects,
    )
    return Header(
        tables={name: table.record() for name, table in planned.tables.items()},
        source=source,
        seed=options.seed,
        method=options.method,
        aliases=dict(checkpoint.aliases),
        outside_model=tuple(checkpoint.outside_model),
        structure=checkpoint.structure,
        left_dense=tuple(planned.left_dense),
    )


def _encoded_part(name: str, table: PlannedTable, meters: dict[str, QualityMeter], progress: Progress) -> Part:
    """Make a part that fits and encodes a table while it is written, and verifies the written rows."""

    def write(put: Put) -> None:
        meters[name] = table.encode(lambda short, tensor: put(stored_name(name, short), tensor), progress)

    def check(opened: CompressedFile) -> None:
        written, meter = opened.table(name), meters[name]
        if not _close(_lookup(written, meter.sample_ids), torch.cat(meter.decoded)):
            raise VerificationError(f"table {name!r} of {opened.name!r} does not decode to the encoded rows")
        exact = _lookup(written, table.scan.exact_ids)
        if not torch.equal(exact.view(torch.uint8), exact_rows_of(table.scan).view(torch.uint8)):
            raise VerificationError(f"the exact rows of table {name!r} of {opened.name!r} differ from the source")

    return Part(stored_shapes(name, table.spec), write, check, shows_progress=True)


def check_names(checkpoint: Checkpoint, planned: Planned) -> None:
    """Refuse names and dtypes that safetensors does not support, and names that collide with a table's tensors."""
    where = str(checkpoint.path)
    for name, entry in checkpoint.entries.items():
        if name == "__metadata__" or not is_text(name):
            raise CheckpointError(f"{where!r} has a tensor {name!r}, a name that safetensors does not support")
        if entry.dtype not in DTYPES.values():
            raise CheckpointError(f"tensor {name!r} has dtype {entry.dtype}, which safetensors does not support")
    taken = {name for name in checkpoint.entries if name not in planned.tables}
    for name, table in planned.tables.items():
        for short in sorted(OPTIONAL_PARTS | table.spec.file_shapes().keys()):
            stored = stored_name(name, short)
            if stored in taken or stored in checkpoint.entries:
                raise ShapeError(
                    f"{where!r} has a tensor {stored!r}, a name that is reserved for a compressed table {name!r}. "
                    f"Pass --exclude {name!r}."
                )
            taken.add(stored)


def _lookup(table: CompressedTable, ids: Tensor) -> Tensor:
    """Look up rows in blocks, which bounds the memory."""
    return torch.cat([table.lookup(block) for block in torch.split(ids, 1024)])


def _close(a: Tensor, b: Tensor) -> bool:
    """Return whether rows are equal up to the rounding of matrix products of different shapes."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-5, equal_nan=True)
