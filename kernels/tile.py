"""What is done to one tile of logits. A tile is (C, R): C columns of the vocabulary by R rows of hidden.

The vocabulary comes first because the product weight[C, D] @ hidden[R, D].T is the layout that BLAS libraries run best
while R is small, and because a chunk of the vocabulary is then one contiguous piece of memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .combine import finite, local_class_weight, statistics_dtype
from .rows import Coefficients
from .spec import Partials, Problem


class Sums(NamedTuple):
    """Per-row sums over some columns, relative to the largest logit so that none of them overflows or cancels."""

    max: Tensor  # (R,)
    sumexp: Tensor  # (R,) sum exp(z - max)
    target_logit: Tensor  # (R,) z_t, 0 where the target is not among the columns
    smooth: Tensor | None  # (R,) sum w (z - max)
    weight: float | Tensor  # sum w over the columns


class Head:
    """The weight, bias and epilogue of a problem, and the arithmetic of its tiles in the accumulation dtype."""

    def __init__(self, problem: Problem) -> None:
        e = problem.epilogue
        self.dtype = statistics_dtype(problem.hidden.dtype)
        self.weight, self.bias = problem.weight, problem.bias
        self.smooth = problem.smooth
        self.class_weight = local_class_weight(problem) if problem.smooth else None
        self.capped = e.softcap is not None
        # What the product is multiplied by: up to the tanh, or altogether.
        self.inner = e.scale / e.softcap if e.softcap is not None else e.scale * e.post_scale
        self.outer = e.softcap * e.post_scale if e.softcap is not None else 1.0

    def columns(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the weight (C, D), in the accumulation dtype and a layout that BLAS takes as it is."""
        piece = self.weight[start:stop].to(self.dtype)
        return piece if 1 in piece.stride() or piece.numel() == 0 else piece.contiguous()

    def product(self, tile: Tensor, weight: Tensor, hidden: Tensor, start: int) -> None:
        """tile (C, R) = what a tile holds: the logits, or tanh(scale x / softcap) where there is a cap."""
        torch.addmm(tile, weight, hidden.T, beta=0, alpha=self.inner, out=tile)
        if self.bias is not None:
            bias = self.bias[start : start + tile.shape[0]].to(self.dtype)
            tile.add_((bias * self.inner)[:, None])
        if self.capped:
            tile.tanh_()

    def logits(self, tile: Tensor, spare: Tensor | None) -> Tensor:
        """The logits of a tile, in place; or in `spare`, which keeps the tile's tanh for the gradient."""
        if not self.capped:
            return tile
        return torch.mul(tile, self.outer, out=tile if spare is None else spare)

    def reduce(self, logits: Tensor, target: Tensor, start: int) -> Sums:
        """Sums over a tile of logits (C, R), which becomes exp(z - max)."""
        column, inside = _locate(target, start, logits.shape[0])
        picked = logits[column, torch.arange(column.shape[0], device=column.device)]
        highest = logits.amax(0)
        logits.sub_(finite(highest))
        smooth, weight = None, 0.0
        if self.smooth:
            smooth, weight = self._weighted_sum(logits, start)
        logits.exp_()
        return Sums(highest, logits.sum(0), picked.where(inside, 0), smooth, weight)

    def _weighted_sum(self, values: Tensor, start: int) -> tuple[Tensor, float | Tensor]:
        if self.class_weight is None:
            return values.sum(0), float(values.shape[0])
        w = self.class_weight[start : start + values.shape[0]]
        return values.T @ w, w.double().sum()

    def gradient(self, probs: Tensor, tile: Tensor, c: Coefficients, target: Tensor, start: int) -> Tensor:
        """d loss / d product (C, R) from coefficient times probability, in place of `tile` (which may be `probs`)."""
        column, inside = _locate(target, start, probs.shape[0])
        row = torch.arange(column.shape[0], device=column.device)
        # Each (column, row) occurs once, so this is no accumulation and has one answer.
        probs[column, row] = probs[column, row] - c.hit.where(inside, 0)
        if c.uniform is not None:
            if self.class_weight is None:
                probs.sub_(c.uniform)
            else:
                probs.addr_(self.class_weight[start : start + probs.shape[0]], c.uniform, alpha=-1)
        if self.capped:
            tile.square_()
            torch.addcmul(probs, probs, tile, value=-1, out=tile)
        return tile


def _locate(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Where in the tile each row's target lies (R,), and whether it does (R,) bool."""
    column = target - start
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def merge(a: Sums | None, b: Sums) -> Sums:
    """Sums over the columns of both."""
    if a is None:
        return b
    highest = torch.maximum(a.max, b.max)
    shift = finite(highest)
    down_a, down_b = finite(a.max) - shift, finite(b.max) - shift
    # A part without any finite logit has sumexp 0, whatever its shift.
    sumexp = a.sumexp * torch.exp(a.max - shift) + b.sumexp * torch.exp(b.max - shift)
    smooth = None
    if a.smooth is not None and b.smooth is not None:
        smooth = (a.smooth + a.weight * down_a + b.smooth + b.weight * down_b).to(a.smooth.dtype)
    return Sums(highest, sumexp, a.target_logit + b.target_logit, smooth, a.weight + b.weight)


def partials(sums: Sums) -> Partials:
    """The public form of `sums`, whose `smooth` is of the logits themselves."""
    smooth = sums.max.new_zeros(0)
    if sums.smooth is not None:
        smooth = (sums.smooth.double() + sums.weight * finite(sums.max).double()).to(sums.max.dtype)
    return Partials(sums.max, sums.sumexp, sums.target_logit, smooth)
