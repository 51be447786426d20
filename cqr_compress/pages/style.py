"""The look of charts: their colours, which follow those of the page, and their form as inline SVG and as files."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cqr_compress.errors import SpecError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "ink": ("#1c2024", "#e9ebee"),
    "muted": ("#59626c", "#a3acb7"),
    "line": ("#dfe3e8", "#2d333a"),
    "faint": ("#87909b", "#68727d"),
    "rest": ("#6a7480", "#8d97a3"),
    "surface": ("#fefefe", "#131619"),
    "panel": ("#f5f6f8", "#1b1f24"),
    "accent": ("#0a5fc2", "#6cb0ff"),
    "warm": ("#b3480b", "#ff9f5e"),
    "c1": ("#2c6bbd", "#6ea8f0"),
    "c2": ("#b6580f", "#eb9a57"),
    "c3": ("#347f50", "#6cc08b"),
    "c4": ("#7a57ad", "#b395e6"),
    "c5": ("#1d7b84", "#58bcc6"),
    "c6": ("#b24568", "#ea86a5"),
}
"""Colours by name, in light and dark: variables of the page's CSS. Charts are drawn in the light ones."""
SERIES = ("c1", "c2", "c3", "c4", "c5", "c6")
WIDE, NARROW = 760, 346
"""Widths of charts in CSS pixels, on a desktop and on a phone."""
_DPI_OF_FILES = 160
_SIZE = 12.0


def light(name: str) -> str:
    """Return the colour that charts are drawn in."""
    return COLOURS[name][0]


def require_report_extra() -> None:
    """Refuse to go on without the libraries that pages are made with.

    Raises:
        SpecError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise SpecError(
            f"pages and plots need {e.name}, which is not installed: pip install 'cqr-compress[report]'"
        ) from e


@contextmanager
def chart_style() -> Iterator[None]:
    """Context manager in which charts are drawn and saved; the caller's settings of matplotlib are kept apart."""
    import matplotlib

    ours: Any = {
        "svg.fonttype": "none", "svg.hashsalt": "cqr-compress", "text.parse_math": False,
        "font.family": ["sans-serif"], "font.sans-serif": ["DejaVu Sans"], "font.size": _SIZE,
        "axes.titlesize": _SIZE, "axes.labelsize": _SIZE, "xtick.labelsize": _SIZE - 0.5,
        "ytick.labelsize": _SIZE - 0.5, "legend.fontsize": _SIZE - 0.5,
        "text.color": light("ink"), "axes.labelcolor": light("muted"), "axes.edgecolor": light("faint"),
        "xtick.color": light("faint"), "ytick.color": light("faint"), "xtick.labelcolor": light("muted"),
        "ytick.labelcolor": light("muted"), "axes.facecolor": "none", "figure.facecolor": light("surface"),
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.grid": True,
        "axes.grid.axis": "y", "grid.color": light("line"), "grid.linewidth": 1.0, "axes.axisbelow": True,
        "axes.linewidth": 1.0, "xtick.major.size": 4, "ytick.major.size": 0, "xtick.minor.size": 0,
        "ytick.minor.size": 0, "lines.linewidth": 1.8, "legend.frameon": False, "axes.unicode_minus": True,
    }  # fmt: skip
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a browser has the font
        yield


def new_figure(width: int, height: int) -> tuple[Figure, Axes]:
    """Create a figure of a size in CSS pixels, with axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
    return figure, figure.subplots()


def inline_svg(figure: Figure, prefix: str, title: str) -> str:
    """Render a figure for an HTML page: colours are variables of its CSS, and ids begin with `prefix`."""
    import html

    text = _svg(figure)
    attributes = re.search(r'viewBox="[^"]*"', text)
    assert attributes is not None
    body = text[text.index(">") + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.S)
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = body.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    body = re.sub(r"font: (?:normal )*(\d+ )?([\d.]+)px [^;\"]*", _font, body)
    for name, (colour, _) in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    body = re.sub(r"\n\s*", "\n", body)
    return f'<svg {attributes[0]} role="img" aria-label="{html.escape(title)}">{body}'


def _font(found: re.Match[str]) -> str:
    weight = f"font-weight: {found[1].strip()}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}px"


def _svg(figure: Figure) -> str:
    held = io.StringIO()
    figure.savefig(held, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = held.getvalue()
    return text[text.index("<svg") :].strip()


def chart_files(figure: Figure) -> dict[str, bytes]:
    """Render a figure as files: content by suffix, .png and .svg."""
    found = {}
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None, "Creator": None})):
        held = io.BytesIO()
        figure.savefig(held, format=suffix[1:], dpi=_DPI_OF_FILES if suffix == ".png" else 72, metadata=metadata)
        found[suffix] = held.getvalue()
    return found
