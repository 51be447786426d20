"""Sections of a size report: bytes, tables, rate-distortion curves, other tensors, and how to load the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cqr_compress.pages.bars import Share, draw_bytes
from cqr_compress.pages.curves import draw_rate_distortion
from cqr_compress.pages.elements import Chart, Record, Records, Section
from cqr_compress.pages.headline import model_bytes
from cqr_compress.pages.style import SERIES
from cqr_compress.pages.text import (
    finite_points,
    number,
    percent,
    plural,
    size,
)

_SHOWN_CURVES = 12
_SHOWN_NAMES = 8
Report = Mapping[str, Any]


def size_sections(report: Report, prefix: str = "") -> list[Section]:
    """Return the sections of a size report; `prefix` begins the names of its charts."""
    return [
        section
        for section in (
            bytes_section(report, prefix), tables_section(report), curves_section(report, prefix),
            rest_section(report),
        )
        if section is not None
    ]  # fmt: skip


def bytes_section(report: Report, prefix: str) -> Section:
    """Return the section on where the bytes were and are."""
    before, after = model_bytes(report)
    tables = sorted(report["tables"], key=lambda table: -table["bytes_before"])
    named = len(SERIES) if len(tables) <= len(SERIES) else len(SERIES) - 1
    shares = [
        Share(table["name"], SERIES[i], table["bytes_before"], table["bytes_after"])
        for i, table in enumerate(tables[:named])
    ]
    if others := tables[named:]:
        sums = [sum(table[key] for table in others) for key in ("bytes_before", "bytes_after")]
        shares.append(Share(f"{len(others)} smaller tables", SERIES[named], sums[0], sums[1]))
    rest = max(before - report["tables_bytes_before"], 0), max(after - report["tables_bytes_after"], 0)
    if any(rest):
        shares.append(Share("everything else", "rest", *rest))
    share = report["tables_bytes_before"] / max(before, 1)
    kept = f"The tables were {percent(share)} of the model"
    lead = f"{kept}, and are {percent(report['tables_bytes_after'] / max(after, 1))} of the file."
    chart = Chart(f"{prefix}bytes", "Bytes before and after", lambda width: draw_bytes(shares, width))
    return Section("Where the bytes are", lead, [chart])


_QUALITY = ("relative_mse", "weighted_relative_mse", "mean_cosine", "recall_at_10")
_HEADINGS = ("before", "after", "ratio", "relative MSE", "weighted MSE", "mean cosine", "recall@10")


def tables_section(report: Report) -> Section | None:
    """Return the section with a row for each table."""
    rows = [
        Record(
            " = ".join((table["name"], *table["aliases"])),
            f"{dimensions(table['shape'])}, {table['method']} {table['layout']}",
            [
                size(table["bytes_before"]), size(table["bytes_after"]), f"{table['ratio_bytes']:.3g}×",
                *("" if table.get(key) is None else number(table[key]) for key in _QUALITY),
            ],
            table["reason"],
        )
        for table in report["tables"]
    ]  # fmt: skip
    for left in report["left_dense"]:
        detail = f"{dimensions(left['shape'])}, left dense"
        rows.append(Record(left["name"], detail, [""] * len(_HEADINGS), left["reason"]))
    return Section("Tables", records=Records(_HEADINGS, rows).filled()) if rows else None


def dimensions(shape: Sequence[int]) -> str:
    """Format the shape of a table."""
    return " × ".join(f"{length:,}" for length in shape)


def curves_section(report: Report, prefix: str) -> Section | None:
    """Return the section of the rate-distortion curves, if they were recorded."""
    recorded = report.get("rate_distortion") or {}
    charts: list[Chart] = []
    for table in sorted(report["tables"], key=lambda table: -table["bytes_before"]):
        curves = recorded.get(table["name"]) or {}
        if not any(finite_points(curves.get(key) or ()) for key in ("trials", "curve", "bound")):
            continue
        weighted = table.get("weighted_relative_mse")  # as the errors of the trials are, where rows have weights
        error = table["relative_mse"] if weighted is None else weighted
        chosen = None if error is None else (table["bytes_after"], error)
        caption = f"Chosen: {table['method']} {table['layout']}, {size(table['bytes_after'])}."

        def draw(width: int, curves: Any = curves, chosen: Any = chosen) -> Any:
            return draw_rate_distortion(curves, chosen, width)

        name = f"{prefix}rate-distortion-{len(charts) + 1}-{slug(table['name'])}"
        charts.append(Chart(name, table["name"], draw, caption, wide=False))
    if not charts:
        return None
    if len(charts) == 1:
        charts = [replace(charts[0], wide=True)]
    left_out = len(charts) - _SHOWN_CURVES
    lead = (
        "Relative MSE by bytes of the table, both on logarithmic axes, of weighted rows where rows have weights; "
        "lower and further left is better. The bound is that of Gaussian rows of the same covariance: rows of "
        "clusters can be below it."
    )
    notes = [f"{plural(left_out, 'smaller table')} not shown."] if left_out > 0 else []
    return Section("Rate and distortion", lead, charts[:_SHOWN_CURVES], notes=notes)


def slug(name: str) -> str:
    """Make a name for files of letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())[-40:].strip("-") or "table"


def rest_section(report: Report) -> Section | None:
    """Return the section on the tensors outside the tables, if they were changed."""
    rest = report.get("rest")
    if rest is None:
        return None
    before, after, dtype = rest["bytes_before"], rest["bytes_after"], rest["dtype"]
    narrowed = sum(len(names) for names in rest["narrowed"].values())
    lead = f"{plural(narrowed, 'tensor')} stored in {dtype}: {size(before)} → {size(after)} in all."
    kept = [f"{name} keeps its dtype: {reason}" for name, reason in rest["kept"].items()]
    if len(kept) > _SHOWN_NAMES:
        kept = [*kept[:_SHOWN_NAMES], f"and {len(kept) - _SHOWN_NAMES} more"]
    return Section("Other tensors", lead, notes=kept)


def load_section(report: Report, has_words: bool) -> Section:
    """Return the section with the code that loads the file."""
    load = f"vectors = cqr.load_vectors({report['file']!r})" if has_words else (
        f"cqr.load_compressed(model, {report['file']!r})"
    )  # fmt: skip
    return Section("Load it", code=f"import cqr_compress as cqr\n\n{load}")
