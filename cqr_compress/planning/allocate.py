"""Divide the bytes of a file among its tables, so that the last byte of each lowers the error equally.

Points of bytes and error of each table, on their lower convex hull, are bought in the order of error saved for
each byte: the greedy solution of the Lagrangian (Shoham & Gersho 1988, doi:10.1109/29.90373).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class RatePoint:
    """A size of a table and the error at that size.

    Attributes:
        nbytes: bytes of the table.
        error: relative squared error; 0 of a dense table.
    """

    nbytes: float
    error: float


def refined(points: Sequence[RatePoint], parts: int = 8) -> list[RatePoint]:
    """Add points between those that were measured: the logarithm of an error falls about linearly with the bytes.

    Without them, one of two equal tables would get the bytes of a whole step before the other gets any.
    """
    found = list(points[:1])
    for before, after in itertools.pairwise(points):
        if 0 < after.error < before.error:
            for part in range(1, parts):
                share = part / parts
                nbytes = before.nbytes + share * (after.nbytes - before.nbytes)
                found.append(RatePoint(nbytes, before.error * (after.error / before.error) ** share))
        found.append(after)
    return found


def lower_hull(points: Sequence[RatePoint]) -> list[RatePoint]:
    """Return the points on the lower convex hull, in the order of their bytes, errors descending."""
    hull: list[RatePoint] = []
    for point in sorted(points):
        if hull and point.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def allocate_bytes(
    curves: Mapping[str, Sequence[RatePoint]], importance: Mapping[str, float], budget: float
) -> dict[str, float] | None:
    """Allocate bytes to tables.

    Args:
        curves: points of each table; the last one in bytes is the dense table.
        importance: factor on each table's error.
        budget: bytes of all tables.

    Returns:
        Bytes by table, on the hull or between two of its points; None if the smallest points exceed the budget.
        A table gets all bytes of its last point, or those of a point before.
    """
    hulls = {name: lower_hull(points) for name, points in curves.items()}
    given = {name: hull[0].nbytes for name, hull in hulls.items()}
    left = budget - sum(given.values())
    if left < 0:
        return None
    steps = [
        (-importance[name] * _slope(hull[0], hull[1]), name, 1) for name, hull in hulls.items() if len(hull) > 1
    ]
    heapq.heapify(steps)
    while steps and left > 0:
        _, name, index = heapq.heappop(steps)
        hull = hulls[name]
        is_last = index == len(hull) - 1
        cost = hull[index].nbytes - given[name]
        if cost <= left:
            given[name] = hull[index].nbytes
            left -= cost
            if not is_last:
                gain = -importance[name] * _slope(hull[index], hull[index + 1])
                heapq.heappush(steps, (gain, name, index + 1))
        elif not is_last:  # the dense table is all or nothing
            given[name] += left
            left = 0.0
    return given


def _slope(before: RatePoint, after: RatePoint) -> float:
    """Return the error saved by each byte, positive."""
    return (before.error - after.error) / (after.nbytes - before.nbytes)
