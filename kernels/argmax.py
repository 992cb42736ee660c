# SPDX-License-Identifier: Apache-2.0
"""The likeliest class of each row, in torch operations on any device.

In comes a problem whose targets do not matter; out go numbers of classes. `logits.py` makes the tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .logits import Head, default_workspace, spans, squarest
from .spec import Problem


def argmax(problem: Problem) -> Tensor:
    """Numbers (N,) int64 of the largest logits, the first of equals, a NaN being the largest."""
    head, hidden, n = Head(problem), problem.hidden, problem.hidden.shape[0]
    item = head.dtype.itemsize
    size = default_workspace(n, head.classes, item) if problem.workspace is None else problem.workspace
    rows, columns = squarest(n, head.classes, size // item)
    buffer = hidden.new_empty(rows * columns, dtype=head.dtype)
    best = torch.zeros(n, dtype=torch.int64, device=hidden.device)
    for first, last in spans(n, rows):
        taken, highest = hidden[first:last].to(head.dtype), None
        for start, stop in spans(head.classes, columns):
            tile = buffer[: (last - first) * (stop - start)].view(last - first, -1)
            tile = head.product(taken, head.columns(start, stop), start, tile)
            values, index = head.logits(tile, tile).max(1)
            better = torch.ones_like(values, dtype=torch.bool)
            if highest is not None:
                better = (values > highest) | (values.isnan() & ~highest.isnan())
                values = values.where(better, highest)
            best[first:last] = torch.where(better, index + start, best[first:last])
            highest = values
    return best
