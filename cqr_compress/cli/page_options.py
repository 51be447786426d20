"""Options of the commands that write a page of their report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cqr_compress.cli.options import OUTPUT, given

HtmlOption = Annotated[
    Path | None,
    given(
        "--html", metavar="FILE", panel=OUTPUT,
        help="Write the report as a page with charts, in one file. Needs cqr-compress\\[report].",
    ),
]  # fmt: skip
PlotsOption = Annotated[
    Path | None, given("--plots", metavar="DIR", panel=OUTPUT, help="Write the page's charts as PNG and SVG.")
]
LabelsOption = Annotated[
    list[str] | None,
    given(
        "--labels", metavar="FILE", panel=OUTPUT,
        help="Names of ids, for nearest neighbours on the page: a name a line (.txt), tokenizer.json, or .csv "
        "(id,name); TABLE=FILE for one of several tables. Repeatable.",
    ),
]  # fmt: skip


def check_pages(
    html: Path | None,
    plots: Path | None,
    *,
    labels: Sequence[str] | None = None,
    original: Path | None = None,
    force: bool = False,
    reading: Sequence[Path] = (),
) -> None:
    """Check before any work is done that a page and charts can be written; see `commands.page.check_page`."""
    if labels:
        from cqr_compress.commands.labels import check_labels

        if html is None:
            raise typer.BadParameter("--labels are shown on the page: give --html FILE")
        if original is None:
            raise typer.BadParameter("--labels need --original, whose rows are compared")
        check_labels(labels, original)
    if html is not None or plots is not None:
        from cqr_compress.commands.page import check_page

        check_page(html, plots, force=force, reading=reading)


def write_pages(
    report: Mapping[str, Any],
    html: Path | None,
    plots: Path | None,
    *,
    original: Path | None = None,
    labels: Sequence[str] | None = None,
    frequencies: Sequence[str] | None = None,
    force: bool = False,
) -> None:
    """Write the page and the charts of a report's JSON, where they were asked for, and say so on stderr."""
    if html is None and plots is None:
        return
    from cqr_compress.commands.page import write_page
    from cqr_compress.progress import ProgressBars

    with ProgressBars() as progress:
        write_page(
            report, html, plots=plots, original=original, labels=labels or (), frequencies=frequencies or (),
            force=force, progress=progress,
        )  # fmt: skip
    for path in (html, plots):
        if path is not None:
            typer.echo(f"wrote {path}", err=True)
