"""Pages of evaluations, of fine-tuning and of sweeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cqr_compress.pages.elements import Page, Section, Stat
from cqr_compress.pages.evaluation_sections import evaluation_sections, recorded_evaluation
from cqr_compress.pages.headline import TERMS, bytes_stat, made_by, metric_stat, size_stats, size_summary
from cqr_compress.pages.run_sections import sweep_section, tuning_section
from cqr_compress.pages.size_sections import load_section, size_sections
from cqr_compress.pages.text import dense_value, file_name, metric_of, number, percent, plural, sweep_value

Report = Mapping[str, Any]


def evaluation_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of an evaluation; "sizes" may hold the size reports of its files."""
    files, sizes = report["files"], report.get("sizes") or []
    stats = []
    if len(files) == 1:
        if report["dense_bytes"]:
            stats = [bytes_stat("Files", report["dense_bytes"], files[0]["file_bytes"])]
        stats = size_stats(sizes[0]) if sizes else stats
        value, dense = (metric_of(m, report["metric"]) for m in (files[0]["metrics"], report["dense"]))
        if value is not None:
            stats.append(metric_stat(report["metric"], dense, value, None))
    names = ", ".join(file_name(file["file"]) for file in files)
    original = f"compared with {file_name(report['original'])}" if report["original"] else "evaluated"
    sections = evaluation_sections(report, files)
    if len(files) == 1 and sizes:
        sections += size_sections(sizes[0])
    load = [load_section(sizes[0], has_words)] if len(sizes) == 1 else []
    return Page(
        title=names if len(files) == 1 else plural(len(files), "compressed file"),
        subtitle=original if len(files) == 1 else f"{names}, {original}",
        summary=size_summary(sizes[0]) if len(sizes) == 1 else [],
        stats=stats,
        sections=[*sections, *neighbours, *load],
        footer=made_by(sizes[0]) if sizes else f"cqr-compress. {TERMS}",
    )


def tuning_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of fine-tuning."""
    metric, written = report["metric"], report.get("size")
    dense = metric_of(report["dense"], metric)
    stat = metric_stat(metric, dense, report["after"][metric], report["mode"])
    given = Stat(f"{metric}, fine-tuning", number(report["before"][metric]), number(report["after"][metric]),
                 "given file → written file")  # fmt: skip
    stats = [given] if dense is None else [stat, given]
    if written is None:
        return Page(f"Fine-tuning on {report['task']}", "nothing was written", [], stats,
                    [tuning_section(report)], f"cqr-compress. {TERMS}")  # fmt: skip
    return Page(
        title=file_name(written["file"]),
        subtitle=f"compressed from {file_name(written['source'])}, fine-tuned on {report['task']}",
        summary=[line for line in size_summary(written) if not line.startswith("Fine-tuned")],
        stats=[*size_stats(written)[:1], *stats, *size_stats(written)[2:]],
        sections=[
            tuning_section(report), *size_sections(written), *neighbours, load_section(written, has_words)
        ],
        footer=made_by(written),
    )  # fmt: skip


def sweep_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of a sweep."""
    points, chosen, written = report["points"], report.get("chosen"), report.get("report")
    metric, dense = report["metric"], dense_value(report)
    stats, summary = [], [f"{plural(len(points), 'size')} tried."]
    if report.get("max_loss") is not None:
        summary.append(f"Allowed loss: {percent(report['max_loss'])} of {metric}.")
    if chosen is None:
        summary.append("None was chosen.")
    else:
        point = points[chosen]
        stats.append(bytes_stat("Chosen file", report["dense_bytes"], point["file_bytes"]))
        if (value := sweep_value(point, metric)) is not None:
            stats.append(metric_stat(metric, dense, value, report["mode"]))
        stats.append(
            Stat(
                "Relative MSE of rows",
                "",
                number(point["relative_mse"]),
                f"recall@10 {number(point['recall_at_10'])}",
            )
        )
    sections = [sweep_section(report)]
    if written is not None:
        summary += size_summary(written)
        sections += [*size_sections(written), *recorded_evaluation(written)]
        neighbours = [*neighbours, load_section(written, has_words)]
    task = f" on {report['task']}" if report.get("task") else ""
    return Page(
        title=f"Sizes of {file_name(report['source'])}",
        subtitle=f"bytes and quality compared{task}",
        summary=summary,
        stats=stats,
        sections=[*sections, *neighbours],
        footer=f"cqr-compress. {TERMS}" if written is None else made_by(written),
    )
