"""The compressed file: the state_dict of the swapped model in safetensors, and what its metadata says.

`emb.weight` of the source becomes `emb.codes`, `emb.codebooks` and so on; a bare tensor `embeddings` becomes
`embeddings.codes`. Other tensors keep their names and bits. The metadata holds `format: "pt"` and
`cqr_compress`, a JSON object:

    format_version  1
    version, seed   of the program that wrote the file
    method          that was asked for, such as "auto" (optional)
    tables          per source name: `spec`, `quality` (relative_mse, mean_cosine, recall_at_10), `reason` and
                    `budget`, the bytes that it might have had (optional)
    tuning          what fine-tuning did (optional)
    aliases         names that shared a tensor with another, and that other's name
    skeleton        nesting of the source file, or null (see `tree`)
    source          `file`, `format`, `bytes`, `optimizer_bytes`, `placeholders`
    left_dense      tables that were not compressed, each with `name`, `shape`, `bytes`, `reason`
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cqr_compress.checkpoint.base import Checkpoint, TensorEntry
from cqr_compress.errors import FormatError, SpecError
from cqr_compress.table.spec import AnySpec, spec_from_json
from cqr_compress.table.table import CompressedTable

FORMAT_VERSION = 1


METADATA_KEY = "cqr_compress"


def stored_name(table: str, short: str) -> str:
    """Name a stored tensor: `emb.weight` has `emb.codes`, a bare `embeddings` has `embeddings.codes`."""
    if table == "weight":
        return short
    return f"{table.removesuffix('.weight')}.{short}"


def dump_header(header: Mapping[str, Any]) -> str:
    """The metadata's JSON text."""
    return json.dumps(header, separators=(",", ":"))


def is_compressed(checkpoint: Checkpoint) -> bool:
    """Whether the file says that this package wrote it."""
    return METADATA_KEY in checkpoint.metadata


@dataclass(frozen=True)
class CompressedCheckpoint:
    """An opened compressed file.

    Attributes:
        checkpoint: the safetensors file or its shards.
        header: the metadata's JSON object.
        specs: spec of each compressed table, by the source tensor's name.
    """

    checkpoint: Checkpoint
    header: Mapping[str, Any]
    specs: Mapping[str, AnySpec]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> CompressedCheckpoint:
        """Read and check the metadata; tensors are checked against it and not read.

        Raises:
            FormatError: not a compressed file, a newer format, or tensors that are missing or do not fit.
        """
        where = str(checkpoint.path)
        if not is_compressed(checkpoint):
            raise FormatError(f"{where!r} is not a compressed checkpoint: its metadata has no {METADATA_KEY!r}")
        try:
            header = json.loads(checkpoint.metadata[METADATA_KEY])
            version = header["format_version"]
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise FormatError(
                    f"{where!r} has format version {version!r} and this program reads up to {FORMAT_VERSION}: "
                    "upgrade cqr-compress"
                )
            specs = {name: spec_from_json(table["spec"]) for name, table in header["tables"].items()}
            aliases = header["aliases"]
            plain = isinstance(aliases, dict) and all(isinstance(name, str) for name in aliases.values())
            source, left = header["source"], header["left_dense"]
            listed = all({"name", "shape", "reason"} <= item.keys() for item in left)
            placed = all({"path", "class_name"} <= met.keys() for met in source["placeholders"])
            numbers = isinstance(source["bytes"], int) and isinstance(source["optimizer_bytes"], int)
            _ = header["skeleton"], header["seed"], header["version"], source["file"], [*header["extras"]]
            _ = [(table["quality"], table["reason"]) for table in header["tables"].values()]
            if not (plain and listed and placed and numbers):
                raise TypeError("a field of another type")
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, SpecError, RecursionError) as e:
            raise FormatError(f"the metadata of {where!r} is damaged: {type(e).__name__}: {e}") from e
        opened = cls(checkpoint, header, specs)
        for name, spec in specs.items():
            for short, expected in spec.tensor_shapes().items():
                entry = checkpoint.entries.get(stored_name(name, short))
                found = None if entry is None else (entry.shape, entry.dtype)
                if found != (expected.shape, expected.dtype):
                    raise FormatError(
                        f"table {name!r} of {where!r} needs {stored_name(name, short)!r} of {expected.shape} "
                        f"{expected.dtype}, and the file has {found or 'no such tensor'}"
                    )
        known = {*specs, *opened.dense_entries}
        if lost := sorted(target for target in aliases.values() if target not in known):
            raise FormatError(f"{where!r} names {lost[0]!r} as the other name of a tensor it does not have")
        return opened

    @property
    def aliases(self) -> Mapping[str, str]:
        """Names that share the tensor of another name."""
        aliases: Mapping[str, str] = self.header["aliases"]
        return aliases

    @cached_property
    def dense_entries(self) -> Mapping[str, TensorEntry]:
        """Tensors that were carried over as they were."""
        stored = {stored_name(name, short) for name, spec in self.specs.items() for short in spec.tensor_shapes()}
        return {name: entry for name, entry in self.checkpoint.entries.items() if name not in stored}

    def table(self, name: str) -> CompressedTable:
        """Read the compressed tensors of a table into memory.

        Raises:
            FormatError: kept ids that are not ascending, or outside the table.
        """
        spec = self.specs[name]
        tensors: dict[str, Tensor] = {
            short: self.checkpoint.entries[stored_name(name, short)].lazy.read() for short in spec.tensor_shapes()
        }
        for kept in tensors.get("kept_ids", torch.empty(0)).tensor_split([spec.num_kept_rows]):
            ascending = bool((kept[1:] > kept[:-1]).all())
            if len(kept) and not (ascending and int(kept[0]) >= 0 and int(kept[-1]) < spec.num_embeddings):
                raise FormatError(f"the kept rows of table {name!r} are not ascending ids of its rows")
        return CompressedTable(spec, tensors)
