"""The page of a report: its JSON as one self-contained HTML file, and its charts as PNG and SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

from cqr_compress.errors import FormatError, brief
from cqr_compress.pages.elements import Chart, Page, Section
from cqr_compress.pages.evaluation_sections import neighbours_section
from cqr_compress.pages.run_pages import evaluation_page, sweep_page, tuning_page
from cqr_compress.pages.size_pages import checkpoint_page, folder_page, size_page
from cqr_compress.pages.style import (
    COLOURS,
    NARROW,
    WIDE,
    chart_files,
    chart_style,
    inline_svg,
    require_report_extra,
)
from cqr_compress.pages.text import clean

Report = Mapping[str, Any]
_HALF = 372


def render_page(report: Report, neighbours: Sequence[Report] = (), has_words: bool = False) -> str:
    """Render the page of a report.

    Args:
        report: JSON object of a report, with its "kind".
        neighbours: nearest rows of tables, see `commands.nearest.nearest_rows`.
        has_words: whether the file has word vectors, which are loaded by words.

    Returns:
        HTML without references to other files.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
        FormatError: an unknown kind of report.
    """
    require_report_extra()
    import jinja2

    page = page_of(report, neighbours, has_words)
    charts = [chart for section in page.sections for chart in section.charts]
    with chart_style():
        drawn = {chart.name: _inline(chart) for chart in charts}
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        resources.files("cqr_compress.pages").joinpath("template.html").read_text("utf-8")
    )
    return template.render(page=page, drawn=drawn, colours=COLOURS) + "\n"


def _inline(chart: Chart) -> list[tuple[str, str]]:
    """Draw a chart at the widths of a desktop and of a phone: pairs of CSS class and SVG."""
    forms = [("wide", WIDE), ("narrow", NARROW)] if chart.wide else [("half", _HALF)]
    return [(form, inline_svg(chart.draw(width), f"{chart.name}-{form}", chart.title)) for form, width in forms]


def render_plots(report: Report) -> dict[str, bytes]:
    """Render the charts of a report as files: content by name, such as bytes.png and bytes.svg.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
        FormatError: an unknown kind of report.
    """
    require_report_extra()
    found: dict[str, bytes] = {}
    with chart_style():
        for section in page_of(report).sections:
            for chart in section.charts:
                files = chart_files(chart.draw(WIDE if chart.wide else _HALF))
                found |= {f"{chart.name}{suffix}": content for suffix, content in files.items()}
    return found


def page_of(report: Report, neighbours: Sequence[Report] = (), has_words: bool = False) -> Page:
    """Create the page of a report from its JSON object."""
    kinds: dict[Any, Callable[[Report, list[Section], bool], Page]] = {
        "size_report": size_page,
        "folder_report": folder_page,
        "evaluation_report": evaluation_page,
        "tuning_report": tuning_page,
        "sweep_report": sweep_page,
        "checkpoint_report": checkpoint_page,
    }
    report, neighbours = clean(report), clean(neighbours)
    make = kinds.get(report.get("kind"))
    if make is None:
        raise FormatError(
            f"a report of kind {brief(report.get('kind'))} has no page: give one of {', '.join(kinds)}"
        )
    return make(report, [neighbours_section(found) for found in neighbours], has_words)
