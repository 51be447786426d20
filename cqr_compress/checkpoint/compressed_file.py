"""The compressed file: the state_dict of the model with codes in the place of tables, in safetensors.

`emb.weight` of the source becomes `emb.codes`, `emb.codebooks` and so on; a bare tensor `embeddings` becomes
`embeddings.codes`. Other tensors keep their names and bits. The metadata holds `format: "pt"` and the header.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.checkpoint.header import METADATA_KEY, Header
from cqr_compress.errors import FormatError
from cqr_compress.table.spec import AnySpec
from cqr_compress.table.table import CompressedTable


def stored_name(table: str, short: str) -> str:
    """Name a stored tensor: `emb.weight` has `emb.codes`, a bare `embeddings` has `embeddings.codes`."""
    if table == "weight":
        return short
    return f"{table.removesuffix('.weight')}.{short}"


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the file says that this package wrote it."""
    return METADATA_KEY in checkpoint.metadata


@dataclass(frozen=True)
class CompressedFile:
    """An opened compressed file.

    Attributes:
        checkpoint: the safetensors file or its shards.
        header: what its metadata say.
    """

    checkpoint: Checkpoint
    header: Header

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> CompressedFile:
        """Read and check the metadata; tensors are checked against it and not read.

        Raises:
            FormatError: not a compressed file, a newer format, or tensors that are missing or do not fit.
        """
        where = str(checkpoint.path)
        if not is_compressed(checkpoint):
            raise FormatError(f"{where!r} is not a compressed checkpoint: its metadata has no {METADATA_KEY!r}")
        opened = cls(checkpoint, Header.loads(checkpoint.metadata[METADATA_KEY], where))
        for name, spec in opened.specs.items():
            for short, expected in spec.tensor_shapes().items():
                entry = checkpoint.entries.get(stored_name(name, short))
                found = None if entry is None else (entry.shape, entry.dtype)
                if found != (expected.shape, expected.dtype):
                    raise FormatError(
                        f"table {name!r} of {where!r} needs {stored_name(name, short)!r} of {expected.shape} "
                        f"{expected.dtype}, and the file has {found or 'no such tensor'}"
                    )
        known = {*opened.specs, *opened.dense_entries}
        if lost := sorted(target for target in opened.aliases.values() if target not in known):
            raise FormatError(f"{where!r} names {lost[0]!r} as the other name of a tensor it does not have")
        return opened

    @property
    def name(self) -> str:
        """The path, for messages."""
        return str(self.checkpoint.path)

    @cached_property
    def specs(self) -> Mapping[str, AnySpec]:
        """Spec of each compressed table, by the source tensor's name."""
        return self.header.specs

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share the tensor of another name."""
        return self.header.aliases

    @cached_property
    def dense_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors that were carried over as they were."""
        stored = {stored_name(name, short) for name, spec in self.specs.items() for short in spec.tensor_shapes()}
        return {name: entry for name, entry in self.checkpoint.entries.items() if name not in stored}

    def table(self, name: str) -> CompressedTable:
        """Read the compressed tensors of a table into memory.

        Raises:
            FormatError: ids of rows stored apart that are not ascending, or outside the table.
        """
        spec, entries = self.specs[name], self.checkpoint.entries
        tensors: dict[str, Tensor] = {
            short: entries[stored_name(name, short)].stored.read() for short in spec.tensor_shapes()
        }
        for ids in tensors.get("kept_ids", torch.empty(0)).tensor_split([spec.num_kept_rows]):
            ascending = bool((ids[1:] > ids[:-1]).all())
            if len(ids) and not (ascending and int(ids[0]) >= 0 and int(ids[-1]) < spec.num_embeddings):
                raise FormatError(f"the kept rows of table {name!r} are not ascending ids of its rows")
        return CompressedTable(spec, tensors)
