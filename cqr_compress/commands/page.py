"""Write the page and the charts of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from cqr_compress.checkpoint.output_files import atomic_file, check_outputs, output_errors
from cqr_compress.commands.export_vectors import is_word_vectors
from cqr_compress.commands.labels import Labels
from cqr_compress.commands.nearest import nearest_rows
from cqr_compress.errors import OutputError, OutputExistsError
from cqr_compress.pages.page import render_page, render_plots
from cqr_compress.pages.style import require_report_extra
from cqr_compress.planning.frequencies import Frequencies
from cqr_compress.progress import Progress

_SUFFIXES = (".html", ".htm")


class Report(Protocol):
    """A report of this package, such as `SizeReport`."""

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""


def write_page(
    report: Report | Mapping[str, Any],
    html: str | Path | None = None,
    *,
    plots: str | Path | None = None,
    original: str | Path | None = None,
    labels: Labels = (),
    frequencies: Frequencies = (),
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the page of a report as one self-contained HTML file, and its charts as PNG and SVG.

        report = cqr.convert("ckpt.pt", "small.safetensors", ratio=16)
        cqr.write_page(report, "report.html", plots="plots", original="ckpt.pt", labels="vocab.txt")

    It needs `pip install 'cqr-compress[report]'`. The page of a report is the same at each writing.

    Args:
        report: what `convert`, `convert_folder`, `inspect`, `sweep`, `evaluate` or `finetune` returned, or
            the JSON object of it.
        html: the page to write, or None.
        plots: folder for the charts, which is created; or None.
        original: the dense checkpoint; with it, the page of a compressed file shows the nearest rows of sampled
            ids before and after, if the ids have names.
        labels: files with names of ids, see `read_labels`; files of word vectors have their own.
        frequencies: counts of the ids: the sampled ids are frequent ones.
        force: replace an existing page, and charts in an existing folder.
        progress: receives the progress of the work; if None, bars if stderr is a terminal.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
        OutputExistsError: a file exists, and `force` is False.
        OutputError: a file cannot be written.
        CqrCompressError: files that cannot be read, or do not match.
    """
    check_page(html, plots, force=force)
    values = report if isinstance(report, Mapping) else report.to_json()
    if html is not None:
        compressed = _compressed_file(values)
        has_words = compressed is not None and Path(compressed).exists() and is_word_vectors(compressed)
        neighbours = []
        if compressed is not None and original is not None and (labels or has_words):
            neighbours = nearest_rows(original, compressed, labels, frequencies, progress=progress)
        page = render_page(values, neighbours, has_words)
        with atomic_file(Path(html)) as file:
            file.write(page.encode())
    if plots is not None:
        folder = Path(plots)
        with output_errors(folder):
            folder.mkdir(exist_ok=True)
        for name, content in render_plots(values).items():
            with atomic_file(folder / name) as file:
                file.write(content)


def check_page(
    html: str | Path | None, plots: str | Path | None, *, force: bool = False, reading: Sequence[Path] = ()
) -> None:
    """Check before any work is done that a page and charts can be written.

    Args:
        html: the page to write, or None.
        plots: folder for the charts, or None.
        force: whether an existing page, and files in an existing folder, may be replaced.
        reading: files that are read, which must not be replaced.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
        OutputExistsError: the page exists, or the folder has files, and `force` is False.
        OutputError: the page is not named .html, or its folder does not exist.
    """
    if html is None and plots is None:
        return
    require_report_extra()
    if html is not None:
        if Path(html).suffix.lower() not in _SUFFIXES:
            raise OutputError(
                f"{str(html)!r} is to be a page: give a file that ends with {' or '.join(_SUFFIXES)}"
            )
        check_outputs([Path(html)], force, reading)
    if plots is not None:
        folder = Path(plots)
        if html is not None and folder.resolve() == Path(html).resolve():
            raise OutputError(f"{str(folder)!r} is the page: give another folder for the charts")
        if folder.exists() and not folder.is_dir():
            raise OutputError(f"{str(folder)!r} is a file: give a folder for the charts")
        if folder.is_dir() and any(folder.iterdir()) and not force:
            raise OutputExistsError(f"{str(folder)!r} already has files. Pass --force to write charts to it.")
        if not folder.is_dir() and not folder.parent.is_dir():
            raise OutputError(
                f"no such folder: {str(folder.parent)!r}, to write {folder.name!r} to. Create it first."
            )


def _compressed_file(report: Mapping[str, Any]) -> str | None:
    """Return the compressed file that a report is of, or None if it is of none, of several, or of a plan."""
    kind = report.get("kind")
    if kind == "size_report":
        return str(report["file"]) if report["measured"] else None
    if kind == "evaluation_report":
        return str(report["files"][0]["file"]) if len(report["files"]) == 1 else None
    if kind == "folder_report":
        return _compressed_file(report["reports"][0]) if len(report["reports"]) == 1 else None
    return _compressed_file(report.get({"tuning_report": "size"}.get(str(kind), "report")) or {}) if kind else None
