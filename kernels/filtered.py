# SPDX-License-Identifier: Apache-2.0
"""A block of rows whose gradients leave out the classes that carry next to nothing, within a bound.

Of a trained model's softmax most classes hold nearly nothing, in all rows of a block. The two products of the gradients
take only classes that matter, those with the largest sums over the block. Of row i the gradient of hidden loses

    mu_i = sum_{c dropped} p_ic <= filter_eps,

and that of the weight, whose rows are sums over i, at most half of filter_eps on average over the block. In the place of
what is dropped stands its mean, of rank one: p_ic becomes mu_i q_c, where q_c is proportional to sum_i |prob_i| p_ic and
sums to one. With rows w_c and h_i of weight and hidden, and dx_ic = prob_i p_ic, the errors are bounded by

    |error of d_hidden_i| <= |prob_i| sum_c |p_ic - mu_i q_c| |w_c|      <= 2 |prob_i| mu_i max_c |w_c|
    |error of d_weight_c| <= sum_i |prob_i| |p_ic - mu_i q_c| |h_i|      <= 2 sum_i |prob_i| p_ic max_i |h_i|

where the second line uses that q_c sum_i |prob_i| mu_i = sum_i |prob_i| p_ic. In practice rows of a text agree about the
tail of their vocabulary, and the error is a tenth of the bound or less. The one-hot part and the uniform part of label
smoothing are exact.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .block import Block, Exact
from .combine import finite
from .dropped import Dropped
from .elementwise import LEVELS, exp_
from .plan import spans
from .rows import Coefficients, Rows
from .spec import Grads, Problem
from .sweeps import accumulate, summed
from .tile import Head, Sums

MASSES = 16 * LEVELS  # elements for each row: the sums of levels, by pieces of a tile


@dataclass(frozen=True)
class Room:
    """What blocks with a filter hold beside their tiles."""

    gathered: int  # rows of the weight that are copied next to each other at a time
    tails: int  # blocks whose tails are added to the gradients in one pass
    elements: int


def room_of(problem: Problem, elements: int, share: int = 32) -> Room:
    """A part of a workspace of `elements`, a `share`th at the most for tails; the copies stay in the cache."""
    classes, width = problem.weight.shape
    gathered = min(classes, max(min(1 << 19, elements // 8) // max(width, 1), 64))
    tails = max(1, min(16, elements // share // classes))
    return Room(gathered, tails, gathered * width + classes * (10 + 2 * tails))


_Add = Callable[[Tensor | None, Tensor, Tensor, int], None]


@dataclass(frozen=True)
class Choice:
    """The classes that one product of a block keeps, and what stands for the others."""

    kept: Tensor  # (V,) bool
    mean: Tensor  # (V,) q, zero where kept
    mass: Tensor  # (R,) prob_i mu_i


def largest(prob: Tensor) -> Tensor:
    """The largest |prob| of a block, by which masses are divided."""
    return prob.abs().max().clamp_min(torch.finfo(prob.dtype).tiny)


def choose(levels: Tensor, sums: Tensor, mass: Tensor, prob: Tensor, eps: float) -> tuple[Choice, Choice]:
    """What the gradient of hidden drops and what that of the weight does: classes with the smallest sums.

    From the levels (V,), and of p = |prob| softmax / `largest(prob)` the sums (V,) over the rows and, of each level and row,
    over its classes, (LEVELS, R).
    """
    weight, top = prob.abs(), largest(prob)
    below = mass.double().flip(0).cumsum(0).flip(0)  # of each level and those after it
    bound = eps * (weight / top).double()
    by_row = (below <= bound).all(1)
    on_average = below.sum(1) <= bound.sum() / 2

    def cut(allowed: Tensor) -> Choice:
        first = int(allowed.to(torch.uint8).argmax()) if bool(allowed.any()) else LEVELS
        first = max(first, 1)  # targets are at level 0
        kept = levels < first
        dropped = below[first].to(weight.dtype) if first < LEVELS else torch.zeros_like(weight)
        mean = sums.masked_fill(kept, 0).div_(dropped.sum().clamp_min(torch.finfo(weight.dtype).tiny))
        return Choice(kept, mean, dropped * (top * prob.sign()))

    return cut(by_row), cut(on_average)


class Tails:
    """The rank-one parts of several blocks, which share one pass over the weight and its gradient."""

    def __init__(self, problem: Problem, head: Head, out: Grads, room: Room) -> None:
        self.head, self.out, self.room = head, out, room
        self.blocks: list[tuple[slice | Tensor, Tensor, Tensor]] = []  # rows, mass (R,), mass times hidden (D,)
        options = {"dtype": head.dtype, "device": problem.hidden.device}
        n, classes = problem.hidden.shape[0], problem.weight.shape[0]
        self.means = torch.empty(2, room.tails, classes, **options)
        self.dropped = Dropped(torch.zeros(n, **options), torch.zeros(classes, **options), times=2)

    def add(self, rows: slice | Tensor, for_hidden: Choice, for_weight: Choice, hidden: Tensor) -> None:
        """Add mass times mean of a block with `hidden` (R, D) to the gradients, at the latest with `flush`."""
        self.dropped.rows[rows] = for_hidden.mass.abs()
        self.dropped.columns.add_(for_weight.mean, alpha=float(for_weight.mass.abs().sum()))
        self.means[0, len(self.blocks)], self.means[1, len(self.blocks)] = for_hidden.mean, for_weight.mean
        self.blocks.append((rows, for_hidden.mass, for_weight.mass @ hidden))
        if len(self.blocks) == self.means.shape[1]:
            self.flush()

    def flush(self) -> None:
        if not self.blocks:
            return
        (for_hidden, for_weight), (hidden, weight, _) = self.means[:, : len(self.blocks)], self.out
        if hidden is not None:
            for (rows, mass, _), tail in zip(self.blocks, self._mean_weights(for_hidden), strict=True):
                hidden[rows] = hidden[rows].addr(mass.to(hidden.dtype), tail.to(hidden.dtype))
        if weight is not None:
            sums = torch.stack([s for _, _, s in self.blocks])
            weight.addmm_(for_weight.T.to(weight.dtype), sums.to(weight.dtype))
        self.blocks.clear()

    def _mean_weights(self, means: Tensor) -> Tensor:
        """means (k, V) @ weight (V, D)."""
        head, total = self.head, None
        for start, stop in spans(head.classes, self.room.gathered):
            part = torch.mm(means[:, start:stop], head.columns(start, stop))
            total = part if total is None else total.add_(part)
        return total


class Filtered(Exact):
    """One block in two walks: the first makes tiles and sums, the second gathers the classes that matter."""

    def __init__(
        self, problem: Problem, rows: Rows, c: Coefficients, head: Head, out: Grads, block: Block, tails: Tails
    ) -> None:
        super().__init__(problem, rows, c, head, out, block)
        self.eps, self.tails = problem.filter_eps, tails
        self.step = tails.room.gathered
        self.buffer = self.hidden.new_empty(self.step * problem.weight.shape[1])
        self.fresh = True

    def _sum_hidden(self, number: int, weight: Tensor) -> None:
        """Nothing: which classes are summed is not known yet."""

    def _summed_hidden(self) -> tuple[Tensor, ...]:
        return ()

    def _gradients(self, sums: Sums) -> None:
        highest, factor = finite(sums.max), self.c.prob / sums.sumexp
        for_hidden, for_weight = self._choose(highest, factor)
        uses = [(for_hidden, self._add_hidden)] if self.d_hidden is not None else []
        uses += [(for_weight, self._add_weight)] if self.out.weight is not None else []
        uses = sorted(uses, key=lambda use: -int(use[0].kept.sum())) or [(for_hidden, lambda *_: None)]
        for number in self._backwards():
            self._use_kept(number, exp_(self.collector.max[number] - highest) * factor, uses)
        if self.d_hidden is not None:
            if self.fresh:
                self.d_hidden.zero_()
            self._add_uniform()
        self._put_hidden()
        if self.out.bias is not None:  # its sums are over the classes of the first use
            self.out.bias.add_(uses[0][0].mean, alpha=float(uses[0][0].mass.sum()))
        self.tails.add(self.rows.numbers(self.block.first, self.block.last), for_hidden, for_weight, self.hidden)

    def _choose(self, highest: Tensor, factor: Tensor) -> tuple[Choice, Choice]:
        head, prob = self.head, self.c.prob
        top = largest(prob)
        levels = torch.zeros(head.classes, dtype=torch.uint8, device=prob.device)
        sums, mass = prob.new_zeros(head.classes), prob.new_zeros(LEVELS, len(prob))
        for number, (start, stop) in enumerate(self.block.chunks):
            if (hit := self.hits[number]) is not None:
                levels[start + hit.column] = 1
            share = exp_(self.collector.max[number] - highest) * (factor.abs() / top)
            head.elementwise.levels(self.block.tiles[number], share, levels[start:stop], sums[start:stop], mass)
        return choose(levels, sums, mass, prob, self.eps)

    def _use_kept(self, number: int, scale: Tensor, uses: list[tuple[Choice, _Add]]) -> None:
        head, out, hit = self.head, self.out, self.hits[number]
        start, stop = self.block.chunks[number]
        tile, index = self.block.tiles[number], None
        with self._piece_of_weight(start, stop) as total:
            for choice, add in uses:
                chosen = choice.kept[start:stop]
                if index is None:
                    index = chosen.nonzero()[:, 0]
                    tile = head.elementwise.keep(tile, index, scale)
                    if hit is not None:
                        tile[torch.searchsorted(index, hit.column), hit.row] -= (self.c.hit * self.slope)[hit.row]
                    if out.bias is not None:
                        self._take_uniform(out.bias[start:stop].index_add_(0, index, tile.sum(1)), start)
                else:  # a part of the classes that are there already
                    again = chosen[index].nonzero()[:, 0]
                    tile, index = head.elementwise.keep(tile, again, torch.ones_like(scale)), index[again]
                add(total, tile, index, start)

    @contextlib.contextmanager
    def _piece_of_weight(self, start: int, stop: int) -> Iterator[Tensor | None]:
        """The sum of the weight's gradient for a chunk, with its uniform part."""
        if self.out.weight is None:
            yield None
            return
        with summed(self.out.weight[start:stop], self.head.dtype, self.block.first == 0) as (total, fresh):
            yield total.zero_() if fresh else total
            self._take_uniform(total, start)

    def _add_hidden(self, total: Tensor | None, tile: Tensor, index: Tensor, start: int) -> None:
        head, index = self.head, index + start
        for first, last in spans(len(index), self.step):
            if head.weight.dtype == head.dtype:
                weight = self.buffer[: (last - first) * head.weight.shape[1]].view(last - first, -1)
                torch.index_select(head.weight, 0, index[first:last], out=weight)
            else:
                weight = head.weight[index[first:last]].to(head.dtype)
            accumulate(self.d_hidden, tile[first:last].T, weight, self.fresh)
            self.fresh = False

    def _add_weight(self, total: Tensor | None, tile: Tensor, index: Tensor, start: int) -> None:
        for first, last in spans(len(index), self.step):
            part = self.buffer[: (last - first) * total.shape[1]].view(last - first, -1)
            torch.mm(tile[first:last], self.hidden, out=part)
            total.index_add_(0, index[first:last], part)
