"""The header of a compressed file, stored as JSON in its metadata; immutable, updated by `dataclasses.replace`.

The JSON object under the metadata key `cqr_compress`:

    format_version  2; files of version 1 have no empty tensors with the names of the tables
    version, seed   version of the package that wrote the file, and random seed
    method          method option of the conversion, such as "auto" (optional)
    tables          per source name: `spec`, `quality` (relative_mse, mean_cosine, recall_at_10), `reason` and
                    `budget`, the budget of the conversion in bytes (optional)
    aliases         names that share the tensor of another name, with that name
    extras          names of tensors outside the dict that contained the model's state_dict
    skeleton        structure of the source file, or null (see `formats.nesting`)
    source          `file`, `format`, `bytes`, `optimizer_bytes`, `placeholders` (objects not instantiated)
    left_dense      tables that were not compressed, each with `name`, `shape`, `bytes`, `reason`
    rest            other tensors in a narrower dtype (optional; see `rest_record`)
    tuning          result of fine-tuning (optional)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from cqr_compress._version import __version__
from cqr_compress.checkpoint.base import UnbuiltObject
from cqr_compress.checkpoint.formats.nesting import is_text
from cqr_compress.checkpoint.rest_record import RestRecord
from cqr_compress.errors import FormatError, SpecError, brief
from cqr_compress.table.quality import Quality
from cqr_compress.table.spec import AnySpec, spec_from_json

FORMAT_VERSION = 2
METADATA_KEY = "cqr_compress"
_TUNING_NAMES = {"summary": "verdict"}
"""Names in the file of the fields of `tuning`, where they differ."""
_KEYS = frozenset(
    [
        "format_version",
        "version",
        "seed",
        "method",
        "tables",
        "aliases",
        "extras",
        "skeleton",
        "source",
        "left_dense",
        "rest",
        "tuning",
    ]
)
_MAX_REASON = 300
_MAX_DEPTH = 100
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class TableRecord:
    """One compressed table in a header.

    Attributes:
        spec: spec of the table.
        quality: quality compared with the source, or None if unknown.
        reason: why this layout was chosen.
        budget: budget of the conversion in bytes, or None.
    """

    spec: AnySpec
    quality: Quality | None
    reason: str
    budget: int | None = None


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """The checkpoint that a file was made of.

    Attributes:
        file: its name, without folders.
        format: its format.
        nbytes: bytes of all its files.
        optimizer_bytes: bytes of optimizer state, which is dropped.
        unbuilt_objects: objects that were not instantiated.
    """

    file: str
    format: str
    nbytes: int
    optimizer_bytes: int = 0
    unbuilt_objects: tuple[UnbuiltObject, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LeftDense:
    """A table that was not compressed.

    Attributes:
        name: name of the tensor.
        shape: (N, D).
        nbytes: bytes of the tensor.
        reason: why it was left dense.
    """

    name: str
    shape: tuple[int, int]
    nbytes: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata of a compressed file.

    Attributes:
        tables: compressed tables, by the source tensor's name.
        source: the checkpoint that it was made of.
        seed: random seed.
        method: method option of the conversion, or None.
        aliases: names that share the tensor of another name, with that name.
        outside_model: names of tensors outside the dict that contained the model's state_dict.
        structure: nesting and plain values of a pickled source, as JSON, or None if flat.
        left_dense: tables that were not compressed.
        rest: other tensors that are stored in a narrower dtype, or None.
        tuning: result of fine-tuning, or None.
        version: version of the package that wrote the file.
        others: keys that this version does not know; they are written back as they are.
    """

    tables: Mapping[str, TableRecord]
    source: SourceRecord
    seed: int = 0
    method: str | None = None
    aliases: Mapping[str, str] = field(default_factory=dict)
    outside_model: tuple[str, ...] = ()
    structure: Any = None
    left_dense: tuple[LeftDense, ...] = ()
    rest: RestRecord | None = None
    tuning: Mapping[str, Any] | None = None
    version: str = __version__
    others: Mapping[str, Any] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, AnySpec]:
        """Spec of each compressed table."""
        return {name: table.spec for name, table in self.tables.items()}

    def dumps(self) -> str:
        """Serialize to JSON text, from which `loads` restores an equal header."""
        source = {
            "file": self.source.file,
            "format": self.source.format,
            "bytes": self.source.nbytes,
            "optimizer_bytes": self.source.optimizer_bytes,
            "placeholders": [{"path": o.path, "class_name": o.class_name} for o in self.source.unbuilt_objects],
        }
        left = [
            {"name": item.name, "shape": list(item.shape), "bytes": item.nbytes, "reason": item.reason}
            for item in self.left_dense
        ]
        values = {
            "format_version": FORMAT_VERSION,
            "version": self.version,
            "seed": self.seed,
            **({} if self.method is None else {"method": self.method}),
            "tables": {name: _table_to_json(table) for name, table in self.tables.items()},
            "aliases": dict(self.aliases),
            "extras": sorted(self.outside_model),
            "skeleton": self.structure,
            "source": source,
            "left_dense": left,
            **({} if self.rest is None else {"rest": self.rest.to_json()}),
            **({} if self.tuning is None else {"tuning": _tuning_to_json(self.tuning)}),
            **self.others,
        }
        return json.dumps(values, separators=(",", ":"))

    @classmethod
    def loads(cls, text: str, where: str) -> Header:
        """Parse and validate the JSON text of a file's metadata.

        Args:
            text: value of the metadata key.
            where: path of the file, for messages.

        Raises:
            FormatError: a newer format, or fields that are missing or of the wrong type.
        """
        try:
            values = _typed(json.loads(text), dict, "the metadata")
            version = values["format_version"]
            if not isinstance(version, int) or version > FORMAT_VERSION:
                raise FormatError(
                    f"{where!r} has format version {brief(version)}, but this version reads up to "
                    f"{FORMAT_VERSION}: upgrade cqr-compress"
                )
            tables = {
                _name(name): _table_from_json(_typed(table, dict, "a table"))
                for name, table in _typed(values["tables"], dict).items()
            }
            aliases = _typed(values["aliases"], dict)
            tuning = values.get("tuning")
            others = {name: value for name, value in values.items() if name not in _KEYS}
            _check_depth(others)
            _check_depth(tuning)
            return cls(
                tables=tables,
                source=_source_from_json(_typed(values["source"], dict)),
                seed=_typed(values["seed"], int),
                method=None if values.get("method") is None else _typed(values["method"], str),
                aliases={_name(name): _name(target) for name, target in aliases.items()},
                outside_model=tuple(_name(name) for name in _typed(values["extras"], list)),
                structure=values["skeleton"],
                left_dense=tuple(_left_from_json(item) for item in _typed(values["left_dense"], list)),
                rest=None if values.get("rest") is None else RestRecord.from_json(_typed(values["rest"], dict)),
                tuning=None if tuning is None else _tuning_from_json(_typed(tuning, dict)),
                version=_typed(values["version"], str),
                others=others,
            )
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, SpecError, RecursionError, OverflowError) as e:
            raise FormatError(
                f"the metadata of {where!r} is damaged: {type(e).__name__}: {str(e)[:_MAX_REASON]}"
            ) from e


def _table_to_json(table: TableRecord) -> dict[str, Any]:
    return {
        "spec": table.spec.to_json(),
        "quality": {} if table.quality is None else table.quality.to_json(),
        "reason": table.reason,
        **({} if table.budget is None else {"budget": table.budget}),
    }


def _table_from_json(values: dict[str, Any]) -> TableRecord:
    quality = _typed(values["quality"], dict, "quality")
    return TableRecord(
        spec=spec_from_json(values["spec"]),
        quality=Quality.from_json(quality) if quality else None,
        reason=_typed(values["reason"], str, "reason"),
        budget=None if values.get("budget") is None else _typed(values["budget"], int, "budget"),
    )


def _source_from_json(values: dict[str, Any]) -> SourceRecord:
    return SourceRecord(
        file=_typed(values["file"], str),
        format=_typed(values["format"], str),
        nbytes=_typed(values["bytes"], int),
        optimizer_bytes=_typed(values["optimizer_bytes"], int),
        unbuilt_objects=tuple(
            UnbuiltObject(_typed(met["path"], str), _typed(met["class_name"], str))
            for met in _typed(values["placeholders"], list)
        ),
    )


def _left_from_json(values: dict[str, Any]) -> LeftDense:
    rows, columns = (_typed(n, int) for n in _typed(values["shape"], list))
    return LeftDense(
        name=_name(values["name"]),
        shape=(rows, columns),
        nbytes=_typed(values["bytes"], int),
        reason=_typed(values["reason"], str),
    )


def _tuning_to_json(tuning: Mapping[str, Any]) -> dict[str, Any]:
    return {_TUNING_NAMES.get(name, name): value for name, value in tuning.items()}


def _tuning_from_json(values: dict[str, Any]) -> dict[str, Any]:
    names = {stored: name for name, stored in _TUNING_NAMES.items()}
    tuning = {names.get(name, name): value for name, value in values.items()}
    check_tuning(tuning)
    return tuning


def check_tuning(tuning: Mapping[str, Any]) -> None:
    """Check the result of fine-tuning in a header or report.

    Raises:
        TypeError: a field of the wrong type.
        KeyError: a missing field.
    """
    for name in ("task", "metric", "mode", "summary"):
        _typed(tuning[name], str, name)
    for name in ("before", "after", "dense"):
        if name != "dense" or tuning[name] is not None:
            check_metrics(tuning[name], name)
            tuning[name][tuning["metric"]]  # the metric that selected the weights is one of them


def check_metrics(metrics: Any, what: str) -> None:
    """Check that a value read from JSON is an object of numbers.

    Raises:
        TypeError: it is not.
    """
    for value in _typed(metrics, dict, what).values():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not _fits(value):
            raise TypeError(f"{what} has {brief(value)} in place of a number")


def _name(value: Any) -> str:
    if not is_text(_typed(value, str, "a name")):
        raise TypeError(f"the name {brief(value)} is not valid Unicode")
    return str(value)


def _fits(number: float) -> bool:
    """Return whether a number is no integer that 64 bits cannot hold."""
    return isinstance(number, float) or abs(number) < 2**63


def _check_depth(value: Any) -> None:
    """Refuse values that are nested too deeply to be written again."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
        ]
    if level:
        raise ValueError(f"it has values of more than {_MAX_DEPTH} levels")


def _typed(value: Any, kind: type[T], what: str = "a field") -> T:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{what} is {brief(value)}, not {kind.__name__}")
    if isinstance(value, int) and not _fits(value):
        raise TypeError(f"{what} is {brief(value)}, which 64 bits cannot hold")
    return value


def tables_for_config(header: Header) -> dict[str, Any]:
    """Return a description of the tables of a file for its config.json."""
    return {
        name: {
            "method": table.spec.method,
            "layout": table.spec.layout,
            "shape": [table.spec.num_embeddings, table.spec.embedding_dim],
            "bytes": table.spec.nbytes,
        }
        for name, table in header.tables.items()
    }
