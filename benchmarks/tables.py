# SPDX-License-Identifier: Apache-2.0
"""Tables that are shown in a terminal and written as markdown, and how their numbers are written."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

MIB = 2**20


@dataclass(frozen=True)
class View:
    """A table of text; the first column is words, the others are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def rich(self) -> Table:
        table = Table(title=self.title, title_justify="left")
        for at, name in enumerate(self.columns):
            table.add_column(name, justify="right" if at else "left")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n"


def time_text(seconds: Sequence[float]) -> str:
    """The median with the half width of the middle half of the rounds, in the unit that fits."""
    middle, spread = statistics.median(seconds), 0.0
    if len(seconds) > 1:
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        spread = (high - low) / 2
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if middle * factor >= 1 or unit == "us":
            return f"{middle * factor:.3g} ± {float(f'{spread * factor:.1g}'):g} {unit}"
    raise AssertionError


def bytes_text(count: float) -> str:
    return f"{count / MIB:,.1f} MiB" if count >= MIB / 10 else f"{count / 1024:,.1f} KiB"


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' own ratios: what slows one round of a machine slows both."""
    return statistics.median(a / b for a, b in zip(times, base, strict=False))
