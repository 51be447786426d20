"""Bar charts: bytes of a model by table, and errors by frequency of ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cqr_compress.pages.style import NARROW, light, new_figure
from cqr_compress.pages.text import number, percent, shorten, size, times

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LETTER = 6.6
"""Mean width of a letter in pixels."""
_BAR = 0.46


@dataclass(frozen=True)
class Share:
    """A part of a model: its name, its colour, and its bytes before and after (None before a conversion)."""

    name: str
    colour: str
    before: int
    after: int | None = None


def draw_bytes(shares: Sequence[Share], width: int) -> Figure:
    """Draw stacked bars of the bytes before and after, and of those after at the width of the chart."""
    totals = [sum(share.before for share in shares)]
    heights = ["before"]
    if all(share.after is not None for share in shares):
        totals.append(sum(share.after or 0 for share in shares))
        heights.append("after")
    enlarged = len(totals) == 2 and totals[1] < 0.6 * totals[0]
    num_bars = len(totals) + enlarged
    columns = 1 if width <= NARROW else 3
    lines = -(-len(shares) // columns)
    figure, axes = new_figure(width, 22 + 58 * num_bars + 22 * lines)
    top = num_bars - 1
    _stack(axes, top, [(s.name, s.colour, s.before) for s in shares], totals[0], width)
    _label(axes, top, "before" if len(totals) == 2 else "in the file", size(totals[0]))
    if len(totals) == 2:
        after = [(s.name, s.colour, s.after or 0) for s in shares]
        _stack(axes, top - 1, after, totals[0], width)
        _label(
            axes, top - 1, "after, at the same scale", f"{size(totals[1])}, {times(totals[0], totals[1])} smaller"
        )
        if enlarged:
            _stack(axes, 0, after, totals[1], width)
            _label(axes, 0, "after, enlarged", "")
            low, high = 1 - _BAR / 2, _BAR / 2
            for at in ((0, 0), (totals[1] / totals[0], 1)):
                axes.plot(at, (low, high), color=light("faint"), linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set(xlim=(0, 1), ylim=(-_BAR / 2 - 0.02, top + 0.62))
    axes.set_axis_off()
    handles = [_patch(s.colour, f"{shorten(s.name, 44 if columns == 1 else 30)}") for s in shares]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, handlelength=0.9, handleheight=0.9,
        columnspacing=1.6, handletextpad=0.6, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def _patch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=light(colour), label=label)


def _stack(axes: Axes, y: float, parts: Sequence[tuple[str, str, int]], total: int, width: int) -> None:
    left = 0.0
    for name, colour, nbytes in parts:
        share = nbytes / max(total, 1)
        axes.barh(y, share, _BAR, left=left, color=light(colour), edgecolor=light("surface"), linewidth=1.0)
        label = f"{shorten(name, 28)}  {size(nbytes)}"
        for text in (label, size(nbytes)):
            if (len(text) + 2) * _LETTER < share * width:
                axes.text(left + 8 / width, y, text, va="center", color=light("surface"), fontsize=11.5)
                break
        left += share


def _label(axes: Axes, y: float, text: str, detail: str) -> None:
    at = y + _BAR / 2 + 0.08
    axes.text(0, at, text, va="bottom", color=light("muted"))
    axes.text(1, at, detail, va="bottom", ha="right", color=light("ink"), fontweight="bold")


def draw_bands(bands: Sequence[Mapping[str, Any]], width: int) -> Figure:
    """Draw relative MSE and mean cosine of bands of frequency, side by side, or one above the other on a phone."""
    from matplotlib.figure import Figure

    narrow = width <= NARROW
    panels = [("relative_mse", "relative MSE", "c2"), ("mean_cosine", "mean cosine", "c1")]
    each = 44 * len(bands) + 34
    figure = Figure(figsize=(width / 72, each * (2 if narrow else 1) / 72), dpi=72)
    figure.set_layout_engine("constrained", wspace=0.06, hspace=0.06)
    grid = figure.subplots(2 if narrow else 1, 1 if narrow else 2, squeeze=False).flatten()
    for axes, (key, title, colour) in zip(grid, panels, strict=True):
        values = [band.get(key) for band in bands]
        most = 1.0 if key == "mean_cosine" else max([v for v in values if v is not None] or [1.0]) or 1.0
        for i, (band, value) in enumerate(zip(bands, values, strict=True)):
            y = -float(i)
            axes.barh(y - 0.14, most, 0.26, color=light("line"))
            axes.barh(y - 0.14, value or 0, 0.26, color=light(colour))
            axes.text(0, y + 0.1, band["name"], va="bottom", color=light("muted"))
            axes.text(most, y + 0.1, number(value), va="bottom", ha="right", fontweight="bold")
        axes.set(xlim=(0, most), ylim=(-len(bands) + 0.62, 0.55))
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set_axis_off()
    return figure


def share_of(nbytes: int, total: int) -> str:
    """Format bytes with their share of a total."""
    return f"{size(nbytes)} ({percent(nbytes / max(total, 1))})"
