# SPDX-License-Identifier: Apache-2.0
"""Sums and gradients in one go, while a block of rows holds its logits over the whole vocabulary: 6NDV operations.

The more rows a block has, the nearer its products come to their full speed, and what a block may hold is little. So a
result's own memory serves as room for logits as long as it holds no result yet: the gradient of the weight until the
first block is added to it, and the gradient of hidden beyond the rows that are done.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .combine import finite
from .elementwise import exp_
from .plan import FEWEST_HELD_ROWS, ROW_STEP, WIDE, Plan, held_columns, spans, step_down
from .rows import Coefficients, Rows
from .spec import Grads, Problem
from .sweeps import accumulate, bias_sum, summed, tile_of
from .tile import Collector, Head, Hit, Sums, locate


@dataclass(frozen=True)
class Block:
    """Rows first..last with a place for each tile of their logits."""

    first: int
    last: int
    chunks: list[tuple[int, int]]
    tiles: list[Tensor]  # (C, R) each
    spare: Tensor | None  # flat, for one tile


def held(problem: Problem, rows: Rows, c: Coefficients, plan: Plan, out: Grads) -> list[Sums]:
    """Sums, block by block, and gradients into `out`, of the first rows: as many as are best done in this way.

    How many rows were done is told by the sums. None is where too few rows fit, where the weight's gradient would be
    rounded more than once, where smoothing meets a cap, whose slope differs in each entry of a tile, or where something is
    not finite: the one-hot part is added apart here, and p inf - inf is NaN where (p - 1) inf is not.
    """
    head = Head(problem)
    if head.capped and c.uniform is not None:
        return []
    if out.weight is not None and not scales_tiles(problem):  # rows of hidden, scaled anew for each tile
        plan = replace(plan, per_row=plan.per_row + problem.hidden.shape[1])
    storage = _Storage(problem, rows, plan, out)
    blocks: list[Sums] = []
    bias = bias_sum(out.bias, head)
    first = 0
    while first < rows.count:
        block = storage.block(first)
        if block is None:
            break
        sums = _Held(problem, rows, c, head, out._replace(bias=bias), block).run()
        if sums is None:
            if out.bias is not None:
                out.bias.zero_()
            return []
        blocks.append(sums)
        first, block = block.last, None  # the next one may need this one's memory
    if bias is not None and bias is not out.bias and first:
        out.bias.copy_(bias)
    return blocks


def scales_tiles(problem: Problem) -> bool:
    """Whether what a tile lacks is multiplied into it, or into a copy of its rows of hidden: the smaller of the two."""
    return problem.hidden.shape[1] >= WIDE


class _Held:
    """One block of rows, in two walks over the vocabulary.

    The first makes tiles of exp(z - m), m the row's largest logit so far, and sums them up: over classes for sumexp, and
    times the weight for the gradient of hidden, so that the weight is read once for both products. The second, when the
    sums are known, multiplies each tile with hidden, whose rows carry what their tile still lacks: D numbers a row to
    scale and not a chunk of V. One-hot and uniform parts are sums over a few rows, or of rank one, and added apart.
    """

    def __init__(self, problem: Problem, rows: Rows, c: Coefficients, head: Head, out: Grads, block: Block) -> None:
        self.rows, self.head, self.out, self.block = rows, head, out, block
        first, last = block.first, block.last
        self.hidden, self.c = rows.take(problem.hidden, first, last).to(head.dtype), c[first:last]
        self.hits = locate(rows.target[first:last], block.chunks)
        self.collector = Collector(head, last - first, len(block.tiles), keep=True)
        self.scales_tiles = scales_tiles(problem)
        self.d_hidden = None if out.hidden is None else rows.place(out.hidden, first, last, head.dtype)
        self.slope = torch.ones_like(self.c.hit)  # of the cap at the target
        self.uniform = None  # (D,) sum of w_c weight_c
        if self.c.uniform is not None and self.d_hidden is not None:
            self.uniform = self.hidden.new_zeros(self.hidden.shape[1])

    def run(self) -> Sums | None:
        """Sums of the block; its gradients are written or added to `out`. None where it holds what is not finite."""
        for number in range(len(self.block.tiles)):
            self._make(number)
        sums = self.collector.sums()
        found = (sums.max, sums.sumexp, *(() if self.d_hidden is None else (self.d_hidden,)))
        if not all(bool(t.sum().isfinite()) for t in found):
            return None
        factor = self.c.prob / sums.sumexp
        if self.d_hidden is not None:
            self.d_hidden.mul_(factor[:, None])
            if self.uniform is not None:
                self.d_hidden.addr_(self.c.uniform, self.uniform, alpha=-1)
        # Backwards: a tile may lie where the weight's gradient of the chunk before it goes.
        for number in reversed(range(len(self.block.tiles))):
            self._use(number, factor, finite(sums.max))
        if self.d_hidden is not None:
            self.rows.put(self.out.hidden, self.block.first, self.block.last, self.d_hidden)
        return sums

    def _make(self, number: int) -> None:
        head, hit, tile = self.head, self.hits[number], self.block.tiles[number]
        start, stop = self.block.chunks[number]
        weight = head.columns(start, stop)
        head.product(tile, weight, self.hidden, start)
        spare = None if self.block.spare is None else tile_of(self.block.spare, *tile.shape)
        exps = head.logits(tile, spare)
        self.collector.add(number, exps, hit, start)
        if head.capped:
            tile.square_()
            if hit is not None:
                self.slope[hit.row] = 1 - tile[hit.column, hit.row]
            torch.addcmul(exps, exps, tile, value=-1, out=tile)
        if self.d_hidden is None:
            return
        if number:
            self.d_hidden.mul_(self.collector.rescale(number)[:, None])
        accumulate(self.d_hidden, tile.T, weight, number == 0)
        if self.uniform is not None:
            self.uniform.addmv_(weight.T, head.uniform(start, stop))

    def _use(self, number: int, factor: Tensor, highest: Tensor) -> None:
        head, out, hit, tile = self.head, self.out, self.hits[number], self.block.tiles[number]
        start, stop = self.block.chunks[number]
        ratio = exp_(self.collector.max[number] - highest)
        scale = ratio * factor
        at_hit = None if hit is None else -(self.c.hit * self.slope)[hit.row]
        if self.d_hidden is not None and hit is not None:
            at_target = head.weight[hit.column + start].to(head.dtype)
            self.d_hidden.index_add_(0, hit.row, at_target.mul_(at_hit[:, None]))
        if hit is not None:
            hit, at_hit = self._into_tile(tile, hit, at_hit, ratio, scale)
        if out.weight is not None:
            scaled = self.hidden
            if self.scales_tiles:
                tile.mul_(scale)
            else:
                scaled = self.hidden * scale[:, None]
            with summed(out.weight[start:stop], head.dtype, self.block.first == 0) as (total, fresh):
                accumulate(total, tile, scaled, fresh)
                if hit is not None:
                    total.index_add_(0, hit.column, self.hidden[hit.row].mul_(at_hit[:, None]))
                if self.c.uniform is not None:
                    total.addr_(head.uniform(start, stop), self.c.uniform @ self.hidden, alpha=-1)
        if out.bias is not None:
            ones = torch.ones_like(scale) if out.weight is not None and self.scales_tiles else scale
            total = out.bias[start:stop].addmv_(tile, ones)
            if hit is not None:
                total.index_add_(0, hit.column, at_hit)
            if self.c.uniform is not None:
                total.sub_(head.uniform(start, stop) * self.c.uniform.sum())

    def _into_tile(
        self, tile: Tensor, hit: Hit, at_hit: Tensor, ratio: Tensor, scale: Tensor
    ) -> tuple[Hit | None, Tensor]:
        """Take the one-hot part off the tile itself where a target is likely; what is left to be added apart.

        p - 1 is then made in each row, and is exactly zero where the row is sure, rather than left over from two sums.
        """
        row = hit.row
        likely = (ratio[row] >= 0.5) & (self.c.prob[row].abs() >= 0.5 * self.c.hit[row].abs())
        tile[hit.column, row] += torch.where(likely, at_hit / scale[row], 0).nan_to_num_(0, 0, 0)
        rest = (~likely).nonzero()[:, 0]
        return (Hit(hit.column[rest], row[rest]) if len(rest) else None), at_hit[rest]


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
