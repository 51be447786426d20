"""Charts of runs of a task: metrics by bytes, and metrics by step of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cqr_compress.pages.curves import bytes_axis, columns, ring
from cqr_compress.pages.style import NARROW, light, new_figure
from cqr_compress.pages.text import dense_value, metric_of, number, sweep_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_sweep(report: Mapping[str, Any], width: int) -> Figure:
    """Draw the metric of a sweep by bytes of the file."""
    figure, axes = new_figure(width, 320)
    points, metric, dense = report["points"], report["metric"], dense_value(report)
    sign = -1 if report["mode"] == "max" else 1
    measured = [(p, v) for p in points if (v := sweep_value(p, metric)) is not None]
    for is_tuned, marker, label in ((False, "o", "converted"), (True, "D", "fine-tuned")):
        mine = sorted((p["file_bytes"], v) for p, v in measured if bool(p["finetuned"]) is is_tuned)
        if mine:
            colour = light("c4" if is_tuned else "c1")
            axes.plot(*columns(mine), "-", color=colour, linewidth=1.4)
            axes.plot(
                *columns(mine), marker, markersize=6.5, color=colour, markeredgecolor=light("surface"), label=label
            )  # fmt: skip
    if dense is not None:
        _dense_line(axes, dense)
        if report["max_loss"] is not None:
            least = dense + sign * abs(dense) * report["max_loss"]
            axes.axhspan(min(dense, least), max(dense, least), color=light("c3"), alpha=0.12, linewidth=0)
            axes.axhline(least, color=light("c3"), linewidth=1.2, label=f"allowed loss, to {number(least)}")
        for point, _ in measured:
            if point["interval"]:
                ends = [dense + sign * abs(dense) * end for end in point["interval"]]
                axes.plot([point["file_bytes"]] * 2, ends, color=light("faint"), linewidth=1.4, zorder=1.5)
    chosen = None if report["chosen"] is None else points[report["chosen"]]
    if chosen is not None and (value := sweep_value(chosen, metric)) is not None:
        ring(axes, chosen["file_bytes"], value, label=f"chosen, {chosen['ratio']:g}×", hollow=True)
    for point, value in measured:  # below a curve that rises, and above one that falls
        axes.annotate(
            f"{point['ratio']:g}×", (point["file_bytes"], value), (10, -15 if sign < 0 else 7), fontsize=11,
            textcoords="offset points", color=light("muted"),
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(0.07 if width > NARROW else 0.12, 0.14)
    bytes_axis(axes, [point["file_bytes"] for point, _ in measured], width)
    _title(axes, report)
    figure.legend(loc="outside lower left", ncols=2 if width <= NARROW else 5, handlelength=1.6, columnspacing=1.4)
    return figure


def _dense_line(axes: Axes, dense: float) -> None:
    label = f"dense {number(dense)}"
    axes.axhline(dense, color=light("ink"), linewidth=1.2, linestyle=(0, (4, 2)), label=label)


def _title(axes: Axes, report: Mapping[str, Any]) -> None:
    better = "higher is better" if report["mode"] == "max" else "lower is better"
    axes.set_title(f"{report['metric']} ({better})", loc="left", color=light("muted"))


_STAGES = {
    "as given": ("s", "ink"),
    "refit": ("^", "c3"),
    "reassigned": ("D", "c4"),
    "trained": ("o", "c1"),
}


def draw_history(report: Mapping[str, Any], width: int) -> Figure:
    """Draw the metric by step of fine-tuning, with the stages, the dense model and the written weights."""
    figure, axes = new_figure(width, 300)
    metric, history = report["metric"], report["history"]
    axes.plot(*columns((e["step"], e["metrics"][metric]) for e in history), color=light("faint"), linewidth=1.2)
    for stage in dict.fromkeys(e["stage"] for e in history):
        marker, colour = _STAGES.get(stage, ("o", "c5"))
        mine = [(e["step"], e["metrics"][metric]) for e in history if e["stage"] == stage]
        axes.plot(
            *columns(mine), marker, markersize=6.5, color=light(colour), markeredgecolor=light("surface"),
            label=stage,
        )  # fmt: skip
    dense = metric_of(report["dense"], metric)
    if dense is not None:
        _dense_line(axes, dense)
    written = report["after"][metric]
    ring(axes, report["best_step"], written, label=f"written {number(written)}", hollow=True)
    _title(axes, report)
    axes.set_xlabel("optimizer step")
    axes.margins(0.05, 0.12)
    figure.legend(loc="outside lower left", ncols=2 if width <= NARROW else 6, handlelength=1.6, columnspacing=1.4)
    return figure
