"""Pages of compressed files, of folders with them, and of dense checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cqr_compress.pages.bars import Share, draw_bytes, share_of
from cqr_compress.pages.curves import draw_estimates
from cqr_compress.pages.elements import Chart, Page, Record, Records, Section, Stat
from cqr_compress.pages.evaluation_sections import recorded_evaluation
from cqr_compress.pages.headline import (
    bytes_stat,
    made_by,
    model_bytes,
    recorded_metrics,
    size_stats,
    size_summary,
)
from cqr_compress.pages.size_sections import dimensions, load_section, size_sections
from cqr_compress.pages.style import SERIES
from cqr_compress.pages.text import file_name, percent, plural, size

Report = Mapping[str, Any]


def size_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of a size report."""
    state = "" if report["measured"] else " (a plan: sizes are exact, nothing is written)"
    load = [load_section(report, has_words)] if report["measured"] else []
    return Page(
        title=file_name(report["file"]),
        subtitle=f"compressed from {file_name(report['source'])}{state}",
        summary=size_summary(report),
        stats=[*size_stats(report), *recorded_metrics(report)],
        sections=[*size_sections(report), *recorded_evaluation(report), *neighbours, *load],
        footer=made_by(report),
    )


def folder_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of a folder: that of its file, or the sections of each of its files."""
    reports = report["reports"]
    sums = [sum(model_bytes(one)[i] for one in reports) for i in (0, 1)]
    stats = size_stats(reports[0]) if len(reports) == 1 else [bytes_stat("Files of weights", *sums)]
    sections: list[Section] = []
    for i, one in enumerate(reports):
        own = size_sections(one, f"{i + 1}-" if i else "") + recorded_evaluation(one, f"{i + 1}-" if i else "")
        name = "" if len(reports) == 1 else f" in {file_name(one['file'])}"
        sections += [replace(s, heading=f"{s.heading}{name}") for s in own]
    if report["measured"]:
        load = f"model = AutoModel.from_pretrained({report['folder']!r})"
        code = f"import cqr_compress\nfrom transformers import AutoModel\n\n{load}"
        neighbours = [*neighbours, Section("Load it", code=code)]
    return Page(
        title=file_name(report["folder"]),
        subtitle=f"compressed from {file_name(report['source'])}",
        summary=[*size_summary(reports[0]), f"{plural(len(report['copied']), 'other file')} copied."],
        stats=stats,
        sections=[*sections, *neighbours],
        footer=made_by(reports[0]),
    )


def checkpoint_page(report: Report, neighbours: list[Section], has_words: bool) -> Page:
    """Create the page of a dense checkpoint."""
    tables = sorted(report["tables"], key=lambda table: -table["nbytes"])
    total = report["file_bytes"]
    held = sum(table["nbytes"] for table in tables)
    named = tables[: len(SERIES) if len(tables) <= len(SERIES) else len(SERIES) - 1]
    shares = [Share(table["name"], SERIES[i], table["nbytes"]) for i, table in enumerate(named)]
    if others := tables[len(named) :]:
        shares.append(Share(f"{len(others)} smaller tables", SERIES[-1], sum(table["nbytes"] for table in others)))
    shares.append(Share("everything else", "rest", max(total - held, 0)))
    charts = [Chart("bytes", "Bytes of the file", lambda width: draw_bytes(shares, width))]
    estimated = [(t["name"], t["relative_mse_at_ratio"]) for t in tables if t["relative_mse_at_ratio"]]
    sections = [Section("Where the bytes are", charts=charts), _dense_tables(tables)]
    if any(error for _, errors in estimated for error in errors.values()):
        shown = estimated[: len(SERIES)]
        chart = Chart("estimates", "Estimated error by ratio", lambda width: draw_estimates(shown, width))
        lead = "A quick estimate on a sample of rows; the default method of convert has a lower error."
        sections.append(Section("What compression would cost", lead, [chart]))
    return Page(
        title=file_name(report["file"]),
        subtitle=f"{report['format']}, {plural(report['num_tensors'], 'tensor')}",
        summary=list(report["warnings"]),
        stats=[
            Stat("File", "", size(total), f"{total:,} bytes"),
            Stat("Embedding tables", "", plural(len(tables), "table"), share_of(held, total)),
        ],
        sections=sections,
        footer="Made by cqr-compress inspect.",
    )  # fmt: skip


def _dense_tables(tables: Sequence[Report]) -> Section:
    headings = ("bytes", "share", "zero rows", "equal rows", "effective rank")
    counts = ("zero_rows", "duplicate_rows", "effective_rank")
    rows = [
        Record(
            " = ".join((t["name"], *t["aliases"])),
            f"{dimensions(t['shape'])}, {t['dtype']}",
            [
                size(t["nbytes"]), percent(t["share"]),
                *("" if t[key] is None else f"{t[key]:,.0f}" for key in counts),
            ],
            f"{t['reason']} (confidence {t['confidence']:.2f})",
        )
        for t in tables
    ]  # fmt: skip
    return Section("Tables", "" if rows else "No embedding table found.", records=Records(headings, rows).filled())
