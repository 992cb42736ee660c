# SPDX-License-Identifier: Apache-2.0
"""Sums and gradients in one go, while a block of rows holds its logits over the whole vocabulary: 6NDV operations.

The more rows a block has, the nearer its products come to their full speed, and what a block may hold is little. So a
result's own memory serves as room for logits as long as it holds no result yet: the gradient of the weight until the
first block is added to it, and the gradient of hidden beyond the rows that are done.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .block import Block, Exact, scales_tiles
from .dropped import Dropped
from .filtered import MASSES, Filtered, Tails, room_of
from .plan import FEWEST_HELD_ROWS, ROW_STEP, Plan, held_columns, spans, step_down
from .rows import Coefficients, Rows
from .spec import Grads, Problem
from .sweeps import bias_sum, put_bias, tile_of
from .tile import Head, Sums


def held(
    problem: Problem, rows: Rows, c: Coefficients, plan: Plan, out: Grads, report: list[Dropped] | None = None
) -> list[Sums]:
    """Sums, block by block, and gradients into `out`, of the first rows: as many as are best done in this way.

    How many rows were done is told by the sums. None is where too few rows fit, where the weight's gradient would be
    rounded more than once, where smoothing meets a cap, whose slope differs in each entry of a tile, where products of
    bfloat16 numbers are so fast that making the logits again costs less than converting them, or where something is not
    finite: the one-hot part is added apart here, and p inf - inf is NaN where (p - 1) inf is not.
    """
    head = Head(problem)
    if (head.capped and c.uniform is not None) or head.operand != head.dtype:
        return []
    bias = bias_sum(out.bias, head.dtype)
    tails = None
    if problem.filter_eps is not None and bool(c.prob.isfinite().all()):
        room = room_of(problem, plan.elements)
        tails = Tails(problem, head, out, room)
        plan = replace(plan, elements=plan.elements - room.elements, per_row=plan.per_row + MASSES)
    elif out.weight is not None and not scales_tiles(problem):  # rows of hidden, scaled anew for each tile
        plan = replace(plan, per_row=plan.per_row + problem.hidden.shape[1])
    make = Exact if tails is None else partial(Filtered, tails=tails)
    storage = _Storage(problem, rows, plan, out)
    blocks: list[Sums] = []
    first = 0
    while first < rows.count:
        block = storage.block(first)
        if block is None:
            break
        sums = make(problem, rows, c, head, out._replace(bias=bias), block).run()
        if sums is None:
            if out.bias is not None:
                out.bias.zero_()
            return []
        blocks.append(sums)
        first, block = block.last, None  # the next one may need this one's memory
    if tails is not None:
        tails.flush()
        if report is not None:
            report.append(tails.dropped)
    if first:
        put_bias(out.bias, bias)
    return blocks


class _Storage:
    """Finds room for the logits of one block after the other."""

    def __init__(self, problem: Problem, rows: Rows, plan: Plan, out: Grads) -> None:
        self.plan, self.rows, self.out, self.like = plan, rows, out, problem.hidden
        self.classes, self.width = problem.weight.shape
        self.head_dtype = torch.float64 if problem.hidden.dtype == torch.float64 else torch.float32
        self.same = problem.hidden.dtype == self.head_dtype
        self.buffer = self.spare = None

    def block(self, first: int) -> Block | None:
        """The next block, or None where it would be better not to hold it."""
        left = self.rows.count - first
        most = self._most(first)
        if first == 0 and self.same and self.out.weight is not None and most < left:
            count = min(left, step_down(self.width))
            columns = self._columns(count)
            if count > most and columns >= min(self.classes, 64) and self._worth(count, left):
                return self._in_weight(count, columns)
        if not self._worth(most, left) or (not self.same and self.out.weight is not None and most < left):
            return None
        # As equal as can be: a last block of few rows would be slow.
        count = min(most, -(-left // -(-left // most) // ROW_STEP) * ROW_STEP if most < left else left)
        return self._in_workspace(first, count)

    def _worth(self, count: int, left: int) -> bool:
        return count >= min(left, FEWEST_HELD_ROWS)

    def _columns(self, count: int) -> int:
        """Columns of a tile of `count` rows that leaves the workspace room for what goes with it."""
        p = self.plan
        room = (p.elements - p.per_row * count) // (p.tiles * max(count, 1) + p.per_column)
        return min(held_columns(count, self.classes, p), max(room, 0))

    def _tail(self, last: int) -> Tensor | None:
        """The part of the gradient of hidden where nothing is written before row `last` is done, flat."""
        if self.out.hidden is None or not self.same:
            return None
        free = self.rows.count - last
        return self.out.hidden[self.out.hidden.shape[0] - free :].view(-1)

    def _most(self, first: int) -> int:
        """How many rows fit into the workspace, and the tail where that helps."""
        left = self.rows.count - first
        tail = self.width if self._tail(first) is not None else 0
        return min(left, max(self._fitting(left, 0), self._fitting(left, tail)))

    def _fitting(self, left: int, tail: int) -> int:
        """How many of `left` rows fit into the workspace and `tail` elements for each row after them."""
        p, count = self.plan, left
        for _ in range(3):  # the columns of a tile depend on its rows, and those on the room beside tiles
            columns = self._columns(max(count, 1))
            room = p.elements - p.per_column * columns + tail * left
            lost = columns if tail else 0  # the part of a tile at the end of the workspace
            each = self.classes + lost + tail + (p.tiles - 1) * columns + p.per_row
            fits = max(room, 0) // each
            count = left if fits >= left else step_down(fits)
        return count

    def _in_weight(self, count: int, columns: int) -> Block:
        """The first block: each tile lies where the weight's gradient of the chunk before it will be written."""
        chunks, flat = spans(self.classes, columns), self.out.weight.view(-1)
        tiles = [self._new(count * columns)[: count * (chunks[0][1])].view(-1, count)]
        for (start, stop), (before, _) in zip(chunks[1:], chunks, strict=False):
            tiles.append(tile_of(flat[before * self.width :], stop - start, count))
        spare = self._new(count * columns) if self.plan.tiles > 1 else None
        return Block(0, count, chunks, tiles, spare)

    def _in_workspace(self, first: int, count: int) -> Block | None:
        while columns := self._columns(count):
            chunks = spans(self.classes, columns)
            if self.buffer is None:
                whole = self.plan.elements - self.plan.beside(count, columns)
                self.buffer = self._new(min(whole, count * self.classes))
                self.spare = self._new(count * columns) if self.plan.tiles > 1 else None
            segments = [self.buffer, self._tail(first + count)]
            tiles = _fill([s for s in segments if s is not None], chunks, count)
            if tiles is not None and (self.spare is None or count * columns <= self.spare.numel()):
                return Block(first, first + count, chunks, tiles, self.spare)
            if tiles is not None:
                self.spare = None  # freed before there is another
                self.spare = self._new(count * columns)
                return Block(first, first + count, chunks, tiles, self.spare)
            if count == 1:
                break
            count -= min(ROW_STEP, count - 1)
        return None

    def _new(self, elements: int) -> Tensor:
        return self.like.new_empty(elements, dtype=self.head_dtype)


def _fill(segments: list[Tensor], chunks: list[tuple[int, int]], rows: int) -> list[Tensor] | None:
    """A tile for each chunk, in the first segment that has room; None if they do not fit."""
    tiles, used, where = [], 0, 0
    for start, stop in chunks:
        size = (stop - start) * rows
        while where < len(segments) and segments[where].numel() - used < size:
            where, used = where + 1, 0
        if where == len(segments):
            return None
        tiles.append(tile_of(segments[where][used:], stop - start, rows))
        used += size
    return tiles
