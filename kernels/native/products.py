# SPDX-License-Identifier: Apache-2.0
"""The compiled library's products for blocks of rows whose loss somebody else computes: `spec.Products` in float32.

In comes a weight; out go the logits of a block and, from their gradient, those of hidden and weight. Blocks are of a multiple of
`plan.FILL` rows. `plan.py` says in which steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import Sizes
from . import plan
from .library import Head, compiled
from .plan import FILL, MOST_THREADS, Plan
from .run import steps_taken

_WIDER = 8  # times more classes than rows of a block, from which a BLAS library loses to its copies of the weight


def serves(dtype: torch.dtype, rows: int, classes: int) -> bool:
    """Whether there is code for blocks of so many rows, and they are few beside the classes."""
    few = rows % FILL == 0 and _WIDER * rows <= classes
    return dtype == torch.float32 and few and compiled(dtype) is not None


class NativeProducts:
    """`spec.Products`; the tile lies in memory as (V, R), which is how the gradients' products read it."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight, self._rows = weight, rows
        self._classes, self._width = weight.shape
        self._logits = weight.new_empty(self._classes, rows)
        self.tile = self._logits.T
        self._workspace = weight.new_empty(0)

    def logits(self, hidden: Tensor) -> None:
        self._take(plan.products(self._sizes(), self._threads), hidden)

    def gradients(self, hidden: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, adds: bool) -> None:
        sizes = self._sizes(hidden=d_hidden is not None, weight=d_weight is not None)
        self._take(plan.given(sizes, self._threads, adds), hidden, d_hidden, d_weight)

    @property
    def _threads(self) -> int:
        return min(torch.get_num_threads(), MOST_THREADS)

    def _sizes(self, hidden: bool = False, weight: bool = False) -> Sizes:
        return Sizes(self._weight.dtype, self._rows, self._classes, self._width, hidden=hidden, weight=weight)

    def _take(
        self, chosen: Plan, hidden: Tensor, d_hidden: Tensor | None = None, d_weight: Tensor | None = None
    ) -> None:
        assert all(g is None or g.is_contiguous() for g in (d_hidden, d_weight))
        if self._workspace.numel() < chosen.size:
            self._workspace = self._weight.new_empty(chosen.size)
        code = compiled(self._weight.dtype)
        assert code is not None
        head = Head(
            weight=self._weight.data_ptr(), weight_row=self._weight.stride(0), weight_column=self._weight.stride(1),
            hidden=hidden.data_ptr(), hidden_row=hidden.stride(0), hidden_column=hidden.stride(1),
            classes=self._classes, width=self._width, inner=1.0, outer=1.0, logits=self._logits.data_ptr(),
            d_hidden=None if d_hidden is None else d_hidden.data_ptr(),
            d_weight=None if d_weight is None else d_weight.data_ptr(),
            workspace=self._workspace.data_ptr(), workspace_size=chosen.size, threads=chosen.threads, columns=chosen.columns,
        )  # fmt: skip
        steps_taken(code, head, chosen)
