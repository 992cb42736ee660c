"""The loops over tiles: sums alone, gradients from known sums, and both while a block's logits are held."""

from __future__ import annotations

import torch
from torch import Tensor

from .combine import finite
from .plan import Plan, make_plan, spans
from .rows import Coefficients, Rows
from .spec import Grads, Needs, Problem
from .tile import Head, Sums, merge


def sweep(problem: Problem, rows: Rows) -> Sums:
    """Sums (n,) of the computed rows over all columns: one product of 2NDV operations."""
    head, classes = Head(problem), problem.weight.shape[0]
    plan = make_plan(problem, rows, Needs(False, False, False))
    buffer = problem.hidden.new_empty(plan.rows * plan.columns, dtype=head.dtype)
    blocks = [_empty_sums(problem, head)]
    for first, last in spans(rows.count, plan.rows):
        hidden, target = rows.take(problem.hidden, first, last).to(head.dtype), rows.target[first:last]
        sums = None
        for start, stop in spans(classes, plan.columns):
            tile = _tile(buffer, stop - start, last - first)
            head.product(tile, head.columns(start, stop), hidden, start)
            sums = merge(sums, head.reduce(head.logits(tile, None), target, start))
        blocks.append(sums)
    return _concatenate(blocks)


def recompute(problem: Problem, rows: Rows, lse: Tensor, c: Coefficients, needs: Needs) -> Grads:
    """Gradients from lse (n,) of the computed rows, making each tile of logits again: 2NDV and 2NDV for each gradient.

    Where the weight's gradient cannot be summed up in its own dtype, it has a loop (and a product) of its own, over
    the rows for each chunk of columns, so that each result is rounded once.
    """
    out = new_grads(problem, rows, needs)
    maker = _Recomputed(problem, rows, lse, c, needs)
    rounds = problem.weight.dtype != maker.head.dtype and rows.count > maker.plan.rows and needs.weight
    if needs.hidden or needs.bias or not rounds:
        maker.by_rows(out, weight=not rounds)
    if rounds:
        maker.weight_by_columns(out)
    return out


class _Recomputed:
    """The two loop orders of `recompute`, which share their tiles."""

    def __init__(self, problem: Problem, rows: Rows, lse: Tensor, c: Coefficients, needs: Needs) -> None:
        self.problem, self.rows, self.lse, self.c = problem, rows, lse, c
        self.head = Head(problem)
        self.plan = make_plan(problem, rows, needs)
        size = self.plan.rows * self.plan.columns
        self.buffer = problem.hidden.new_empty(size, dtype=self.head.dtype)
        self.spare = torch.empty_like(self.buffer) if self.head.capped else None

    def hidden(self, first: int, last: int) -> Tensor:
        return self.rows.take(self.problem.hidden, first, last).to(self.head.dtype)

    def gradient(self, weight: Tensor, hidden: Tensor, start: int, first: int, last: int) -> Tensor:
        """d loss / d product of one tile (C, R)."""
        head, block = self.head, slice(first, last)
        tile = _tile(self.buffer, weight.shape[0], last - first)
        head.product(tile, weight, hidden, start)
        logits = head.logits(tile, None if self.spare is None else _tile(self.spare, *tile.shape))
        c = self.c[block]
        probs = logits.sub_(self.lse[block]).exp_().mul_(c.prob)
        return head.gradient(probs, tile, c, self.rows.target[block], start)

    def by_rows(self, out: Grads, weight: bool) -> None:
        classes, fresh = self.problem.weight.shape[0], True
        bias = _bias_sum(out.bias, self.head)
        for first, last in spans(self.rows.count, self.plan.rows):
            hidden = self.hidden(first, last)
            d_hidden = hidden_sum(out.hidden, self.rows, first, last, self.head)
            for start, stop in spans(classes, self.plan.columns):
                w = self.head.columns(start, stop)
                tile = self.gradient(w, hidden, start, first, last)
                if d_hidden is not None:
                    accumulate(d_hidden, tile.T, w, start == 0)
                if weight and out.weight is not None:
                    add_weight(out.weight[start:stop], tile, hidden, fresh)
                if bias is not None:
                    bias[start:stop] += tile.sum(1)
            fresh = False
            if d_hidden is not None:
                self.rows.put(out.hidden, first, last, d_hidden)
        if bias is not None and bias is not out.bias:
            out.bias.copy_(bias)

    def weight_by_columns(self, out: Grads) -> None:
        for start, stop in spans(self.problem.weight.shape[0], self.plan.columns):
            w = self.head.columns(start, stop)
            total = torch.empty_like(w, memory_format=torch.contiguous_format)
            for first, last in spans(self.rows.count, self.plan.rows):
                hidden = self.hidden(first, last)
                accumulate(total, self.gradient(w, hidden, start, first, last), hidden, first == 0)
            out.weight[start:stop] = total


def held(problem: Problem, rows: Rows, c: Coefficients, needs: Needs, plan: Plan) -> tuple[Sums, Grads]:
    """Sums (n,) and gradients with the logits of a few rows held over the whole vocabulary: 6NDV operations."""
    head, classes = Head(problem), problem.weight.shape[0]
    out = new_grads(problem, rows, needs)
    chunks = spans(classes, plan.held_columns)
    buffer = problem.hidden.new_empty(plan.held_rows * classes, dtype=head.dtype)
    spare = buffer.new_empty(plan.held_rows * plan.held_columns) if head.capped else None
    bias = _bias_sum(out.bias, head)
    blocks = [_empty_sums(problem, head)]
    for first, last in spans(rows.count, plan.held_rows):
        count = last - first
        hidden, target = rows.take(problem.hidden, first, last).to(head.dtype), rows.target[first:last]
        tiles = [_tile(buffer[start * count :], stop - start, count) for start, stop in chunks]
        sums, peaks = _sweep_held(head, hidden, target, chunks, tiles, spare)
        blocks.append(sums)
        d_hidden = hidden_sum(out.hidden, rows, first, last, head)
        coefficient = c[first:last]
        for (start, stop), tile, peak in zip(chunks, tiles, peaks, strict=True):
            probs = _probabilities(head, tile, peak, sums, coefficient.prob, spare)
            tile = head.gradient(probs, tile, coefficient, target, start)
            w = head.columns(start, stop)
            if d_hidden is not None:
                accumulate(d_hidden, tile.T, w, start == 0)
            if out.weight is not None:
                add_weight(out.weight[start:stop], tile, hidden, first == 0)
            if bias is not None:
                bias[start:stop] += tile.sum(1)
        if d_hidden is not None:
            rows.put(out.hidden, first, last, d_hidden)
    if bias is not None and bias is not out.bias:
        out.bias.copy_(bias)
    return _concatenate(blocks), out


def _sweep_held(
    head: Head,
    hidden: Tensor,
    target: Tensor,
    chunks: list[tuple[int, int]],
    tiles: list[Tensor],
    spare: Tensor | None,
) -> tuple[Sums, list[Tensor]]:
    """Fill the tiles of one block with exp(z - the tile's own maximum), or with tanh where there is a cap."""
    sums, peaks = None, []
    for (start, stop), tile in zip(chunks, tiles, strict=True):
        head.product(tile, head.columns(start, stop), hidden, start)
        logits = head.logits(tile, None if spare is None else _tile(spare, *tile.shape))
        part = head.reduce(logits, target, start)
        peaks.append(part.max)
        sums = merge(sums, part)
    return sums, peaks


def _probabilities(
    head: Head, tile: Tensor, peak: Tensor, sums: Sums, coefficient: Tensor, spare: Tensor | None
) -> Tensor:
    """coefficient * softmax of a held tile (C, R), in place, or in `spare` where the tile holds tanh."""
    factor = coefficient / sums.sumexp
    highest = finite(sums.max)
    if not head.capped:
        return tile.mul_(torch.exp(peak - highest) * factor)
    return head.logits(tile, _tile(spare, *tile.shape)).sub_(highest).exp_().mul_(factor)


def new_grads(problem: Problem, rows: Rows, needs: Needs) -> Grads:
    """Unwritten gradients, zero where nothing will be written."""
    if rows.count == 0:
        make = torch.zeros
    else:
        make = torch.empty
    options = {"dtype": problem.hidden.dtype, "device": problem.hidden.device}
    hidden = weight = bias = None
    if needs.hidden:
        hidden = (make if rows.index is None else torch.zeros)(problem.hidden.shape, **options)
    if needs.weight:
        weight = make(problem.weight.shape, **options)
    if needs.bias and problem.bias is not None:
        bias = torch.zeros(problem.bias.shape, **options)
    return Grads(hidden, weight, bias)


def hidden_sum(out: Tensor | None, rows: Rows, first: int, last: int, head: Head) -> Tensor | None:
    """Where the gradient of a block's rows (R, D) is summed up: in place where the result's dtype and rows allow."""
    if out is None:
        return None
    if rows.index is None and out.dtype == head.dtype:
        return out[first:last]
    return out.new_empty((last - first, out.shape[1]), dtype=head.dtype)


def _bias_sum(out: Tensor | None, head: Head) -> Tensor | None:
    if out is None or out.dtype == head.dtype:
        return out
    return torch.zeros_like(out, dtype=head.dtype)


def accumulate(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or out += a @ b after the first time: nothing is filled with zeros beforehand."""
    if first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def add_weight(out: Tensor, tile: Tensor, hidden: Tensor, first: bool) -> None:
    """Add tile (C, R) @ hidden (R, D) to `out` (C, D); one of another dtype is written once only, so it is rounded."""
    if out.dtype == tile.dtype:
        accumulate(out, tile, hidden, first)
    else:
        out.copy_(tile @ hidden)


def _tile(buffer: Tensor, columns: int, rows: int) -> Tensor:
    return buffer[: columns * rows].view(columns, rows)


def _empty_sums(problem: Problem, head: Head) -> Sums:
    """Sums of no rows, so that there is always something to concatenate."""
    none = problem.hidden.new_empty(0, dtype=head.dtype)
    return Sums(none, none, none, none if head.smooth else None, 0.0)


def _concatenate(blocks: list[Sums]) -> Sums:
    parts = list(zip(*blocks, strict=True))
    smooth = None if parts[3][0] is None else torch.cat(parts[3])
    return Sums(*(torch.cat(p) for p in parts[:3]), smooth, blocks[-1].weight)
