"""The headline of a page: bytes and metrics before and after, and what was done to what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cqr_compress.pages.elements import Stat
from cqr_compress.pages.text import change_for_the_worse, metric_of, number, percent, plural, size, times

Report = Mapping[str, Any]


def model_bytes(report: Report) -> tuple[int, int]:
    """Return the bytes of a model before, without optimizer state, and after."""
    return max(report["file_bytes_before"] - report["optimizer_bytes"], 0), report["file_bytes_after"]


def bytes_stat(label: str, before: int, after: int) -> Stat:
    """Return a headline of bytes before and after."""
    return Stat(label, size(before), size(after), f"{times(before, after)} smaller; {before:,} → {after:,} bytes")


def size_stats(report: Report) -> list[Stat]:
    """Return the headline: bytes of the model and of its tables, and errors of rows."""
    before, after = model_bytes(report)
    tables = report["tables_bytes_before"], report["tables_bytes_after"]
    found = [
        bytes_stat("Model", before, after),
        Stat("Embedding tables", size(tables[0]), size(tables[1]), f"{times(*tables)} smaller"),
    ]
    errors = [table["relative_mse"] for table in report["tables"] if table["relative_mse"] is not None]
    recalls = [table["recall_at_10"] for table in report["tables"] if table["recall_at_10"] is not None]
    if errors:
        what = "Relative MSE of rows" if report["measured"] else "Relative MSE, estimated"
        found.append(Stat(what, "", _range(errors), f"recall@10 {_range(recalls)}" if recalls else ""))
    return found


def _range(values: Sequence[float]) -> str:
    low, high = number(min(values), 3), number(max(values), 3)
    return low if low == high else f"{low} to {high}"


def metric_stat(metric: str, dense: float | None, value: float, mode: str | None) -> Stat:
    """Return a headline of a metric, compared with the dense model's if it is known."""
    if dense is None:
        return Stat(metric, "", number(value), "dense model not evaluated")
    loss = None if mode is None else change_for_the_worse(value, dense, mode)
    if loss is None:
        change = "" if not dense else f"{'+' if value >= dense else ''}{percent((value - dense) / abs(dense))}, "
        return Stat(metric, number(dense), number(value), f"{change}dense → compressed")
    what = "no loss" if loss == 0 else f"{percent(abs(loss))} {'worse' if loss > 0 else 'better'}"
    return Stat(metric, number(dense), number(value), f"{what} than the dense model")


def recorded_metrics(report: Report) -> list[Stat]:
    """Return headlines of the metrics that a size report records, of fine-tuning or of `evaluate`."""
    tuning, evaluation = report.get("tuning"), report.get("evaluation")
    if evaluation is not None and metric_of(evaluation["metrics"], evaluation["metric"]) is not None:
        metric = evaluation["metric"]
        return [metric_stat(metric, metric_of(evaluation["dense"], metric), evaluation["metrics"][metric], None)]
    if tuning is not None:
        metric = tuning["metric"]
        return [metric_stat(metric, metric_of(tuning["dense"], metric), tuning["after"][metric], tuning["mode"])]
    return []


def size_summary(report: Report) -> list[str]:
    """Return sentences on what was done to what."""
    methods: dict[str, int] = {}
    for table in report["tables"]:
        methods[table["method"]] = methods.get(table["method"], 0) + 1
    done = ", ".join(f"{plural(count, 'table')} with {method}" for method, count in methods.items())
    found = [f"{'Compressed' if report['measured'] else 'To be compressed'}: {done or 'no table'}."]
    if report["left_dense"]:
        found.append(f"Left dense: {plural(len(report['left_dense']), 'table')}.")
    rest = report.get("rest")
    found.append("Other tensors as in the source." if rest is None else f"Other tensors in {rest['dtype']}.")
    if report["optimizer_bytes"]:
        found.append(f"{size(report['optimizer_bytes'])} of optimizer state not carried over, and not counted.")
    if report.get("tuning") is not None:
        found.append(f"Fine-tuned on {report['tuning']['task']}: {report['tuning']['summary']}.")
    return found


TERMS = (
    "Relative MSE: squared error of the rows / their squared norm. Weighted MSE: the same, rows weighted by "
    "frequency. Recall@10: share of the 10 nearest rows that are still among the 10 nearest."
)


def made_by(report: Report) -> str:
    """Return the footer of a page: what made the file, and the terms."""
    return f"cqr-compress {report['version']}, seed {report['seed']}. {TERMS}"
