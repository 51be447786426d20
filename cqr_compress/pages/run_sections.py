"""Sections of runs of a task: a sweep of sizes, and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cqr_compress.pages.elements import Chart, Column, Section, Table
from cqr_compress.pages.run_curves import draw_history, draw_sweep
from cqr_compress.pages.text import number, percent, plural, size

Report = Mapping[str, Any]


def sweep_section(report: Report) -> Section:
    """Return the section of a sweep: the metric by bytes, and a row for each point."""
    points, metric = report["points"], report["metric"]
    names = list(dict.fromkeys(name for point in points for name in point["metrics"] or ()))
    columns = [
        Column("ratio", True), Column("file", True), *(Column(name, True) for name in names),
        Column("loss", True), Column("interval", True), Column("relative MSE", True), Column("recall@10", True),
        Column("fine-tuned"), Column("seconds", True),
    ]  # fmt: skip
    rows = []
    for i, point in enumerate(points):
        interval = point.get("interval")
        rows.append(
            [
                f"{point['ratio']:g}×" + (" ★" if i == report.get("chosen") else ""), size(point["file_bytes"]),
                *(number((point["metrics"] or {}).get(name)) for name in names),
                "" if point["loss"] is None else percent(point["loss"]),
                "" if not interval else f"{percent(interval[0])} to {percent(interval[1])}",
                number(point["relative_mse"]), number(point["recall_at_10"]), "yes" if point["finetuned"] else "",
                f"{point['seconds']:,.0f}",
            ]
        )  # fmt: skip
    chosen = frozenset() if report.get("chosen") is None else frozenset([report["chosen"]])
    chart = Chart("sweep", f"{metric} by bytes of the file", lambda width: draw_sweep(report, width))
    lead = f"Loss is the relative change of {metric} for the worse, compared with the dense model."
    notes = ["★ chosen"] if chosen else []
    notes += [f"no file of {ratio}×: {reason}" for ratio, reason in (report.get("infeasible") or {}).items()]
    return Section("Bytes and quality", lead, [chart], Table(columns, rows, chosen).filled(), notes=notes)


def tuning_section(report: Report) -> Section:
    """Return the section of fine-tuning: the metric by step."""
    metric = report["metric"]
    chart = Chart("fine-tuning", f"{metric} by step", lambda width: draw_history(report, width))
    names = [metric, *(name for name in report["before"] if name != metric)]
    columns = [Column("weights"), Column("step", True), *(Column(name, True) for name in names)]
    rows, marked = [], set()
    if report["dense"] is not None:
        rows.append(["dense", "", *(number(report["dense"].get(name)) for name in names)])
    for one in report["history"]:
        if one["step"] == report["best_step"] and one["metrics"] == report["after"]:
            marked.add(len(rows))
        values = [number(one["metrics"].get(name)) for name in names]
        rows.append([one["stage"] + (" ★" if len(rows) in marked else ""), f"{one['step']:,}", *values])
    lead = f"{report['summary']}. {plural(report['steps'], 'step')} in {report['seconds']:,.0f} s."
    return Section("Fine-tuning", lead, [chart], Table(columns, rows, frozenset(marked)),
                   notes=["★ written to the file"])  # fmt: skip
