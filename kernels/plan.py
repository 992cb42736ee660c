# SPDX-License-Identifier: Apache-2.0
"""How large the tiles are, given the bytes that may be held beyond the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .combine import statistics_dtype
from .halves import usable
from .rows import Rows
from .spec import Needs, Problem

LARGEST_WORKSPACE = 64 << 20
LARGEST_FUSED = 16 << 20  # of compiled code, which is as fast with fewer rows to a block
FUSED_THREAD = 2 << 20  # of each thread, where many threads need more
FUSED_ROW = 48  # bytes that a row takes beside the workspace
SMALLEST_WORKSPACE = 1 << 20
FEWEST_HELD_ROWS = 112  # with fewer, the products are slow enough that making the logits twice is faster
ROW_STEP = 16  # BLAS kernels waste what is left over beyond a multiple of their width
# Columns of a held block: fewer calls of BLAS and longer sums against tiles that stay in cache. At N=2048 D=512 V=32000
# 4096 columns of 270 rows are 6 % faster than 1024; from there on nothing changes.
_TILE = 1 << 20  # elements of a tile
_COLUMNS = 4096
WIDE = 1024  # hidden sizes from which a chunk of the columns has no more entries than a block's rows of hidden
_FEWEST_COLUMNS = 1024  # below this a product is slow enough that it pays to hold fewer rows


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


def make_plan(problem: Problem, rows: Rows, needs: Needs, beside: int = 0) -> Plan:
    """Tile sizes for `rows` of `problem`, with `beside` elements of the workspace taken by something else; at the least 16
    rows by 64 columns, whatever the workspace."""
    n, (classes, width) = max(rows.count, 1), problem.weight.shape
    budget = elements(problem, n) - beside
    converts = problem.hidden.dtype != statistics_dtype(problem.hidden.dtype)
    gathers = rows.index is not None
    tiles = 2 if problem.epilogue.softcap is not None else 1
    # Copies in units of rows or columns times D: converted or gathered inputs, and sums that are rounded at the end.
    per_row = (converts or gathers) * (1 + needs.hidden) * width
    per_column = converts * (1 + needs.weight) * width
    if usable(problem):  # a bfloat16 number takes half an element
        tiles += any(needs)  # a tile in bfloat16, and turned
        per_row = (1 + gathers) * width // 2 + needs.hidden * width
        per_column = needs.weight * width
    side = _largest_square(budget, tiles, per_row + per_column)
    r = min(n, max(step_down(side), 16))
    c = min(classes, max((budget - per_row * r) // (tiles * r + per_column), 64))
    r = min(n, max(step_down((budget - per_column * c) // (tiles * c + per_row)), 16))
    r = min(n, -(-n // -(-n // r) // ROW_STEP) * ROW_STEP)  # blocks of equal size: one of few rows would be slow
    c = min(classes, max((budget - per_row * r) // (tiles * r + per_column), 64))
    return Plan(budget, r, c, tiles, per_row, per_column)


def held_columns(rows: int, classes: int, plan: Plan) -> int:
    """Columns in a chunk of a block of `rows` that is held: enough for BLAS, while most of the workspace stays for rows."""
    rows = max(rows, 1)
    each = plan.tiles * rows + plan.per_column
    columns = max(min(max(_TILE // rows, _COLUMNS), plan.elements // (4 * each)), _FEWEST_COLUMNS)
    return max(min(classes, columns, plan.elements // rows), 1)


def default_workspace(
    rows: Any, classes: Any, item: int, largest: Any = max, smallest: Any = min, fused: bool = False
) -> Any:
    """Bytes that may be held beyond the results where nobody says how many, for logits of `item` bytes.

    A 20th of what a dense loss holds (three times the logits), from 1 to 64 MiB. Rows are what it buys, and with twice the
    rows to a block the weight and its gradient cross the memory bus half as often: from 16 to 64 MiB the time at N=4096
    D=1024 V=50257 falls by a seventh, from 64 to 256 by a twentieth (`benchmarks kernel`). Compiled code (`fused`) is as fast
    with fewer rows: it gets a 21st of the logits, which with what is held for each row is a 20th, and 16 MiB with that.

    Sizes may be symbols, with the library's own functions for the `largest` and the `smallest` of two.
    """
    if not fused:
        return smallest(largest(3 * item * rows * classes // 20, SMALLEST_WORKSPACE), LARGEST_WORKSPACE)
    most = max(LARGEST_FUSED, FUSED_THREAD * torch.get_num_threads())
    beside = largest(most - FUSED_ROW * rows, most // 4)
    return smallest(largest(item * rows * classes // 21, SMALLEST_WORKSPACE), beside)


def elements(problem: Problem, rows: int, fused: bool = False) -> int:
    """The workspace in elements of the accumulation dtype."""
    item = statistics_dtype(problem.hidden.dtype).itemsize
    size = problem.workspace
    return (default_workspace(rows, problem.weight.shape[0], item, fused=fused) if size is None else size) // item


def step_down(rows: int) -> int:
    """`rows`, or the next smaller number that BLAS likes."""
    return rows if rows < ROW_STEP else rows // ROW_STEP * ROW_STEP


def _largest_square(budget: int, tiles: int, edge: int) -> int:
    """The largest s with tiles s^2 + edge s <= budget."""
    return int(((edge * edge + 4 * tiles * budget) ** 0.5 - edge) / (2 * tiles))


def spans(total: int, step: int, first: int = 0) -> list[tuple[int, int]]:
    """[first, total) in pieces of `step`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(first, total, step)]
