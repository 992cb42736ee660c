# SPDX-License-Identifier: Apache-2.0
"""Products for blocks of rows whose loss somebody else computes, in torch operations: `spec.Products` of any dtype and device.

In comes a weight; out go the logits of a block and, from their gradient, those of hidden and weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


class PortableProducts:
    """`spec.Products`, the tile in rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight = weight
        self.tile = weight.new_empty(rows, weight.shape[0])

    def logits(self, hidden: Tensor) -> None:
        torch.mm(hidden, self._weight.T, out=self.tile)

    def gradients(self, hidden: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, adds: bool) -> None:
        if d_hidden is not None:
            torch.mm(self.tile, self._weight, out=d_hidden)
        if d_weight is not None:
            _add_product(d_weight, self.tile.T, hidden, adds)


def _add_product(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """total = or += a @ b, which may be in half precision where the total is not."""
    if a.dtype != total.dtype and total.device.type == "cuda":
        made = torch.mm(a, b)
        total.add_(made) if adds else total.copy_(made)
    elif adds:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    else:
        torch.mm(a.to(total.dtype), b.to(total.dtype), out=total)
