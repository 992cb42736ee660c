# SPDX-License-Identifier: Apache-2.0
"""The loops over tiles for the sums alone, and for the gradients where the sums are known."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from . import halves
from .plan import make_plan, spans
from .rows import Coefficients, Rows
from .spec import Grads, Needs, Norm, Problem
from .tile import Collector, Head, Sums, locate


def sweep(problem: Problem, rows: Rows, begin: int = 0) -> list[Sums]:
    """Sums of the computed rows from number `begin` on, over all columns: one product of 2NDV operations."""
    head = Head(problem)
    plan = make_plan(problem, rows, Needs(False, False, False))
    buffer = problem.hidden.new_empty(plan.rows * plan.columns, dtype=head.dtype)
    blocks, chunks = [], spans(head.classes, plan.columns)
    for first, last in spans(rows.count, plan.rows, begin):
        turned = head.turned(rows.take(problem.hidden, first, last))
        hits = locate(rows.target[first:last], chunks)
        sums = Collector(head, last - first, len(chunks), keep=False)
        for number, (start, stop) in enumerate(chunks):
            tile = tile_of(buffer, stop - start, last - first)
            head.product(tile, head.columns(start, stop), turned, start)
            sums.add(number, head.logits(tile, None), hits[number], start)
        blocks.append(sums.sums())
    return blocks


def recompute(
    problem: Problem, rows: Rows, norm: Norm, c: Coefficients, needs: Needs, out: Grads, begin: int = 0
) -> None:
    """Write the gradients into `out`, making each tile of logits again: 2NDV operations and 2NDV for each gradient.

    Rows from number `begin` on, added to what `out` has from those before. `norm` (n - begin,) is theirs.
    Where the weight's gradient cannot be summed up in its own dtype, each of its chunks of columns is summed up over all
    rows, so that each result is rounded once. If all rows' sums for the gradient of hidden take more than half of the
    workspace then, they are made in a loop (and with a product) of their own.
    """
    maker = _Recomputed(problem, rows, norm, c, needs, begin)
    if not maker.rounds:
        maker.by_rows(out)
    elif maker.together:
        maker.by_columns(out)
    else:
        if needs.hidden or needs.bias:
            maker.by_rows(out._replace(weight=None))
        maker.by_columns(Grads(None, out.weight, None))


class _Recomputed:
    """The two loop orders of `recompute`, which share their tiles."""

    def __init__(self, problem: Problem, rows: Rows, norm: Norm, c: Coefficients, needs: Needs, begin: int) -> None:
        self.problem, self.rows, self.c, self.begin = problem, rows, c, begin
        self.max, self.prob = norm.max, c.prob[begin:] / norm.sumexp
        self.head = Head(problem)
        plan = make_plan(problem, rows, needs)
        self.rounds = needs.weight and problem.weight.dtype != self.head.dtype and plan.rows < rows.count - begin
        # The sums of all rows take their part of the workspace.
        sums = needs.hidden * (rows.count - begin) * problem.hidden.shape[1]
        self.together = self.rounds and 2 * sums <= plan.elements
        if self.together:
            plan = make_plan(problem, rows, needs._replace(hidden=False), beside=sums)
        self.blocks = spans(rows.count, plan.rows, begin)
        self.chunks = spans(self.head.classes, plan.columns)
        self.hits = [locate(rows.target[first:last], self.chunks) for first, last in self.blocks]
        self.buffer = problem.hidden.new_empty(plan.rows * plan.columns, dtype=self.head.dtype)
        self.spare = torch.empty_like(self.buffer) if self.head.capped else None

    def hidden(self, block: int) -> Tensor:
        return self.rows.take(self.problem.hidden, *self.blocks[block])

    def gradient(self, weight: Tensor, turned: Tensor, chunk: int, block: int) -> Tensor:
        """d loss / d product of one tile (C, R)."""
        head, (first, last), start = self.head, self.blocks[block], self.chunks[chunk][0]
        tile = tile_of(self.buffer, weight.shape[0], last - first)
        head.product(tile, weight, turned, start)
        logits = head.logits(tile, None if self.spare is None else tile_of(self.spare, *tile.shape))
        c = self.c[first:last]
        mine = slice(first - self.begin, last - self.begin)
        head.elementwise.probabilities(logits, self.max[mine], self.prob[mine])
        return head.gradient(logits, tile, c, self.hits[block][chunk], start)

    def by_rows(self, out: Grads) -> None:
        """Each block of rows with all columns; its gradient of hidden is rounded once."""
        bias = bias_sum(out.bias, self.head.dtype)
        for block, (first, last) in enumerate(self.blocks):
            hidden = self.head.rows(self.hidden(block))
            turned = self.head.turned(hidden)
            d_hidden = None if out.hidden is None else self.rows.place(out.hidden, first, last, self.head.dtype)
            for chunk, (start, stop) in enumerate(self.chunks):
                w = None  # freed before there is another
                w = self.head.columns(start, stop)
                tile = self.gradient(w, turned, chunk, block)
                if d_hidden is not None:
                    accumulate(d_hidden, tile.T, w, chunk == 0)
                if out.weight is not None:
                    add_weight(out.weight[start:stop], tile, hidden, first == 0)
                if bias is not None:
                    bias[start:stop] += tile.sum(1)
            if d_hidden is not None:
                self.rows.put(out.hidden, first, last, d_hidden)
        put_bias(out.bias, bias)

    def by_columns(self, out: Grads) -> None:
        """Each chunk of columns with all rows; its gradient of the weight is rounded once."""
        bias, d_hidden = bias_sum(out.bias, self.head.dtype), None
        if out.hidden is not None:
            d_hidden = out.hidden.new_empty((self.rows.count - self.begin, out.hidden.shape[1]), dtype=self.head.dtype)
        for chunk, (start, stop) in enumerate(self.chunks):
            w = self.head.columns(start, stop)
            with summed(out.weight[start:stop], self.head.dtype, True) as (total, _):
                for block, (first, last) in enumerate(self.blocks):
                    hidden = self.head.rows(self.hidden(block))
                    tile = self.gradient(w, self.head.turned(hidden), chunk, block)
                    accumulate(total, tile, hidden, block == 0)
                    if d_hidden is not None:
                        accumulate(d_hidden[first - self.begin : last - self.begin], tile.T, w, chunk == 0)
                    if bias is not None:
                        bias[start:stop] += tile.sum(1)
            del w, total  # before there are others
        if d_hidden is not None:
            for first, last in self.blocks:
                self.rows.put(out.hidden, first, last, d_hidden[first - self.begin : last - self.begin])
        put_bias(out.bias, bias)


def new_grads(problem: Problem, rows: Rows, needs: Needs) -> Grads:
    """Gradients to be written: zero where there are no rows to write, and the bias's, which is only added to."""
    make = torch.zeros if rows.count == 0 else torch.empty
    options = {"dtype": problem.hidden.dtype, "device": problem.hidden.device}
    hidden = make(problem.hidden.shape, **options) if needs.hidden else None
    weight = make(problem.weight.shape, **options) if needs.weight else None
    bias = (
        torch.zeros_like(problem.bias, memory_format=torch.contiguous_format)
        if needs.bias and problem.bias is not None
        else None
    )
    return Grads(hidden, weight, bias)


def bias_sum(out: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Where to sum up the gradient of a bias in `dtype`: in `out` itself, if it has that."""
    return out if out is None or out.dtype == dtype else out.to(dtype)


def put_bias(out: Tensor | None, total: Tensor | None) -> None:
    """Write the sum that `bias_sum` gave; nothing to do where it is `out` itself."""
    if out is not None and total is not None and total is not out:
        out.copy_(total)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or out += a @ b after the first time: nothing is filled with zeros beforehand."""
    if b.dtype != out.dtype:
        halves.product(out, halves.converted(a), b, add=not first)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def add_weight(out: Tensor, tile: Tensor, hidden: Tensor, first: bool) -> None:
    """Add tile (C, R) @ hidden (R, D) to `out` (C, D)."""
    with summed(out, tile.dtype, first) as (total, fresh):
        accumulate(total, tile, hidden, fresh)


@contextlib.contextmanager
def summed(out: Tensor, dtype: torch.dtype, first: bool) -> Iterator[tuple[Tensor, bool]]:
    """(sum in `dtype` to add to, whether it holds nothing yet) for a piece `out` of a gradient.

    One of another dtype is written once only, so that it is rounded once.
    """
    if out.dtype == dtype:
        yield out, first
    else:
        total = torch.empty_like(out, dtype=dtype)
        yield total, True
        out.copy_(total)


def tile_of(buffer: Tensor, columns: int, rows: int) -> Tensor:
    """The beginning of a flat `buffer` as a tile (C, R)."""
    return buffer[: columns * rows].view(columns, rows)
