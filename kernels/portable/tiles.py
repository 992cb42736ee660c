# SPDX-License-Identifier: Apache-2.0
"""Sums and gradients of some rows, tile by tile: R rows of hidden by C classes of the vocabulary.

In come a problem and the rows of it to compute (`rows.py`); out go their sums, and gradients into memory that is there. Where
the workspace holds the logits of 64 rows or more, a tile spans the whole vocabulary, and its gradient follows at once: three
products of 2NDV operations. Where it does not, the sums of all tiles come first, and the gradients make each tile again.
`logits.py` makes a tile, and `combine.py` statistics out of sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..combine import finite, local_class_weight, statistics_dtype
from ..rows import Coefficients, Rows
from ..spec import Grads, Norm, Partials, Problem, Sizes
from .logits import Head, default_workspace, spans, squarest

_FEWEST_ROWS = 64  # to a tile of all classes: with fewer, products are so slow that making the logits twice is faster
_MULTIPLE = 16  # of rows: BLAS wastes what is left over
_CACHED = 1 << 17  # elements of a tile that elementwise operations take at a time, one after the other
# Below these arguments exp is denormal or near it: a processor takes 20 times as long to make such a number, and as long
# again to multiply it, and no sum that holds exp(0) can see it. (The powers of ten are just above exp of the argument.)
_EXP_FLOOR = {torch.float32: (-75.0, 2.7e-33), torch.float64: (-690.0, 2.2e-300)}


@dataclass(frozen=True)
class Plan:
    """Rows and classes of a tile, and what is held of the workspace, in elements of the statistics' dtype."""

    rows: int
    classes: int
    elements: int


def make_plan(s: Sizes, gathers: bool = False) -> Plan:
    """The largest tile that fits into the workspace, at the least 16 rows by 64 classes; `gathers` where rows are left out."""
    exact = statistics_dtype(s.dtype)
    budget = (
        default_workspace(s.rows, s.classes, exact.itemsize) if s.workspace is None else s.workspace
    ) // exact.itemsize
    converts = s.dtype != exact
    tiles = 1 + s.capped
    # Copies: numbers that are converted or gathered, and their gradients before these are rounded or scattered.
    each_row = (converts or gathers) * (1 + s.hidden) * s.width
    each_class = converts * (1 + s.weight) * s.width
    rows, classes = min(s.rows, (budget - each_class * s.classes) // (tiles * s.classes + each_row)), s.classes
    if rows < min(s.rows, _FEWEST_ROWS):
        rows, classes = squarest(s.rows, s.classes, budget, tiles, each_row, each_class)
    if rows < s.rows:  # the last block of several may have few rows, so they are as equal as can be
        rows = max(rows // _MULTIPLE * _MULTIPLE, 1)
        rows = min(rows, -(-s.rows // -(-s.rows // rows) // _MULTIPLE) * _MULTIPLE)
    return Plan(rows, classes, tiles * rows * classes + each_row * rows + each_class * classes)


def needed(sizes: Sizes, again: bool) -> int:
    """Bytes of the workspace that a loss of `sizes` takes at the most; `again`: gradients in a backward of their own."""
    return make_plan(sizes).elements * statistics_dtype(sizes.dtype).itemsize


def sums(problem: Problem, rows: Rows) -> Partials:
    """Partials (n,) of the computed rows, `smooth` in float64."""
    tiles = _Tiles(problem, rows, Grads(None, None, None))
    return _joined([tiles.sums(*block) for block in tiles.blocks])


def gradients(problem: Problem, rows: Rows, norm: Norm, c: Coefficients, out: Grads) -> None:
    """Write the gradients of the computed rows from their norm (n,)."""
    tiles = _Tiles(problem, rows, out, c)
    for first, last in tiles.blocks:
        tiles.by_rows(first, last, _part(norm, first, last), out._replace(weight=None) if tiles.rounds else out)
    if tiles.rounds:
        tiles.by_columns(norm, out.weight)


def sums_and_gradients(problem: Problem, rows: Rows, c: Coefficients, out: Grads) -> Partials:
    """Partials (n,) of the computed rows, and their gradients."""
    tiles = _Tiles(problem, rows, out, c)
    if len(tiles.chunks) > 1 or tiles.rounds:
        del tiles  # and its memory
        found = sums(problem, rows)
        gradients(problem, rows, Norm(found.max, found.sumexp), c, out)
        return found
    parts = []
    for first, last in tiles.blocks:
        parts.append(tiles.sums(first, last))
        tiles.by_rows(first, last, Norm(parts[-1].max, parts[-1].sumexp), out, made=True)
    return _joined(parts)


class _Tiles:
    """The tiles of a problem, one at a time in the same memory."""

    def __init__(self, problem: Problem, rows: Rows, out: Grads, c: Coefficients | None = None) -> None:
        p = problem
        self.problem, self.rows, self.c, self.head = p, rows, c, Head(p)
        self.weights = local_class_weight(p) if p.smooth else None
        if p.smooth and self.weights is None:
            self.weights = p.hidden.new_ones(self.head.classes, dtype=self.head.dtype)
        wanted = {"hidden": out.hidden is not None, "weight": out.weight is not None, "workspace": p.workspace}
        sizes = Sizes(p.hidden.dtype, rows.count, *p.weight.shape, self.head.capped, **wanted)
        plan = make_plan(sizes, gathers=rows.index is not None)
        self.blocks, self.chunks = spans(rows.count, plan.rows), spans(self.head.classes, plan.classes)
        # What is rounded is written once: not block by block.
        self.rounds = out.weight is not None and out.weight.dtype != self.head.dtype and len(self.blocks) > 1
        self.buffer = p.hidden.new_empty(plan.rows * plan.classes, dtype=self.head.dtype)
        self.spare = torch.empty_like(self.buffer) if self.head.capped else self.buffer

    def hidden(self, first: int, last: int) -> Tensor:
        return self.rows.take(self.problem.hidden, first, last).to(self.head.dtype)

    def tile(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Memory of a product (R, C), and of its logits, which is the same where there is no cap."""
        product, logits = (buffer[: rows * columns].view(rows, columns) for buffer in (self.buffer, self.spare))
        return product, logits

    def targets(self, first: int, last: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The targets in a tile: their rows and classes (k,) within it."""
        target = self.rows.target[first:last]
        row = ((target >= start) & (target < stop)).nonzero()[:, 0]
        return row, target[row] - start

    def sums(self, first: int, last: int) -> Partials:
        """Partials of rows first..last. A tile of all classes holds exp(z - max) afterwards."""
        hidden, head = self.hidden(first, last), self.head
        highest = hidden.new_full((last - first,), -torch.inf)
        sumexp, target_logit = torch.zeros_like(highest), torch.zeros_like(highest)
        smooth = hidden.new_zeros(last - first if self.problem.smooth else 0, dtype=torch.float64)
        best = torch.zeros_like(highest, dtype=torch.int64) if self.problem.top else None
        for start, stop in self.chunks:
            product, z = self.tile(last - first, stop - start)
            head.logits(head.product(hidden, head.columns(start, stop), start, product), z)
            row, column = self.targets(first, last, start, stop)
            target_logit[row] = z[row, column]
            for piece in _pieces(z):
                before = highest[piece]
                if best is None:
                    top = torch.maximum(before, z[piece].amax(1))
                else:
                    found, at = z[piece].max(1)
                    better = (found > before) | (found.isnan() & ~before.isnan())
                    best[piece], top = torch.where(better, at + start, best[piece]), torch.where(better, found, before)
                shift = finite(top)
                z[piece] -= shift[:, None]
                if self.weights is not None:
                    w = self.weights[start:stop]
                    smooth[piece] += torch.mv(z[piece], w).double() + w.double().sum() * shift.double()
                sumexp[piece] = sumexp[piece] * exp_(before - shift) + exp_(z[piece]).sum(1)
                highest[piece] = top
        return Partials(highest, sumexp, target_logit, smooth, best)

    def gradient(self, product: Tensor, z: Tensor, first: int, start: int, norm: Norm) -> Tensor:
        """d loss / d product (R, C) in the place of z, the tile's exp(z - max)."""
        last, stop = first + z.shape[0], start + z.shape[1]
        c = self.c[first:last]
        z *= (c.prob / norm.sumexp)[:, None]
        row, column = self.targets(first, last, start, stop)
        z[row, column] -= c.hit[row]
        if c.uniform is not None:
            z.addr_(c.uniform, self.weights[start:stop], alpha=-1)
        if self.head.capped:
            torch.addcmul(z, z, product.square_(), value=-1, out=z)
        return z

    def make_gradient(self, hidden: Tensor, weight: Tensor, first: int, start: int, norm: Norm) -> Tensor:
        """The same (R, C) from the beginning; `norm` (R,) is that of the tile's rows."""
        product, z = self.tile(len(hidden), len(weight))
        self.head.logits(self.head.product(hidden, weight, start, product), z)
        for piece in _pieces(z):
            exp_(z[piece].sub_(norm.max[piece][:, None]))
        return self.gradient(product, z, first, start, norm)

    def by_rows(self, first: int, last: int, norm: Norm, out: Grads, made: bool = False) -> None:
        """Write or add what rows first..last give, from their `norm` (R,). Their exp(z - max) may be `made` already."""
        hidden = self.hidden(first, last)
        d_hidden = None if out.hidden is None else self.rows.place(out.hidden, first, last, self.head.dtype)
        for start, stop in self.chunks:
            weight = self.head.columns(start, stop)
            if made:
                d = self.gradient(*self.tile(len(hidden), len(weight)), first, start, norm)
            else:
                d = self.make_gradient(hidden, weight, first, start, norm)
            if d_hidden is not None:
                _add_product(d_hidden, d, weight, start == 0)
            if out.weight is not None:
                _add_product(out.weight[start:stop], d.T, hidden, first == 0)
            if out.bias is not None:
                out.bias[start:stop] += d.sum(0)
            del weight, d  # before there are others
        if d_hidden is not None:
            self.rows.put(out.hidden, first, last, d_hidden)

    def by_columns(self, norm: Norm, d_weight: Tensor) -> None:
        """The gradient of the weight in half precision, each chunk of it summed up over all rows."""
        for start, stop in self.chunks:
            weight = self.head.columns(start, stop)
            total = torch.empty_like(weight, memory_format=torch.contiguous_format)
            for first, last in self.blocks:
                hidden = self.hidden(first, last)
                d = self.make_gradient(hidden, weight, first, start, _part(norm, first, last))
                _add_product(total, d.T, hidden, first == 0)
            d_weight[start:stop] = total
            del weight, total  # before there are others


def exp_(x: Tensor) -> Tensor:
    """exp of x, at most 0 or not finite, in place; exactly zero below the floor of x's dtype, NaN where x is NaN."""
    argument, value = _EXP_FLOOR[x.dtype]
    return F.threshold_(x.clamp_min_(argument).exp_(), value, 0.0)


def _add_product(out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """out = a @ b, or out += a @ b after the `first` time: nothing is filled with zeros beforehand."""
    if out.dtype != a.dtype:
        out.copy_(a @ b)
    elif first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def _pieces(tile: Tensor) -> Iterator[slice]:
    """Rows of a tile, as many at a time as stay in a processor's cache through several operations."""
    return (slice(*piece) for piece in spans(len(tile), max(_CACHED // max(tile.shape[1], 1), 1)))


def _part(norm: Norm, first: int, last: int) -> Norm:
    return Norm(norm.max[first:last], norm.sumexp[first:last])


def _joined(parts: list[Partials]) -> Partials:
    return Partials(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))
