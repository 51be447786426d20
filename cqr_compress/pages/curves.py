"""Charts of errors by bytes, and what charts of curves share: axes of bytes and errors, and marked points."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cqr_compress.pages.style import NARROW, SERIES, WIDE, light, new_figure
from cqr_compress.pages.text import finite_points, shorten, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_REACH = 4.0
"""The bound is drawn from the smallest size / this to the largest size times this."""


def draw_rate_distortion(curves: Mapping[str, Any], chosen: tuple[float, float] | None, width: int) -> Figure:
    """Draw a table's error by bytes: the chosen layout, those that were tried, the curve and the bound."""
    figure, axes = new_figure(width, 270)
    trials, curve, bound = (finite_points(curves.get(key) or ()) for key in ("trials", "curve", "bound"))
    near = [nbytes for nbytes, _ in (*trials, *curve, *([chosen] if chosen else []))]
    if near:  # the part of the bound that the points can be compared with
        bound = [point for point in bound if min(near) / _REACH <= point[0] <= max(near) * _REACH]
    if bound:
        axes.plot(*columns(bound), color=light("faint"), linestyle=(0, (4, 2)), label="rate-distortion bound")
    if curve:
        axes.plot(*columns(curve), color=light("c1"), label="measured")
    if trials:
        axes.plot(
            *columns(trials), "o", markersize=4.5, markerfacecolor="none", markeredgecolor=light("muted"),
            label="tried",
        )  # fmt: skip
    if chosen is not None and chosen[1] > 0:
        ring(axes, *chosen, label="chosen")
    axes.set_yscale("log")
    axes.set_xscale("log")
    bytes_axis(axes, [*near, *(nbytes for nbytes, _ in bound)], width)
    error_axis(axes)
    axes.set_title("relative MSE", loc="left", color=light("muted"))
    figure.legend(loc="outside lower left", ncols=2 if width < WIDE else 4, handlelength=1.6, columnspacing=1.4)
    return figure


def draw_estimates(tables: Sequence[tuple[str, Mapping[str, float | None]]], width: int) -> Figure:
    """Draw the estimated relative MSE of tables by ratio."""
    figure, axes = new_figure(width, 280)
    ratios = sorted({int(ratio) for _, errors in tables for ratio in errors})
    for i, (name, errors) in enumerate(tables):
        points = [(int(ratio), error) for ratio, error in errors.items() if error is not None and error > 0]
        if points:
            axes.plot(*columns(points), "o-", markersize=5, color=light(SERIES[i]), label=shorten(name, 40))
    axes.set_yscale("log")
    axes.set_xscale("log")
    axes.set_xticks(ratios, [f"{ratio}×" for ratio in ratios])
    axes.minorticks_off()
    axes.set_xlabel("ratio of the table's bytes")
    error_axis(axes)
    axes.set_title("relative MSE, estimated", loc="left", color=light("muted"))
    figure.legend(loc="outside lower left", ncols=1 if width <= NARROW else 2, handlelength=1.4)
    return figure


def columns(points: Iterable[Sequence[float]]) -> tuple[list[float], list[float]]:
    rows = list(points)
    return [row[0] for row in rows], [row[1] for row in rows]


def ring(axes: Axes, x: float, y: float, label: str, hollow: bool = False) -> None:
    """Mark a point."""
    axes.plot(
        [x], [y], "o", markersize=13 if hollow else 9, markeredgewidth=2 if hollow else 1.5, label=label,
        markerfacecolor="none" if hollow else light("warm"),
        markeredgecolor=light("warm" if hollow else "surface"),
        zorder=4,
    )  # fmt: skip


def bytes_axis(axes: Axes, values: Sequence[float], width: int) -> None:
    """Label a logarithmic axis of bytes at powers of two."""
    low, high = min(values, default=1), max(values, default=1)
    low, high = max(low, 1), max(high, low, 1)
    most = 3 if width <= NARROW else 6
    ticks = [2.0**i for i in range(64) if low / 1.15 <= 2**i <= high * 1.15]
    ticks = ticks[:: max(1, -(-len(ticks) // most))] or [low]
    axes.set_xticks(ticks, [re.sub(r"\.0+(?!\d)", "", size(tick)) for tick in ticks])
    axes.xaxis.minorticks_off()


def error_axis(axes: Axes) -> None:
    """Label a logarithmic axis of errors in decimals."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (
        (1.0,)
        if high / max(low, 1e-300) > 300
        else (1.0, 3.0)
        if high / max(low, 1e-300) > 20
        else (1, 2, 3, 5, 7)
    )
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
