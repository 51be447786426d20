"""Rendering of reports for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from cqr_compress.checkpoint.base import UnbuiltObject
from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.cli.printable import printable
from cqr_compress.cli.tables import Column, print_table, stdout
from cqr_compress.commands.convert_folder import FolderReport
from cqr_compress.commands.evaluate import EvaluationReport
from cqr_compress.commands.export_vectors import is_word_vectors
from cqr_compress.commands.inspect import DenseReport
from cqr_compress.commands.sweep_report import SweepReport
from cqr_compress.finetuning.report import TuningReport

_SHOWN_OTHERS = 4
_LIMIT_TO_SHOW = 20.0
"""The ratio that the other tensors of a model limit it to is shown below this."""
_QUALITY = ("relative_mse", "weighted_relative_mse", "mean_cosine", "recall_at_10")
_HEADINGS = {
    "relative_mse": "relative\nMSE",
    "weighted_relative_mse": "weighted\nrel. MSE",
    "mean_cosine": "mean\ncosine",
    "recall_at_10": "recall\n@10",
}


def print_size_report(report: SizeReport) -> None:
    """Print a size report, of a finished conversion or of a plan."""
    console = stdout()
    state = "measured" if report.measured else "predicted, nothing written"
    _line(console, f"{report.source} -> {report.file} ({state})")
    weighted = any(row.weighted_relative_mse is not None for row in report.tables)
    columns = [
        Column("table", folds=True),
        Column("rows x dim", right=True, drop=3),
        Column("method"),
        Column("before", right=True, drop=5),
        Column("after", right=True),
        Column("ratio\nbytes", right=True),
        Column("ratio\nparams", right=True, drop=6),
        Column(_HEADINGS["relative_mse"], right=True),
        *([Column(_HEADINGS["weighted_relative_mse"], right=True, drop=1)] if weighted else []),
        Column(_HEADINGS["mean_cosine"], right=True, drop=4),
        Column(_HEADINGS["recall_at_10"], right=True, drop=2),
    ]
    rows = [
        [
            "\n= ".join((row.name, *row.aliases)),
            f"{row.shape[0]} x {row.shape[1]}",
            f"{row.method} {row.layout}".replace(", ", "\n"),
            size(row.bytes_before),
            size(row.bytes_after),
            f"{row.ratio_bytes:.2f}x",
            f"{row.ratio_parameters:.4g}x",
            _number(row.relative_mse),
            *([_number(row.weighted_relative_mse)] if weighted else []),
            _number(row.mean_cosine),
            _number(row.recall_at_10),
        ]
        for row in report.tables
    ]
    print_table(console, columns, rows)
    console.print()
    _line(console, f"tables  {_change(report.tables_bytes_before, report.tables_bytes_after)}")
    if report.rest is not None:
        change = _change(report.rest["bytes_before"], report.rest["bytes_after"])
        _line(console, f"others  {change} in {report.rest['dtype']}")
    _line(console, f"model   {_change(report.model_bytes_before, report.file_bytes_after)}")
    is_reached = report.model_bytes_before > report.largest_ratio * report.file_bytes_after  # the source is a text
    if report.largest_ratio < _LIMIT_TO_SHOW and not is_reached:
        share = report.tables_bytes_before / max(report.model_bytes_before, 1)
        _line(
            console,
            f"the compressed tables are {share:.0%} of the model: at most {report.largest_ratio:.2f}x for the "
            "whole file, whatever their ratio",
        )
    if report.optimizer_bytes:
        _line(
            console,
            f"not carried over: {size(report.optimizer_bytes)} of optimizer state, which the ratios do not count "
            f"(the source's files have {size(report.file_bytes_before)})",
        )
    for item in report.left_dense:
        _line(console, f"left dense: {item.name} {item.shape[0]} x {item.shape[1]}: {item.reason}")
    if report.rest is not None:
        for name, reason in report.rest["kept"].items():
            _line(console, f"not in {report.rest['dtype']}: {name}: {reason}")
    _print_unbuilt(console, report.unbuilt_objects)
    if report.tuning is not None:
        _print_tuning(console, report.tuning)
    if report.evaluation is not None:
        _print_evaluations(console, report.evaluation, [report.evaluation])


def print_tuning_report(report: TuningReport) -> None:
    """Print the evaluations of fine-tuning, and the size report of the written file."""
    console = stdout()
    names = [report.metric, *(name for name in report.before if name != report.metric)]
    columns = [
        Column("step", right=True),
        Column("weights"),
        *(
            Column(f"{name}\n({report.mode})" if name == report.metric else name, right=True, drop=i)
            for i, name in enumerate(names)
        ),
    ]
    rows = []
    if report.dense is not None:
        rows.append(["", "dense", *(f"{report.dense[name]:.5g}" for name in names)])
    for one in report.history:
        written = one.step == report.best_step and one.metrics == report.after
        values = (f"{one.metrics[name]:.5g}" for name in names)
        rows.append([f"{one.step:,}", one.stage + (" *" if written else ""), *values])
    print_table(console, columns, rows)
    _line(console, "* written to the file")
    console.print()
    if report.size is not None:
        print_size_report(report.size)


def print_evaluation(report: EvaluationReport) -> None:
    """Print the result of `evaluate`."""
    values = report.to_json()
    _print_evaluations(stdout(), values, values["files"])


def print_sweep(report: SweepReport) -> None:
    """Print the sizes of a sweep, with the chosen one."""
    console = stdout()
    names = [report.metric]
    if report.dense is not None:
        others = [report.dense, *(point.metrics or {} for point in report.points)]
        names += [name for name in report.dense if name != report.metric and all(name in each for each in others)]
    columns = [
        Column("ratio", right=True),
        Column("file bytes", right=True),
        Column("model\nratio", right=True, drop=3),
        Column(_HEADINGS["relative_mse"], right=True, drop=2),
        Column(_HEADINGS["recall_at_10"], right=True, drop=1 if report.task else 0),
        *(Column(name, right=True, drop=i + 3 if i else 0) for i, name in enumerate(names) if report.task),
        Column("change", right=True),
        Column("95% interval", right=True, drop=1),
        Column("s", right=True, drop=4),
    ]
    rows = []
    if report.dense is not None:
        metrics = [f"{report.dense[name]:.5g}" for name in names]
        rows.append(["dense", f"{report.dense_bytes:,}", "1.00x", "", "", *metrics, "", "", ""])
    for index, point in enumerate(report.points):
        low, high = point.interval or (0.0, 0.0)
        metrics = [] if point.metrics is None else [f"{point.metrics[name]:.5g}" for name in names]
        rows.append(
            [
                f"{point.ratio:g}x" + (" *" if index == report.chosen else ""),
                f"{point.file_bytes:,}",
                f"{report.dense_bytes / max(point.file_bytes, 1):.2f}x",
                _number(point.relative_mse),
                _number(point.recall_at_10),
                *metrics,
                f"{-100 * point.loss:+.2f}%",
                "" if point.interval is None else f"{-100 * high:+.2f} to {-100 * low:+.2f}%",
                f"{point.seconds:.0f}",
            ]
        )
    print_table(console, columns, rows, title=f"{report.source}: {report.task or 'rows'}, {report.metric}")
    for ratio, reason in report.infeasible.items():
        _line(console, f"{ratio}: {reason}")
    if report.task is None:
        _line(console, "recall@10 is of the tables' rows: the model's own metric may differ, give it as --task")
    if report.chosen is not None:
        where = f", written to {report.output}" if report.output else f": {report.points[report.chosen].file}"
        _line(console, f"* the smallest file that loses at most {100 * (report.max_loss or 0):g}%{where}")
        high = (report.points[report.chosen].interval or (0.0, 0.0))[1]
        if report.max_loss is not None and high > report.max_loss:
            _line(console, f"its interval reaches a loss of {100 * high:.2f}%: more examples would tell")
    elif report.max_loss is not None:
        _line(console, f"no size loses at most {100 * report.max_loss:g}%")


def print_load_hint(report: SizeReport) -> None:
    """Print the two lines of Python that load the file."""
    console = stdout()
    console.print()
    has_words = [table.name for table in report.tables] == ["vectors"] and is_word_vectors(report.file)
    load = (
        f"vectors = cqr.load_vectors({report.file!r})"
        if has_words
        else f"cqr.load_compressed(model, {report.file!r})"
    )
    code = f"import cqr_compress as cqr\n{load}"
    console.print(Text(printable(code)), soft_wrap=True)


def print_folder_hint(report: FolderReport) -> None:
    """Print what a written folder has, and how to load it."""
    console = stdout()
    console.print()
    if report.left_out:
        _line(console, f"not copied: {', '.join(report.left_out[:_SHOWN_OTHERS])}")
    if report.measured:
        _line(console, f"{report.folder}: {len(report.copied)} other files are copied")
        print_folder_load(report.folder)


def print_folder_load(folder: str) -> None:
    """Print the two lines of Python that load a folder."""
    code = f"import cqr_compress\nmodel = AutoModel.from_pretrained({folder!r})"
    stdout().print(Text(printable(code)), soft_wrap=True)


def print_dense_report(report: DenseReport) -> None:
    """Print the report of a dense checkpoint."""
    console = stdout()
    _line(console, f"{report.file}: {report.format}, {size(report.file_bytes)}, {report.num_tensors} tensors")
    for warning in report.warnings:
        console.print(Text(printable(f"warning: {warning}"), style="yellow"), soft_wrap=True)
    if report.tables:
        _print_dense_tables(console, report)
        console.print()
    else:
        _line(console, "no embedding table found")
    doubtful = sorted(report.others, key=lambda item: -item["confidence"])
    for item in doubtful[:_SHOWN_OTHERS]:
        rows, columns = item["shape"]
        _line(console, f"not a table: {item['name']} {rows} x {columns}: {item['reason']}")
    if len(report.others) > _SHOWN_OTHERS:
        _line(
            console,
            f"and {len(report.others) - _SHOWN_OTHERS} more 2-D tensors that are not tables (--json lists them)",
        )
    if report.optimizer_bytes:
        _line(console, f"optimizer state: {size(report.optimizer_bytes)}, not carried over by convert")
    _print_unbuilt(console, report.unbuilt_objects)


def size(nbytes: int) -> str:
    """Format bytes in binary units, such as 1.50 MiB."""
    value, units = float(nbytes), ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.2f} {units[unit]}"


def _print_dense_tables(console: Console, report: DenseReport) -> None:
    columns = [
        Column("table", folds=True),
        Column("rows x dim", right=True),
        Column("dtype", drop=4),
        Column("bytes", right=True),
        Column("share", right=True, drop=3),
        Column("zero\nrows", right=True, drop=5),
        Column("equal\nrows", right=True, drop=6),
        Column("eff.\nrank", right=True, drop=2),
        Column("relative MSE at\n8x / 16x / 32x", right=True),
        Column("why (confidence)", folds=True, drop=7),
    ]
    rows = [
        [
            "\n= ".join((row.name, *row.aliases)),
            f"{row.shape[0]} x {row.shape[1]}",
            row.dtype,
            size(row.nbytes),
            f"{100 * row.share:.1f}%",
            "" if row.zero_rows is None else str(row.zero_rows),
            "" if row.duplicate_rows is None else str(row.duplicate_rows),
            "" if row.effective_rank is None else f"{row.effective_rank:.0f}",
            " / ".join("-" if e is None else f"{e:.3f}" for e in (row.relative_mse_at_ratio or {}).values()),
            f"{row.reason} ({row.confidence:.2f})",
        ]
        for row in report.tables
    ]
    print_table(console, columns, rows)


def _print_tuning(console: Console, tuning: Mapping[str, Any]) -> None:
    dense = tuning["dense"]
    before = "" if dense is None else f"dense {dense[tuning['metric']]:.5g}, "
    _line(console, f"fine-tuned on {tuning['task']}: {before}{tuning['summary']}")


def _print_evaluations(console: Console, report: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Print the metrics of the task for the original and each file, then the quality of the tables' rows."""
    measured = [(file["file"], file["file_bytes"], file["metrics"]) for file in files]
    if report["dense"] is not None:
        measured.insert(0, (report["original"], report["dense_bytes"], report["dense"]))
    if report["metric"] is not None:
        names = list(dict.fromkeys(name for _, _, values in measured for name in values))
        columns = [
            Column("file", folds=True),
            Column("bytes", right=True),
            *(Column(name, right=True, drop=0 if name == report["metric"] else 1) for name in names),
        ]
        rows = [
            [str(file), f"{nbytes:,}", *(f"{values[name]:.5g}" if name in values else "-" for name in names)]
            for file, nbytes, values in measured
        ]
        print_table(console, columns, rows, title=f"task {report['task']}")
    if any(file["tables"] for file in files):
        console.print()
        _print_rows(console, files)


def _print_rows(console: Console, files: Sequence[Mapping[str, Any]]) -> None:
    found = [(file["file"], table) for file in files for table in file["tables"]]
    names = [name for name in _QUALITY if any(name in table["quality"] for _, table in found)]
    drops = {"mean_cosine": 2, "recall_at_10": 1}
    columns = [
        Column("file", folds=True, drop=3 if len(files) == 1 else 0),
        Column("table", folds=True),
        Column("ids", right=True),
        *(Column(_HEADINGS[name], right=True, drop=drops.get(name, 0)) for name in names),
    ]
    rows = []
    for file, table in found:
        values = (_number(table["quality"].get(name)) for name in names)
        rows.append([str(file), table["name"], "all", *values])
        for band in table["bands"]:
            values = (_number(band.get(name)) for name in names)
            rows.append(["", f"  {band['name']}", f"{band['num_ids']:,}", *values])
    print_table(console, columns, rows, title="rows compared with the original's")


def _print_unbuilt(console: Console, unbuilt: Iterable[UnbuiltObject]) -> None:
    counts: dict[str, int] = {}
    for met in unbuilt:
        counts[met.class_name] = counts.get(met.class_name, 0) + 1
    for name, count in sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN_OTHERS]:
        times = f" ({count} times)" if count > 1 else ""
        _line(console, f"not built, not carried over: {name}{times}")
    if len(counts) > _SHOWN_OTHERS:
        _line(console, f"and objects of {len(counts) - _SHOWN_OTHERS} more classes (--json lists them)")


def _line(console: Console, text: str) -> None:
    """Print text: wrapped at words on a terminal, on one line in a file."""
    console.print(Text(printable(text)), soft_wrap=not console.is_terminal)


def _change(before: int, after: int) -> str:
    return f"{size(before)} -> {size(after)}, {before / max(after, 1):.2f}x ({before:,} -> {after:,} bytes)"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) >= 0.01 or not value else f"{value:.2e}"
