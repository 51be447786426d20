"""The compressed file: a safetensors file with the model's state_dict, in which tables are replaced by codes.

`emb.weight` of the source becomes `emb.codes`, `emb.codebooks` and so on; a bare tensor `embeddings` becomes
`embeddings.codes`. Other tensors keep their names and bits. The metadata contains the header.

Programs that do not know the format must not load such a file as if its tables were only missing, and leave the
model's random rows in place. Therefore an empty tensor has the name of each table, so that `load_state_dict` and
transformers fail with a size mismatch, also where they ignore missing tensors; and the metadata has
`format: "cqr_compress"`, which transformers before version 5 refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.checksums import checksum_of
from cqr_compress.checkpoint.formats.nesting import check_structure
from cqr_compress.checkpoint.header import METADATA_KEY, Header
from cqr_compress.errors import FormatError, ShapeError, brief
from cqr_compress.table.base_spec import TensorShape
from cqr_compress.table.defaults import CPU_FLOAT
from cqr_compress.table.file_form import from_file
from cqr_compress.table.spec import AnySpec, TrellisSpec
from cqr_compress.table.table import CompressedTable
from cqr_compress.table.tiers import check_tiers
from cqr_compress.table.trellis import check_rates

MARKER = TensorShape((0,), torch.uint8)
"""The empty tensor with the name of a table."""
OPTIONAL_PARTS = frozenset(
    {"codes", "rotation", "state_values", "row_gain", "gain_range", "row_tiers", "tier_starts"}
    | {"codebook_scale", "kept_ids", "kept_rows"}
)
"""Short names of tensors that only some layouts read: no other tensor of a file has such a name."""
_FREE_DECODED_BYTES = 2**30
_MAX_EXPANSION = 2**16
"""Decoded bytes per stored byte beyond the first GiB: a table of hashed codes can claim any number of rows."""


def stored_name(table: str, short: str) -> str:
    """Return the name of a table's tensor: `emb.codes` for `emb.weight`, `embeddings.codes` for `embeddings`."""
    if table == "weight":
        return short
    return f"{table.removesuffix('.weight')}.{short}"


def stored_shapes(table: str, spec: AnySpec) -> dict[str, TensorShape]:
    """Return the shapes of all tensors that are stored for a table, by their names in the file."""
    return {table: MARKER, **{stored_name(table, short): shape for short, shape in spec.file_shapes().items()}}


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Return whether the file has the metadata of a compressed file."""
    return METADATA_KEY in checkpoint.metadata


@dataclass(frozen=True)
class CompressedFile:
    """An opened compressed file.

    Attributes:
        checkpoint: the safetensors file or its shards.
        header: the parsed metadata.
    """

    checkpoint: Checkpoint
    header: Header

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> CompressedFile:
        """Parse the metadata, and check the names, shapes and dtypes of the tensors against it.

        Raises:
            FormatError: not a compressed file, a newer format, or tensors that are missing or do not match.
        """
        where = str(checkpoint.path)
        if not is_compressed(checkpoint):
            raise FormatError(f"{where!r} is not a compressed checkpoint: its metadata has no {METADATA_KEY!r}")
        opened = cls(checkpoint, Header.loads(checkpoint.metadata[METADATA_KEY], where))
        for name, spec in opened.specs.items():
            for short, expected in spec.file_shapes().items():
                entry = checkpoint.entries.get(stored_name(name, short))
                found = None if entry is None else (entry.shape, entry.dtype)
                if found != (expected.shape, expected.dtype):
                    raise FormatError(
                        f"table {name!r} of {where!r} requires {stored_name(name, short)!r} of {expected.shape} "
                        f"{expected.dtype}, but the file has {found or 'no such tensor'}"
                    )
            for short in OPTIONAL_PARTS - spec.file_shapes().keys():
                if (unread := stored_name(name, short)) in checkpoint.entries:
                    raise FormatError(
                        f"{where!r} has a tensor {unread!r}, which the layout of table {name!r} does not read: "
                        "the header is damaged"
                    )
            if spec.dense_nbytes > _FREE_DECODED_BYTES + _MAX_EXPANSION * spec.nbytes:
                raise FormatError(
                    f"table {name!r} of {where!r} would have {spec.dense_nbytes} bytes, out of proportion to the "
                    f"{spec.nbytes} that are stored: the file is damaged"
                )
            marker = checkpoint.entries.get(name)  # absent before format version 2
            if marker is not None and (marker.shape, marker.dtype) != (MARKER.shape, MARKER.dtype):
                raise FormatError(
                    f"{where!r} has a dense tensor {name!r} of {marker.shape} {marker.dtype} in addition to the "
                    "compressed table of this name"
                )
        known = {*opened.specs, *opened.dense_entries}
        if lost := sorted(target for target in opened.aliases.values() if target not in known):
            raise FormatError(f"{where!r} has an alias of {brief(lost[0])}, but no such tensor")
        if twice := sorted(known & opened.aliases.keys()):
            raise FormatError(f"{where!r} has both a tensor and an alias named {brief(twice[0])}")
        opened._check_rest()
        if opened.header.structure is not None:
            check_structure(opened.header.structure, known | opened.aliases.keys(), str(checkpoint.path))
        return opened

    def _check_rest(self) -> None:
        """Refuse a record of narrower tensors that the file does not have: they would be restored wrongly."""
        if self.header.rest is None:
            return
        stored_dtypes = self.header.rest.stored_dtypes()
        for name, source in self.header.rest.source_dtypes().items():
            entry, stored = self.dense_entries.get(name), stored_dtypes[name]
            if entry is None or entry.dtype != stored or stored.itemsize >= source.itemsize:
                raise FormatError(
                    f"{self.name!r} has {entry.dtype if entry else 'no tensor'} {brief(name)}, but its header "
                    f"has {stored} in place of {source}: the header is damaged"
                )

    @property
    def name(self) -> str:
        """Path of the file, for messages."""
        return str(self.checkpoint.path)

    @cached_property
    def specs(self) -> Mapping[str, AnySpec]:
        """Spec of each compressed table, by the source tensor's name."""
        return self.header.specs

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share the tensor of another name, with that name."""
        return self.header.aliases

    @cached_property
    def dense_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors that are not part of a table."""
        stored = {each for name, spec in self.specs.items() for each in stored_shapes(name, spec)}
        return {name: entry for name, entry in self.checkpoint.entries.items() if name not in stored}

    def verify(self, step: Callable[[int], None] = lambda nbytes: None) -> None:
        """Read all tensors and compare them with their checksums, which files of format version 1 do not have.

        Args:
            step: called with the number of bytes of each block.

        Raises:
            FormatError: a tensor differs: the file was damaged after it was written.
        """
        for name, expected in self.checkpoint.checksums.items():
            if checksum_of(self.checkpoint.entries[name], step) != expected:
                raise FormatError(
                    f"{name!r} of {self.name!r} does not have its checksum: the file was damaged after it was "
                    "written. Copy it again or convert the checkpoint again."
                )

    def table(self, name: str) -> CompressedTable:
        """Read the compressed tensors of a table into memory.

        Raises:
            FormatError: ids of rows stored apart are not ascending, or outside the table; rates of a trellis do
                not belong to its codes.
        """
        spec, entries = self.specs[name], self.checkpoint.entries
        tensors: dict[str, Tensor] = {
            short: entries[stored_name(name, short)].stored.read() for short in spec.file_shapes()
        }
        stored_apart = tensors.get("kept_ids", torch.empty(0, **CPU_FLOAT))
        for ids in stored_apart.tensor_split([spec.num_kept_rows]):
            ascending = bool((ids[1:] > ids[:-1]).all())
            if len(ids) and not (ascending and int(ids[0]) >= 0 and int(ids[-1]) < spec.num_embeddings):
                raise FormatError(f"kept_ids of table {name!r} are not ascending ids of its rows")
        if isinstance(spec, TrellisSpec):
            try:
                for rates, row_nbytes in zip(tensors["dim_rates"], spec.tier_nbytes, strict=True):
                    check_rates(rates, row_nbytes)
            except ShapeError as e:
                raise FormatError(f"dim_rates of table {name!r} are damaged: {e}") from e
            if spec.has_tiers:
                check_tiers(spec, tensors)
        return CompressedTable(spec, from_file(spec, tensors))
