"""How large the tiles are, given the bytes that may be held beyond the results."""

from __future__ import annotations

from dataclasses import dataclass

from .combine import statistics_dtype
from .rows import Rows
from .spec import Needs, Problem

DEFAULT_WORKSPACE = 16 << 20
_TILE = 1 << 18  # elements of a tile that stays in cache between its operations
_FEWEST_HELD_ROWS = 16


@dataclass(frozen=True)
class Plan:
    """Tile sizes of one problem."""

    rows: int  # rows of hidden in a block that is swept chunk by chunk
    columns: int  # columns of the vocabulary in a chunk of such a block
    held_rows: int  # rows whose logits over the whole vocabulary are held at a time; 0 where too few fit
    held_columns: int


def make_plan(problem: Problem, rows: Rows, needs: Needs = Needs()) -> Plan:
    """Tile sizes for `rows` of `problem`; at the least 16 rows by 64 columns, whatever the workspace."""
    n, (classes, width) = max(rows.count, 1), problem.weight.shape
    budget = elements(problem)
    converts = problem.hidden.dtype != statistics_dtype(problem.hidden.dtype)
    tiles = 2 if problem.epilogue.softcap is not None else 1
    # Copies beside a tile, in units of its rows or columns times D: converted or gathered inputs, and sums to round.
    per_row = (converts or rows.index is not None) * (1 + needs.hidden) * width
    per_column = converts * (1 + needs.weight) * width
    side = _largest_square(budget, tiles, per_row + per_column)
    r = min(n, max(side, 16))
    c = min(classes, max((budget - per_row * r) // (tiles * r + per_column), 64))
    r = min(n, max((budget - per_column * c) // (tiles * c + per_row), 16))
    held, held_columns = _held(n, classes, budget, tiles, per_row, per_column)
    if held < min(n, _FEWEST_HELD_ROWS) or (converts and needs.weight and held < n):
        held = 0
    return Plan(r, c, held, held_columns)


def elements(problem: Problem) -> int:
    """The workspace in elements of the accumulation dtype."""
    size = DEFAULT_WORKSPACE if problem.workspace is None else problem.workspace
    return size // (8 if problem.hidden.dtype.itemsize == 8 else 4)


def _held(n: int, classes: int, budget: int, tiles: int, per_row: int, per_column: int) -> tuple[int, int]:
    for rows in (n, budget // max(classes, 1)):
        rows = min(rows, n)
        columns = min(classes, max(_TILE // max(rows, 1), 256))
        room = budget - per_column * columns
        held = room // (classes + (tiles - 1) * columns + per_row)
        if held >= n:
            return n, columns
    return max(held, 0), columns


def _largest_square(budget: int, tiles: int, edge: int) -> int:
    """The largest s with tiles s^2 + edge s <= budget."""
    return int(((edge * edge + 4 * tiles * budget) ** 0.5 - edge) / (2 * tiles))


def spans(total: int, step: int) -> list[tuple[int, int]]:
    """[0, total) in pieces of `step`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]
