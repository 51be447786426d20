"""The size report of a compressed file, for JSON and the terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, TypeVar

from cqr_compress.checkpoint.base import UnbuiltObject
from cqr_compress.checkpoint.compressed_file import CompressedFile
from cqr_compress.checkpoint.header import Header, LeftDense, check_metrics, check_tuning
from cqr_compress.checkpoint.rest_record import RestRecord
from cqr_compress.errors import FormatError, brief

SCHEMA_VERSION = 2


def report_path(output: Path) -> Path:
    """Return the path of the JSON report: `small.report.json` for `small.safetensors` or its index of shards."""
    name = output.name.removesuffix(".index.json").removesuffix(".safetensors")
    return output.with_name(f"{name}.report.json")


@dataclass(frozen=True, kw_only=True)
class TableReport:
    """Report of one compressed table. Bytes count all of its stored tensors; ratios are before / after.

    Attributes:
        name: name of the source tensor.
        shape: (N, D).
        dtype: dtype of the source.
        method: method that fitted the table.
        layout: columns x levels x bits.
        bytes_before: bytes of the source tensor.
        bytes_after: bytes of the stored tensors; the predicted number is exact.
        ratio_bytes: bytes_before / bytes_after.
        ratio_parameters: N * D / number of parameters.
        rows_stored_apart: number of exact and all-zero rows.
        relative_mse: see `quality.Quality`; in a plan, the estimate of trial fits, or None without trials.
        mean_cosine: see `quality.Quality`; None in a plan.
        recall_at_10: see `quality.Quality`; None in a plan.
        weighted_relative_mse: see `quality.Quality`; None without frequencies.
        aliases: other names that read this table.
        reason: why this layout was chosen.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    method: str
    layout: str
    bytes_before: int
    bytes_after: int
    ratio_bytes: float
    ratio_parameters: float
    rows_stored_apart: int
    relative_mse: float | None
    mean_cosine: float | None
    recall_at_10: float | None
    aliases: tuple[str, ...]
    reason: str
    weighted_relative_mse: float | None = None


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Report of a compressed file, or of a planned conversion.

    Attributes:
        file: the compressed file (or index).
        source: the checkpoint that it was made of.
        measured: True if the file was written, False in a plan.
        file_bytes_before: size of the source's files.
        file_bytes_after: size of the compressed files.
        tables_bytes_before: bytes of the compressed tables in the source.
        tables_bytes_after: bytes of their stored tensors.
        optimizer_bytes: bytes of optimizer state in the source, which is dropped.
        unbuilt_objects: objects of the source that were not instantiated.
        left_dense: tables that were not compressed.
        rest: other tensors in a narrower dtype, see `RestRecord`; None if they are as in the source.
        tables: reports of the compressed tables.
        version: version of the package that wrote the file.
        seed: random seed.
        tuning: result of fine-tuning, see `TuningReport.in_file`; None without fine-tuning.
        evaluation: result of `evaluate` for this file, or None.
        rate_distortion: by table, the layouts that were tried (`trials`: layout, bytes, error), the sizes that
            were measured (`curve`: bytes, error) and the rate-distortion bound of Gaussian rows of the same
            covariance (`bound`: bytes, error); None for a file that was not just planned.
    """

    file: str
    source: str
    measured: bool
    file_bytes_before: int
    file_bytes_after: int
    tables_bytes_before: int
    tables_bytes_after: int
    optimizer_bytes: int
    unbuilt_objects: tuple[UnbuiltObject, ...]
    left_dense: tuple[LeftDense, ...]
    tables: list[TableReport]
    version: str
    seed: int
    rest: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    rate_distortion: dict[str, Any] | None = None

    @property
    def model_bytes_before(self) -> int:
        """Size of the source's files without the optimizer state."""
        return max(self.file_bytes_before - self.optimizer_bytes, 0)

    @property
    def largest_ratio(self) -> float:
        """Bytes of the model before / bytes outside its compressed tables: no ratio of the tables exceeds it."""
        saved = 0 if self.rest is None else self.rest["bytes_before"] - self.rest["bytes_after"]
        return self.model_bytes_before / max(self.model_bytes_before - self.tables_bytes_before - saved, 1)

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object with the schema's name and version."""
        return {"kind": "size_report", "schema_version": SCHEMA_VERSION, **asdict(self)}

    @staticmethod
    def is_one(values: Any) -> bool:
        """Return whether a value read from JSON is a size report of any schema version."""
        return isinstance(values, dict) and values.get("kind") == "size_report"

    @classmethod
    def from_json(cls, values: Any, where: str) -> SizeReport:
        """Restore a report from its JSON object.

        Raises:
            FormatError: not a size report, a damaged one, or one of another schema version.
        """
        if not cls.is_one(values) or not isinstance(values.get("schema_version"), int):
            raise FormatError(f"{where!r} is JSON, but not a size report: give a report that `convert` wrote")
        if values["schema_version"] != SCHEMA_VERSION:
            raise FormatError(
                f"{where!r} has report schema {brief(values['schema_version'])}, but this version reads "
                f"{SCHEMA_VERSION}: inspect the compressed file instead"
            )
        try:
            fields = {k: v for k, v in values.items() if k not in ("kind", "schema_version")}
            report = cls(
                tables=[_from_json(TableReport, table) for table in _list(fields.pop("tables"))],
                left_dense=tuple(_from_json(LeftDense, item) for item in _list(fields.pop("left_dense"))),
                unbuilt_objects=tuple(
                    _from_json(UnbuiltObject, item) for item in _list(fields.pop("unbuilt_objects"))
                ),
                **_checked_fields(cls, fields),
            )
            if report.rest is not None:
                RestRecord.from_json(report.rest)
            if report.tuning is not None:
                check_tuning(report.tuning)
            if report.evaluation is not None:
                _check_evaluation(report.evaluation)
            if report.rate_distortion is not None:
                _check_rate_distortion(report.rate_distortion)
            return report
        except (TypeError, ValueError, KeyError, AttributeError) as e:
            raise FormatError(f"{where!r} is a damaged size report: {str(e)[:300]}") from e


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "bool": (bool,),
    "int": (int,),
    "float": _NUMBER,
    "float | None": (*_NUMBER, type(None)),
    "dict[str, Any] | None": (dict, type(None)),
    "tuple[int, int]": (int,),
    "tuple[str, ...]": (str,),
}
"""Types in JSON of the fields of reports by annotation; of a tuple, those of its parts."""
R = TypeVar("R")


def _list(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"it has {brief(values)} in place of a list")
    return values


def _from_json(cls: type[R], values: Any) -> R:
    """Make a dataclass of a JSON object; raises TypeError."""
    if not isinstance(values, dict):
        raise TypeError(f"a {cls.__name__} is {brief(values)}")
    return cls(**_checked_fields(cls, values))


def _checked_fields(cls: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Check the types of fields, and convert lists to tuples; raises TypeError."""
    annotations = {field.name: str(field.type) for field in fields_of(cls)}
    checked = {}
    for name, value in values.items():
        annotation = annotations.get(name, "")
        if annotation not in _TYPES:
            raise TypeError(f"it has the field {brief(name)}")
        parts = value if annotation.startswith("tuple") and isinstance(value, list) else [value]
        if annotation == "tuple[int, int]" and len(parts) != 2:
            raise TypeError(f"{name} is not two sizes")
        for part in parts:
            if not isinstance(part, _TYPES[annotation]) or (isinstance(part, bool) and annotation != "bool"):
                raise TypeError(f"{name} is {brief(part)}")
            if isinstance(part, int) and abs(part) >= 2**63:
                raise TypeError(f"{name} is {brief(part)}, which 64 bits cannot hold")
        checked[name] = tuple(parts) if annotation.startswith("tuple") else value
    return checked


def _check_evaluation(values: dict[str, Any]) -> None:
    """Check the result of `evaluate` as `inspect` shows it; raises TypeError, KeyError or AttributeError."""
    for name in ("file", "original", "task"):
        values[name]
    for name in ("dense", "metrics"):
        if values[name] is not None:
            check_metrics(values[name], name)
    if values["metric"] is not None:
        for metrics in (values["metrics"], values["dense"] or values["metrics"]):
            if metrics is None or metrics.keys() != values["metrics"].keys() or values["metric"] not in metrics:
                raise TypeError("its metrics do not match")
    numbers = {"file_bytes": values["file_bytes"], "dense_bytes": values["dense_bytes"] or 0}
    check_metrics(numbers, "evaluation")
    for table in values["tables"]:
        check_metrics(table["quality"], "quality")
        for item in (table, *table["bands"]):
            if not isinstance(item["name"], str):
                raise TypeError(f"a table is named {brief(item['name'])}")
        for band in table["bands"]:
            check_metrics({k: v for k, v in band.items() if k != "name" and v is not None}, "a band")
            check_metrics({"num_ids": band["num_ids"]}, "a band")


def _check_rate_distortion(values: dict[str, Any]) -> None:
    """Check the points of bytes and errors of tables; raises TypeError, ValueError, KeyError or AttributeError."""
    for table in values.values():
        for name in ("trials", "curve", "bound"):
            for *layout, nbytes, error in _list(table[name]):
                check_metrics({"bytes": nbytes, "error": error}, name)
                if [type(part) for part in layout] != ([str] if name == "trials" else []):
                    raise TypeError(f"a point of {name} is {brief(layout)}")


def size_report(header: Header, file: str, file_bytes: int, measured: bool) -> SizeReport:
    """Create the report of a compressed file from its metadata and size.

    Args:
        header: header of the file.
        file: path of the file.
        file_bytes: size of the file.
        measured: whether the file was written; a plan has no quality metrics.
    """
    tables = [_table_report(name, header, measured) for name in header.tables]
    return SizeReport(
        file=file,
        source=header.source.file,
        measured=measured,
        file_bytes_before=header.source.nbytes,
        file_bytes_after=file_bytes,
        tables_bytes_before=sum(table.bytes_before for table in tables),
        tables_bytes_after=sum(table.bytes_after for table in tables),
        optimizer_bytes=header.source.optimizer_bytes,
        unbuilt_objects=header.source.unbuilt_objects,
        left_dense=header.left_dense,
        tables=tables,
        version=header.version,
        seed=header.seed,
        rest=None if header.rest is None else header.rest.to_json(),
        tuning=None if header.tuning is None else dict(header.tuning),
    )


def _table_report(name: str, header: Header, measured: bool) -> TableReport:
    record = header.tables[name]
    spec = record.spec
    metrics = record.quality.to_json() if measured and record.quality is not None else {}
    return TableReport(
        name=name,
        shape=(spec.num_embeddings, spec.embedding_dim),
        dtype=spec.dtype,
        method=spec.method,
        layout=spec.layout,
        bytes_before=spec.dense_nbytes,
        bytes_after=spec.nbytes,
        ratio_bytes=round(spec.dense_nbytes / spec.nbytes, 3),
        ratio_parameters=round(spec.num_embeddings * spec.embedding_dim / spec.num_parameters, 3),
        rows_stored_apart=spec.num_kept_rows + spec.num_zero_rows,
        relative_mse=metrics.get("relative_mse"),
        mean_cosine=metrics.get("mean_cosine"),
        recall_at_10=metrics.get("recall_at_10"),
        weighted_relative_mse=metrics.get("weighted_relative_mse"),
        aliases=tuple(alias for alias, target in header.aliases.items() if target == name),
        reason=record.reason,
    )


def report_of(opened: CompressedFile) -> SizeReport:
    """Create the report of an opened compressed file, with its size on disk."""
    return size_report(opened.header, opened.name, opened.checkpoint.file_bytes, measured=True)
