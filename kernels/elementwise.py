# SPDX-License-Identifier: Apache-2.0
"""What is done to each entry of a tile of logits (C, R): in torch operations, and compiled where that pays (`native`)."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .combine import finite

# Below these arguments exp is denormal or near it: a processor takes 20 times as long to make such a number, and as long
# again to multiply it, and no sum that holds exp(0) can see it. (The powers of ten are just above exp of the argument.)
_EXP_FLOOR = {torch.float32: (-75.0, 2.7e-33), torch.float64: (-690.0, 2.2e-300)}


def exp_(x: Tensor) -> Tensor:
    """exp of x, at most 0 or not finite, in place; exactly zero below the floor of x's dtype, NaN where x is NaN."""
    argument, value = _EXP_FLOOR[x.dtype]
    return F.threshold_(x.clamp_min_(argument).exp_(), value, 0.0)


class Elementwise(Protocol):
    """The two walks over a tile that kernels make. Tiles are contiguous, everything in the accumulation dtype."""

    def exp_sums(
        self,
        tile: Tensor,  # (C, R) logits z; exp(z - highest) afterwards, or with keep=False anything
        before: Tensor | None,  # (R,) the maxima of earlier tiles
        highest: Tensor,  # (R,) to be written: the larger of `before` and max_c z
        sums: Tensor,  # (R,) to be written: sum_c exp(z - highest)
        weighted: Tensor | None,  # (R,) to be written, where wanted: sum_c w_c (z - highest)
        weights: Tensor | None,  # (C,) w; None is ones
        keep: bool,
    ) -> None: ...

    def probabilities(self, tile: Tensor, highest: Tensor, factor: Tensor) -> None:
        """tile (C, R) = exp(tile - highest (R,)) * factor (R,)."""


class Torch:
    """In torch operations: any device, any dtype."""

    def exp_sums(
        self, tile: Tensor, before: Tensor | None, highest: Tensor, sums: Tensor, weighted: Tensor | None,
        weights: Tensor | None, keep: bool,
    ) -> None:  # fmt: skip
        torch.amax(tile, 0, out=highest)
        if before is not None:
            torch.maximum(highest, before, out=highest)
        tile.sub_(finite(highest))
        if weighted is not None and weights is None:
            torch.sum(tile, 0, out=weighted)
        elif weighted is not None:
            torch.mv(tile.T, weights, out=weighted)
        torch.sum(exp_(tile), 0, out=sums)

    def probabilities(self, tile: Tensor, highest: Tensor, factor: Tensor) -> None:
        exp_(tile.sub_(highest)).mul_(factor)
