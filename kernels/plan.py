"""How large the tiles are, given the bytes that may be held beyond the results."""

from __future__ import annotations

from dataclasses import dataclass

from .combine import statistics_dtype
from .rows import Rows
from .spec import Needs, Problem

LARGEST_WORKSPACE = 16 << 20
SMALLEST_WORKSPACE = 1 << 20
FEWEST_HELD_ROWS = 72  # with fewer, the products are slow enough that making the logits twice is faster
ROW_STEP = 16  # BLAS kernels waste what is left over beyond a multiple of their width
_TILE = 1 << 18  # elements of a tile that stays in cache between its operations
_COLUMNS = 1024  # below this a product does not reach its speed


@dataclass(frozen=True)
class Plan:
    """Tile sizes of one problem."""

    elements: int  # the workspace, in elements of the accumulation dtype
    rows: int  # rows of hidden in a block that is swept chunk by chunk
    columns: int  # columns of the vocabulary in a chunk of such a block
    tiles: int  # buffers of a tile's size in use at once
    per_row: int  # elements of copies beside the tiles: for each row of a block
    per_column: int  # and for each column of a chunk

    def beside(self, rows: int, columns: int) -> int:
        """Elements held beside one tile of `rows` by `columns`."""
        return (self.tiles - 1) * rows * columns + self.per_row * rows + self.per_column * columns


def make_plan(problem: Problem, rows: Rows, needs: Needs) -> Plan:
    """Tile sizes for `rows` of `problem`; at the least 16 rows by 64 columns, whatever the workspace."""
    n, (classes, width) = max(rows.count, 1), problem.weight.shape
    budget = _elements(problem, n)
    converts = problem.hidden.dtype != statistics_dtype(problem.hidden.dtype)
    tiles = 2 if problem.epilogue.softcap is not None else 1
    # Copies in units of rows or columns times D: converted or gathered inputs, and sums that are rounded at the end.
    per_row = (converts or rows.index is not None) * (1 + needs.hidden) * width
    per_column = converts * (1 + needs.weight) * width
    side = _largest_square(budget, tiles, per_row + per_column)
    r = min(n, max(step_down(side), 16))
    c = min(classes, max((budget - per_row * r) // (tiles * r + per_column), 64))
    r = min(n, max(step_down((budget - per_column * c) // (tiles * c + per_row)), 16))
    return Plan(budget, r, c, tiles, per_row, per_column)


def held_columns(rows: int, classes: int, elements: int) -> int:
    """Columns in a chunk of a block of `rows`: a tile stays in cache, unless that makes the products slow."""
    rows = max(rows, 1)
    return max(min(classes, max(_TILE // rows, _COLUMNS), elements // rows), 1)


def _elements(problem: Problem, rows: int) -> int:
    """The workspace in elements of the accumulation dtype.

    By default 16 MiB, above which time hardly falls, or about a twentieth of what a dense loss holds (three times the
    logits) where that is less, but no tile smaller than 1 MiB.
    """
    item = 8 if problem.hidden.dtype.itemsize == 8 else 4
    size = problem.workspace
    if size is None:
        size = min(max(3 * item * rows * problem.weight.shape[0] // 20, SMALLEST_WORKSPACE), LARGEST_WORKSPACE)
    return size // item


def step_down(rows: int) -> int:
    """`rows`, or the next smaller number that BLAS likes."""
    return rows if rows < ROW_STEP else rows // ROW_STEP * ROW_STEP


def _largest_square(budget: int, tiles: int, edge: int) -> int:
    """The largest s with tiles s^2 + edge s <= budget."""
    return int(((edge * edge + 4 * tiles * budget) ** 0.5 - edge) / (2 * tiles))


def spans(total: int, step: int, first: int = 0) -> list[tuple[int, int]]:
    """[first, total) in pieces of `step`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(first, total, step)]
