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


# Powers of the square root of two, nearly, by which numbers up to one are told apart, down to 1.5 * 2^-32.
LEVELS = 64
_ONE = 254  # the exponent of 1.0 and the first bit of its mantissa
_SLICE = 256  # columns


class Elementwise(Protocol):
    """The walks over a tile that kernels make. Tiles are contiguous, everything in the accumulation dtype."""

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

    def levels(self, tile: Tensor, factor: Tensor, levels: Tensor, sums: Tensor, mass: Tensor) -> None:
        """Sort the columns of p = tile (C, R) * factor (R,), all in [0, 1], by their mean.

        levels (C,) uint8 becomes 0 where it was not 0, and else how many factors of about sqrt(2) the mean is below one,
        at most LEVELS - 1. sums (C,) = sum_i p_ci. mass (LEVELS, R) += p of the columns of each level.
        """

    def keep(self, tile: Tensor, index: Tensor, factor: Tensor) -> Tensor:
        """The beginning of the tile (C, R), which becomes columns `index` (K,), ascending, times factor (R,)."""


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

    def levels(self, tile: Tensor, factor: Tensor, levels: Tensor, sums: Tensor, mass: Tensor) -> None:
        for start in range(0, tile.shape[0], _SLICE):
            p, level = tile[start : start + _SLICE] * factor, levels[start : start + _SLICE]
            mean = torch.sum(p, 1, out=sums[start : start + _SLICE]) / p.shape[1]
            bits = mean.float().view(torch.int32) >> 22
            level.copy_((_ONE - bits).clamp_(0, LEVELS - 1).masked_fill_(level != 0, 0))
            mass.index_add_(0, level.long(), p)

    def keep(self, tile: Tensor, index: Tensor, factor: Tensor) -> Tensor:
        for start in range(0, len(index), _SLICE):  # a column never moves to a place that is still to be read
            chosen = index[start : start + _SLICE]
            tile[start : start + len(chosen)] = tile.index_select(0, chosen).mul_(factor)
        return tile[: len(index)]
