# SPDX-License-Identifier: Apache-2.0
"""One block of rows that holds its logits over the whole vocabulary: its sums and its part of the gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import finite
from .elementwise import exp_
from .plan import WIDE
from .rows import Coefficients, Rows
from .spec import Grads, Problem
from .sweeps import accumulate, summed, tile_of
from .tile import Collector, Head, Hit, Sums, locate


@dataclass(frozen=True)
class Block:
    """Rows first..last with a place for each tile of their logits."""

    first: int
    last: int
    chunks: list[tuple[int, int]]
    tiles: list[Tensor]  # (C, R) each
    spare: Tensor | None  # flat, for one tile


def scales_tiles(problem: Problem) -> bool:
    """Whether what a tile lacks is multiplied into it, or into a copy of its rows of hidden: the smaller of the two."""
    return problem.hidden.shape[1] >= WIDE


class Exact:
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
        found = (sums.max, sums.sumexp, *(() if self.d_hidden is None else self._summed_hidden()))
        if not all(bool(t.sum().isfinite()) for t in found):
            return None
        self._gradients(sums)
        return sums

    def _make(self, number: int) -> None:
        """Make a tile and take it into the sums."""
        head, hit, tile = self.head, self.hits[number], self.block.tiles[number]
        start, stop = self.block.chunks[number]
        weight = head.columns(start, stop)
        head.product(tile, weight, self.hidden.T, start)
        spare = None if self.block.spare is None else tile_of(self.block.spare, *tile.shape)
        exps = head.logits(tile, spare)
        self.collector.add(number, exps, hit, start)
        if head.capped:
            tile.square_()
            if hit is not None:
                self.slope[hit.row] = 1 - tile[hit.column, hit.row]
            torch.addcmul(exps, exps, tile, value=-1, out=tile)
        if self.uniform is not None:
            self.uniform.addmv_(weight.T, head.uniform(start, stop))
        if self.d_hidden is not None:
            self._sum_hidden(number, weight)

    def _sum_hidden(self, number: int, weight: Tensor) -> None:
        """Add a tile's part, relative to the maximum so far, to the gradient of hidden."""
        if number:
            self.d_hidden.mul_(self.collector.rescale(number)[:, None])
        accumulate(self.d_hidden, self.block.tiles[number].T, weight, number == 0)

    def _summed_hidden(self) -> tuple[Tensor, ...]:
        """What the first walk has made of the gradient of hidden."""
        return (self.d_hidden,)

    def _gradients(self, sums: Sums) -> None:
        factor = self.c.prob / sums.sumexp
        if self.d_hidden is not None:
            self.d_hidden.mul_(factor[:, None])
            self._add_uniform()
        for number in self._backwards():
            self._use(number, factor, finite(sums.max))
        self._put_hidden()

    def _put_hidden(self) -> None:
        if self.d_hidden is not None:
            self.rows.put(self.out.hidden, self.block.first, self.block.last, self.d_hidden)

    def _add_uniform(self) -> None:
        if self.uniform is not None:
            self.d_hidden.addr_(self.c.uniform, self.uniform, alpha=-1)

    def _backwards(self) -> Iterator[int]:
        """The tiles, the last first: one may lie where the weight's gradient of the chunk before it goes."""
        return reversed(range(len(self.block.tiles)))

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
                self._take_uniform(total, start)
        if out.bias is not None:
            ones = torch.ones_like(scale) if out.weight is not None and self.scales_tiles else scale
            total = out.bias[start:stop].addmv_(tile, ones)
            if hit is not None:
                total.index_add_(0, hit.column, at_hit)
            self._take_uniform(total, start)

    def _take_uniform(self, total: Tensor, start: int) -> None:
        """Take the uniform part off the gradient of the weight (C, D) or of the bias (C,) of the classes from `start` on."""
        if self.c.uniform is None:
            return
        of_class = self.head.uniform(start, start + len(total))
        if total.dim() == 2:
            total.addr_(of_class, self.uniform_hidden, alpha=-1)
        else:
            total.sub_(of_class * self.c.uniform.sum())

    @functools.cached_property
    def uniform_hidden(self) -> Tensor:
        """(D,) sum over rows of their uniform coefficient times hidden."""
        return self.c.uniform @ self.hidden

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
