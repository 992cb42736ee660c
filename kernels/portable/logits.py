# SPDX-License-Identifier: Apache-2.0
"""Logits of some rows and classes in torch operations, on any device.

In come rows of hidden and the classes that are wanted; out goes their tile (R, C) of logits in the statistics' dtype, in
memory that the caller holds. `tiles.py` makes sums and gradients of tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..combine import statistics_dtype
from ..spec import Problem

SMALLEST_WORKSPACE, LARGEST_WORKSPACE = 1 << 20, 64 << 20


class Head:
    """The weight, bias and epilogue of a problem. With a cap, a tile is first t = tanh(scale x / softcap)."""

    def __init__(self, problem: Problem) -> None:
        e = problem.epilogue
        self.weight, self.bias = problem.weight, problem.bias
        self.dtype = statistics_dtype(problem.hidden.dtype)
        self.classes, self.width = problem.weight.shape
        self.capped = e.softcap is not None
        # What the product is multiplied by: up to the tanh, or altogether.
        self.inner = e.scale * e.post_scale if e.softcap is None else e.scale / e.softcap
        self.outer = 1.0 if e.softcap is None else e.softcap * e.post_scale

    def columns(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the weight (C, D), in the statistics' dtype."""
        return self.weight[start:stop].to(self.dtype)

    def product(self, hidden: Tensor, weight: Tensor, start: int, out: Tensor) -> Tensor:
        """`out` (R, C) = scale (hidden (R, D) weight (C, D)^T + bias) of the classes from `start` on, or its tanh."""
        torch.addmm(out, hidden, weight.T, beta=0, alpha=self.inner, out=out)
        if self.bias is not None:
            out.add_(self.bias[start : start + out.shape[1]].to(self.dtype) * self.inner)
        return out.tanh_() if self.capped else out

    def logits(self, product: Tensor, out: Tensor) -> Tensor:
        """The logits (R, C) of a product, in `out` where there is a cap, which may be the product itself."""
        return torch.mul(product, self.outer, out=out) if self.capped else product


def spans(total: int, step: int) -> list[tuple[int, int]]:
    """[0, total) in pieces of `step`; the last may be shorter."""
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def squarest(
    rows: int, classes: int, elements: int, tiles: int = 1, each_row: int = 0, each_class: int = 0
) -> tuple[int, int]:
    """Rows and classes of a tile, nearly a square: `tiles` of it and what each row and class takes beside them are
    `elements`. At the least 16 rows by 64 classes."""
    edges = each_row + each_class
    side = int(((edges * edges + 4 * tiles * elements) ** 0.5 - edges) / (2 * tiles))
    height = min(rows, max(side, 16))
    width = min(classes, max((elements - each_row * height) // (tiles * height + each_class), 64))
    return min(rows, max((elements - each_class * width) // (tiles * width + each_row), 16)), width


def default_workspace(rows: int, classes: int, item: int) -> int:
    """Bytes that torch operations may hold beyond the results where nobody says how many, for logits of `item` bytes.

    A 20th of what a dense loss holds (three times the logits), from 1 to 64 MiB. Rows are what it buys, and with twice the
    rows to a block the weight and its gradient cross the memory bus half as often: from 16 to 64 MiB the time at N=4096
    D=1024 V=50257 falls by a seventh, from 64 to 256 by a twentieth.
    """
    return min(max(3 * item * rows * classes // 20, SMALLEST_WORKSPACE), LARGEST_WORKSPACE)
