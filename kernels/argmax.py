# SPDX-License-Identifier: Apache-2.0
"""The likeliest class of each row, in torch operations over tiles: any device."""

from __future__ import annotations

import torch
from torch import Tensor

from .plan import make_plan, spans
from .rows import select
from .spec import Needs, Problem
from .sweeps import tile_of
from .tile import Head


def argmax(problem: Problem) -> Tensor:
    """Numbers (N,) int64 of the largest logits, the first of equals, a NaN being the largest; targets are not looked at."""
    head, rows = Head(problem), select(problem)
    plan = make_plan(problem, rows, Needs(False, False, False))
    buffer = problem.hidden.new_empty(plan.rows * plan.columns, dtype=head.dtype)
    best = problem.hidden.new_empty(rows.count, dtype=head.dtype)
    where = torch.zeros(rows.count, dtype=torch.int64, device=best.device)
    for first, last in spans(rows.count, plan.rows):
        turned = head.turned(problem.hidden[first:last])
        for start, stop in spans(head.classes, plan.columns):
            tile = tile_of(buffer, stop - start, last - first)
            head.product(tile, head.columns(start, stop), turned, start)
            values, index = head.logits(tile, None).max(0)
            if start:
                better = (values > best[first:last]) | (values.isnan() & ~best[first:last].isnan())
                values = torch.where(better, values, best[first:last])
                index = torch.where(better, index + start, where[first:last])
            best[first:last], where[first:last] = values, index
    return where
