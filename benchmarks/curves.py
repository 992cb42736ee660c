# SPDX-License-Identifier: Apache-2.0
"""Curves of time and memory against a size, from the rows of `scaling`, and their slopes on log axes."""

from __future__ import annotations

import math

from benchmarks.store import Row

AXES = {"n": "tokens N", "v": "vocabulary V"}


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through (log x, log y); NaN with fewer than two points or a y that is not positive."""
    if len(points) < 2 or any(y <= 0 for _, y in points):
        return math.nan
    xs, ys = ([math.log(p[at]) for p in points] for at in (0, 1))
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def curve(rows: list[Row], axis: str, name: str, what: str) -> list[tuple[float, float]]:
    """(size, value) of one implementation along an axis: `what` is "time", in the best of the rounds, or "memory"."""
    found = [r for r in rows if r["axis"] == axis and r["implementation"] == name and r["seconds"]]
    value = (lambda r: min(r["seconds"])) if what == "time" else (lambda r: r["peak"] - r["gradients"])
    return sorted((r[axis], value(r)) for r in found)
