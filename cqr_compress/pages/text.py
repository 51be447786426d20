"""Numbers and names of reports as text of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

NOTHING = "–"
"""Stands for a value that was not measured."""
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def clean(value: Any) -> Any:
    """Escape, in all strings of a JSON value, what a page must not hold.

    That is control characters, marks that reorder text, and lone surrogates.
    """
    if isinstance(value, str):
        return "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in value
        )
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def shorten(name: str, length: int) -> str:
    """Keep the end of a name, which tells tensors of one model apart."""
    return name if len(name) <= length else f"…{name[1 - length :]}"


def abbreviated(text: str, length: int = 80) -> str:
    """Keep the beginning of a text, such as the title of an item."""
    return text if len(text) <= length else f"{text[: length - 1]}…"


def file_name(path: object) -> str:
    """Return the last part of a path."""
    return PurePath(str(path)).name or str(path)


def size(nbytes: float) -> str:
    """Format bytes in binary units, such as 1.50 MiB, with a space that does not break."""
    value, unit = float(nbytes), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    if unit == 0:
        return f"{value:.0f}\N{NO-BREAK SPACE}B"
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}\N{NO-BREAK SPACE}{_UNITS[unit]}"


def number(value: float | None, digits: int = 4) -> str:
    """Format an error, a cosine or a metric with four significant digits below 1, and five from there on."""
    if value is None or not math.isfinite(value):
        return NOTHING if value is None else str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:#.{digits + (abs(value) >= 1)}g}".removesuffix(".")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_SUPERSCRIPTS)}"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def times(before: float, after: float) -> str:
    """Format a ratio, such as 15.6×."""
    ratio = before / max(after, 1)
    return f"{ratio:.3g}×" if ratio < 1000 else f"{ratio:,.0f}×"


def percent(share: float) -> str:
    """Format a share that may be small, such as 0.08%; with the sign of a negative one."""
    value = 100 * share
    digits = 0 if abs(value) > 9.95 else 1 if abs(value) > 0.995 else 2
    return f"{value:.{digits}f}%".replace("-", "−")


def plural(count: int, noun: str) -> str:
    """Format a count with its noun."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def finite_points(points: Iterable[Iterable[Any]]) -> list[tuple[float, float]]:
    """Return the pairs at the ends of rows, (bytes, error), that a logarithmic axis can show, by bytes."""
    found = []
    for row in points:
        *_, nbytes, error = row
        if nbytes is not None and error is not None and math.isfinite(error) and error > 0 and nbytes > 0:
            found.append((float(nbytes), float(error)))
    return sorted(found)


RECALL = "recall@10"
"""Metric of a sweep without a task: that of rows, which is 1 for the dense ones."""


def sweep_value(point: Mapping[str, Any], metric: str) -> float | None:
    """Return what a sweep compares: the metric of a point."""
    value: float | None = (point["metrics"] or {RECALL: point["recall_at_10"]}).get(metric)
    return value


def dense_value(report: Mapping[str, Any]) -> float | None:
    """Return the metric of the dense model of a sweep, if it is known."""
    return (
        1.0
        if report["metric"] == RECALL and report["dense"] is None
        else metric_of(report["dense"], report["metric"])
    )


def change_for_the_worse(metric: float, dense: float, mode: str) -> float | None:
    """Compute the relative change of a metric for the worse; None against 0."""
    if not dense or not (math.isfinite(metric) and math.isfinite(dense)):
        return None
    return (dense - metric if mode == "max" else metric - dense) / abs(dense)


def metric_of(values: Mapping[str, float] | None, name: str | None) -> float | None:
    """Return a metric by its name, or None."""
    return None if values is None or name is None else values.get(name)
