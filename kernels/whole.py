# SPDX-License-Identifier: Apache-2.0
"""Small problems: all logits as one tile. There the number of torch operations takes the time, and not their size."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import Plan
from .rows import Coefficients, Rows
from .spec import Grads, Norm, Problem
from .sweeps import accumulate, add_weight
from .tile import Head, Hit, Sums

LARGEST = 1 << 18  # logits; with more, the walks over them leave the processor's caches


def fits(problem: Problem, rows: Rows, plan: Plan) -> bool:
    """Whether all logits of `rows` are few enough, and leave the workspace room for what is beside them."""
    count, classes = rows.count, problem.weight.shape[0]
    logits = count * classes
    return 0 < logits <= min(LARGEST, plan.elements - plan.beside(count, classes)) and problem.filter_eps is None


class Whole:
    """All logits of `rows`."""

    def __init__(self, problem: Problem, rows: Rows) -> None:
        self.head, self.rows, count = Head(problem), rows, rows.count
        self.hidden = self.head.rows(rows.take(problem.hidden, 0, count))
        self.weight = self.head.columns(0, self.head.classes)
        self.hit = _hit(rows)
        self.tile = self.hidden.new_empty((self.head.classes, count), dtype=self.head.dtype)
        self.head.product(self.tile, self.weight, self.head.turned(self.hidden), 0)

    def logits(self, keep: bool) -> Tensor:
        """The logits (V, n), in place of the product, which a cap's gradient needs afterwards and must `keep`."""
        return self.head.logits(self.tile, torch.empty_like(self.tile) if keep and self.head.capped else None)

    def sums(self, logits: Tensor) -> Sums:
        """Sums of the rows; the logits become exp(z - max)."""
        target_logit = logits.new_zeros(self.rows.count)
        target_logit[self.hit.row] = logits[self.hit.column, self.hit.row]
        highest, sumexp = torch.empty_like(target_logit), torch.empty_like(target_logit)
        smooth = torch.empty_like(target_logit) if self.head.smooth else None
        self.head.elementwise.exp_sums(logits, None, highest, sumexp, smooth, self.head.class_weight, True)
        return Sums(highest, sumexp, target_logit, smooth)

    def sums_and_gradients(self, c: Coefficients, out: Grads) -> Sums:
        """Sums of the rows, and their gradients into `out`: 6NDV operations, as in a dense loss."""
        logits = self.logits(keep=True)
        sums = self.sums(logits)
        self._products(logits.mul_(c.prob / sums.sumexp), c, out)
        return sums

    def gradients(self, norm: Norm, c: Coefficients, out: Grads) -> None:
        """Gradients from the norm (n,) into `out`."""
        logits = self.logits(keep=True)
        self.head.elementwise.probabilities(logits, norm.max, c.prob / norm.sumexp)
        self._products(logits, c, out)

    def _products(self, probs: Tensor, c: Coefficients, out: Grads) -> None:
        tile = self.head.gradient(probs, self.tile, c, self.hit, 0)
        if out.hidden is not None:
            d_hidden = self.rows.place(out.hidden, 0, self.rows.count, self.head.dtype)
            accumulate(d_hidden, tile.T, self.weight, True)
            self.rows.put(out.hidden, 0, self.rows.count, d_hidden)
        if out.weight is not None:
            add_weight(out.weight, tile, self.hidden, True)
        if out.bias is not None:
            out.bias.copy_(tile.sum(1))


def _hit(rows: Rows) -> Hit:
    if not rows.absent:
        return Hit(rows.target, torch.arange(rows.count, device=rows.target.device))
    row = (rows.target >= 0).nonzero()[:, 0]
    return Hit(rows.target[row], row)
