# SPDX-License-Identifier: Apache-2.0
"""Pictures of what the benchmarks measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from benchmarks.curves import AXES, curve, slope
from benchmarks.store import Row
from benchmarks.tables import MIB

OURS, OTHERS, FLOOR = "#0072b2", "#8c8c8c", "#e69f00"


def draw_peers(rows: list[Row], title: str, path: Path) -> None:
    """Time and memory of a training step, a row of bars for each shape and dtype."""
    rows = [r for r in rows if r["mode"] == "train" and r["seconds"]]
    groups = list(dict.fromkeys((r["shape"], r["dtype"]) for r in rows))
    figure, axes = subplots(len(groups))
    for (left, right), group in zip(axes, groups, strict=True):
        chosen = [r for r in rows if (r["shape"], r["dtype"]) == group]
        names = [r["implementation"] for r in chosen]
        times = [statistics.median(r["seconds"]) * 1e3 for r in chosen]
        memory = [(r["peak"] - r["gradients"]) / MIB for r in chosen]
        bars(left, names, times, f"{', '.join(group)}: forward and backward, ms", labels=True)
        bars(right, names, memory, "memory beyond the gradients, MiB", labels=False)
    save(figure, title, path)


def subplots(rows: int) -> Any:
    """A figure with two axes in each of its rows."""
    return _pyplot().subplots(rows, 2, figsize=(11, 2.6 * rows), squeeze=False, layout="constrained")


def bars(axis: Any, names: list[str], values: list[float], title: str, labels: bool) -> None:
    """A bar for each name, with its value."""
    at = range(len(names))
    drawn = axis.barh(at, values, color=[_colour(n) for n in names])
    axis.bar_label(drawn, [f"{v:,.0f}" if v >= 100 else f"{v:.3g}" for v in values], padding=3, fontsize=8)
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_yticks(at, names if labels else [""] * len(names), fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.spines[["top", "right"]].set_visible(False)


def draw_scaling(rows: list[Row], title: str, path: Path) -> None:
    """Time and memory against N and V, on log axes, with the slopes."""
    figure, axes = _pyplot().subplots(2, 2, figsize=(10, 7), layout="constrained")
    for column, (axis, label) in enumerate(AXES.items()):
        for line, (what, unit, factor) in enumerate((("time", "s", 1.0), ("memory", "MiB beyond the gradients", MIB))):
            plot = axes[line][column]
            for name in dict.fromkeys(r["implementation"] for r in rows):
                points = curve(rows, axis, name, what)
                if not points or any(y <= 0 for _, y in points):
                    continue
                xs, ys = [x for x, _ in points], [y / factor for _, y in points]
                plot.loglog(
                    xs, ys, marker="o", markersize=4, label=f"{name}: slope {slope(points):.2f}", color=_line(name)
                )
            plot.set(xlabel=label, ylabel=unit, title=f"{what} with {label}")
            plot.grid(alpha=0.25, which="both")
            plot.legend(fontsize=8)
    save(figure, title, path)


def draw_programs(found: dict[str, Any], title: str, path: Path) -> None:
    """Time and memory of losses of the rows, a row of bars for each."""
    figure, axes = subplots(len(found))
    for (left, right), (loss, measured) in zip(axes, found.items(), strict=True):
        names = list(measured["seconds"])
        times = [statistics.median(measured["seconds"][name]) for name in names]
        bars(left, names, times, f"{loss}: forward and backward, s", labels=True)
        bars(
            right,
            names,
            [measured["peaks"][name] / MIB for name in names],
            "memory beyond the gradients, MiB",
            labels=False,
        )
    save(figure, title, path)


def save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)


def _colour(name: str) -> str:
    return OURS if name.startswith("cce") else FLOOR if "product" in name else OTHERS


def _line(name: str) -> str | None:
    return _colour(name) if name == "cce_fx" or "product" in name else None


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")  # no display is needed to write a file
    import matplotlib.pyplot as plt

    return plt
