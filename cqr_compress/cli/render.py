"""Reports as tables, work as progress bars: everything a person sees."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from cqr_compress.checkpoint.size_report import SizeReport
from cqr_compress.commands.evaluate import EvaluationReport
from cqr_compress.commands.inspect import DenseReport
from cqr_compress.finetuning.report import TuningReport

_PLAIN_EVERY_S = 10.0


_SHOWN_OTHERS = 4


class TerminalProgress:
    """Bars on stderr when it is a terminal, else a plain line every ten seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bars: Progress | None = None
        self._task: TaskID | None = None
        self._label, self._unit, self._done, self._total, self._state = "", "", 0, 0, ""
        self._began = self._said = time.monotonic()

    def __enter__(self) -> TerminalProgress:
        if self._console.is_terminal:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[rate]}", markup=False),
                TextColumn("{task.fields[state]}", markup=False),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a piece of work."""
        self._label, self._unit, self._done, self._total, self._state = label, unit, 0, total, ""
        self._began = time.monotonic()
        if self._bars is not None:
            if self._task is not None:
                self._bars.remove_task(self._task)
            self._task = self._bars.add_task(label, total=total or None, rate="", state="")

    def advance(self, amount: int = 1) -> None:
        """Report units done."""
        self._done += amount
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, advance=amount, rate=f"{_count(rate)} {self._unit}/s")
        elif now - self._said > _PLAIN_EVERY_S:
            self._said = now
            of = f" of {_count(self._total)}" if self._total else ""
            left = f", {(self._total - self._done) / rate:.0f} s to go" if self._total and rate else ""
            state = f", {self._state}" if self._state else ""
            print(
                f"{self._label}: {_count(self._done)}{of} {self._unit}, {_count(rate)}/s{left}{state}",
                file=sys.stderr,
                flush=True,
            )

    def tell(self, state: str) -> None:
        """Show how the work stands."""
        self._state = state
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, state=state)

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        self._console.print(Text(line), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a note that does not stop the work."""
        self._console.print(Text(f"note: {message}"), soft_wrap=True)


def print_size_report(report: SizeReport) -> None:
    """Print a size report, of a finished conversion or of a plan."""
    console = _stdout()
    what = "measured" if report.measured else "predicted, nothing written"
    console.print(Text(f"{report.source} -> {report.file} ({what})"), soft_wrap=True)
    table = Table(title=None, header_style="bold")
    weighted = any(row.weighted_relative_mse is not None for row in report.tables)
    for heading, justify in (
        ("table", "left"),
        ("rows x dim", "right"),
        ("method", "left"),
        ("before", "right"),
        ("after", "right"),
        ("ratio\nbytes", "right"),
        ("ratio\nparams", "right"),
        ("relative\nMSE", "right"),
        *([("weighted\nrel. MSE", "right")] if weighted else []),
        ("mean\ncosine", "right"),
        ("recall\n@10", "right"),
    ):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for row in report.tables:
        table.add_row(
            Text("\n= ".join((row.name, *row.aliases))), f"{row.shape[0]} x {row.shape[1]}",
            f"{row.method}\n{row.layout}", size(row.bytes_before), size(row.bytes_after),
            f"{row.ratio_bytes:.2f}x",
            f"{row.ratio_parameters:.4g}x", _figure(row.relative_mse),
            *([_figure(row.weighted_relative_mse)] if weighted else []), _figure(row.mean_cosine),
            _figure(row.recall_at_10),
        )  # fmt: skip
    console.print(table)
    before, after = report.tables_bytes_before, report.tables_bytes_after
    console.print(f"tables     {_change(before, after)}")
    console.print(f"whole file {_change(report.file_bytes_before, report.file_bytes_after)}")
    if report.optimizer_bytes:
        console.print(f"left behind: {size(report.optimizer_bytes)} of optimizer state")
    for item in report.left_dense:
        rows, columns = item["shape"]
        console.print(Text(f"left dense: {item['name']} {rows} x {columns}: {item['reason']}"), soft_wrap=True)
    _print_placeholders(console, report.placeholders)
    if report.tuning is not None:
        _print_tuning(console, report.tuning)
    if report.evaluation is not None:
        _print_evaluations(console, report.evaluation, [report.evaluation])


def print_tuning_report(report: TuningReport) -> None:
    """Print what a fine-tuning did, and the size report of what it wrote."""
    console = _stdout()
    table = Table(header_style="bold")
    table.add_column("step", justify="right")
    table.add_column("weights")
    for name in report.before:
        table.add_column(f"{name} ({report.mode})" if name == report.metric else name, justify="right")
    if report.dense is not None:
        table.add_row("", "dense", *(f"{report.dense[name]:.5g}" for name in report.before))
    for evaluation in report.history:
        mark = " *" if evaluation["step"] == report.best_step and evaluation["figures"] == report.after else ""
        figures = (f"{evaluation['figures'][name]:.5g}" for name in report.before)
        table.add_row(f"{evaluation['step']:,}", evaluation["what"] + mark, *figures)
    console.print(table)
    console.print("* what was written")
    if report.size is not None:
        print_size_report(report.size)


def print_evaluation(report: EvaluationReport) -> None:
    """Print what `evaluate` found."""
    console = _stdout()
    values = report.to_json()
    _print_evaluations(console, values, values["files"])


def _print_tuning(console: Console, tuning: Mapping[str, Any]) -> None:
    dense = tuning["dense"]
    figures = "" if dense is None else f"dense {dense[tuning['metric']]:.5g}, "
    console.print(Text(f"fine-tuned on {tuning['task']}: {figures}{tuning['verdict']}"), soft_wrap=True)


def _print_evaluations(console: Console, report: Mapping[str, Any], files: Sequence[Mapping[str, Any]]) -> None:
    """Print figures of a task, dense and compressed side by side, then rows beside their source."""
    figures = [(file["file"], file["file_bytes"], file["figures"]) for file in files]
    if report["dense"] is not None:
        figures.insert(0, (report["against"], report["dense_bytes"], report["dense"]))
    if report["metric"] is not None:
        table = Table(header_style="bold", title=f"task {report['task']}", title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("bytes", justify="right")
        names = list(figures[0][2])
        for name in names:
            table.add_column(f"{name} *" if name == report["metric"] else name, justify="right")
        for file, nbytes, found in figures:
            table.add_row(Text(str(file)), f"{nbytes:,}", *(f"{found[name]:.5g}" for name in names))
        console.print(table)
    rows = [(file["file"], table) for file in files for table in file["tables"]]
    if not rows:
        return
    measures = ("relative_mse", "mean_cosine", "recall_at_10")
    table = Table(header_style="bold", title=f"rows beside {report['against']}", title_justify="left")
    for heading in ("file", "table", "ids", "relative\nMSE", "mean\ncosine", "recall\n@10"):
        table.add_column(heading, justify="left" if heading in ("file", "table") else "right", overflow="fold")
    for file, found in rows:
        quality = (_figure(found["quality"].get(name)) for name in measures)
        table.add_row(Text(str(file)), Text(found["name"]), "all", *quality)
        for band in found["bands"]:
            quality = (_figure(band[name]) for name in measures)
            table.add_row("", Text(f"  {band['name']}"), f"{band['num_ids']:,}", *quality)
    console.print(table)


def print_load_hint(report: SizeReport) -> None:
    """Print the two lines of Python that load the file."""
    console = _stdout()
    console.print()
    console.print(Text("import cqr_compress as cqr"), soft_wrap=True)
    console.print(Text(f"cqr.load_compressed(model, {report.file!r})"), soft_wrap=True)


def print_dense_report(report: DenseReport) -> None:
    """Print what is in a dense checkpoint."""
    console = _stdout()
    console.print(
        Text(f"{report.file}: {report.format}, {size(report.file_bytes)}, {report.num_tensors} tensors"),
        soft_wrap=True,
    )
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}"), style="yellow", soft_wrap=True)
    if report.tables:
        console.print(_dense_table(report))
    else:
        console.print("no embedding table found")
    doubtful = sorted(report.others, key=lambda item: -item["confidence"])
    for item in doubtful[:_SHOWN_OTHERS]:
        rows, columns = item["shape"]
        console.print(Text(f"not a table: {item['name']} {rows} x {columns}: {item['reason']}"), soft_wrap=True)
    if len(report.others) > _SHOWN_OTHERS:
        console.print(
            f"and {len(report.others) - _SHOWN_OTHERS} more 2-D tensors that are not tables (--json lists them)"
        )
    if report.optimizer_bytes:
        console.print(f"optimizer state: {size(report.optimizer_bytes)}, not carried over by convert")
    _print_placeholders(console, report.placeholders)


def _dense_table(report: DenseReport) -> Table:
    table = Table(header_style="bold")
    for heading in ("table", "rows x dim", "dtype", "bytes", "share", "zero /\nequal rows", "eff.\nrank",
                    "rel. MSE of pq at\n8x / 16x / 32x", "why"):  # fmt: skip
        right = heading not in ("table", "why", "dtype")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in report.tables:
        estimates = " / ".join(_figure(e) for e in (row.relative_mse_at_ratio or {}).values())
        zero = "" if row.zero_rows is None else f"{row.zero_rows} / {row.duplicate_rows}"
        rank = "" if row.effective_rank is None else f"{row.effective_rank:.0f}"
        table.add_row(
            Text("\n= ".join((row.name, *row.aliases))), f"{row.shape[0]} x {row.shape[1]}", row.dtype,
            size(row.bytes),
            f"{100 * row.share:.1f}%", zero, rank, estimates, Text(f"{row.reason} ({row.confidence:.2f})"),
        )  # fmt: skip
    return table


def size(nbytes: int) -> str:
    """Print bytes in binary units: 1.50 MiB."""
    value, units = float(nbytes), ("B", "KiB", "MiB", "GiB", "TiB")
    unit = 0
    while value >= 1024 and unit < len(units) - 1:
        value, unit = value / 1024, unit + 1
    return f"{nbytes} B" if unit == 0 else f"{value:.2f} {units[unit]}"


def _stdout() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=160)


def _print_placeholders(console: Console, placeholders: list[dict[str, str]]) -> None:
    counts: dict[str, int] = {}
    for met in placeholders:
        counts[met["class_name"]] = counts.get(met["class_name"], 0) + 1
    for name, count in sorted(counts.items(), key=lambda item: -item[1])[:_SHOWN_OTHERS]:
        times = f" ({count} times)" if count > 1 else ""
        console.print(Text(f"not built, read as a placeholder: {name}{times}"), soft_wrap=True)
    if len(counts) > _SHOWN_OTHERS:
        console.print(f"and placeholders of {len(counts) - _SHOWN_OTHERS} more classes (--json lists them)")


def _change(before: int, after: int) -> str:
    return f"{size(before)} -> {size(after)}, {before / max(after, 1):.2f}x ({before:,} -> {after:,} bytes)"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _count(value: float) -> str:
    for unit in ("", "k", "M", "G"):
        if value < 1000:
            return f"{value:.0f}{unit}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    return f"{value:.0f}T"
