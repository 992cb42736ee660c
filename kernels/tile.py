# SPDX-License-Identifier: Apache-2.0
"""What is done to one tile of logits. A tile is (C, R): C columns of the vocabulary by R rows of hidden.

The vocabulary comes first because the product weight[C, D] @ hidden[R, D].T is the layout that BLAS libraries run best
while R is small, and because a chunk of the vocabulary is then one contiguous piece of memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import halves
from .combine import finite, local_class_weight, statistics_dtype
from .elementwise import exp_
from .native.walks import elementwise
from .rows import Coefficients
from .spec import Partials, Problem


class Sums(NamedTuple):
    """Per-row sums over all columns, relative to the largest logit so that none of them overflows or cancels."""

    max: Tensor  # (R,)
    sumexp: Tensor  # (R,) sum exp(z - max)
    target_logit: Tensor  # (R,) z_t, 0 where the target is not among the columns
    smooth: Tensor | None  # (R,) sum w (z - max)


class Hit(NamedTuple):
    """The targets that lie in one tile."""

    column: Tensor  # (k,) int64 within the tile
    row: Tensor  # (k,) int64 within the tile, no two alike


class Head:
    """The weight, bias and epilogue of a problem, and the arithmetic of its tiles in the accumulation dtype."""

    def __init__(self, problem: Problem) -> None:
        e = problem.epilogue
        self.dtype = statistics_dtype(problem.hidden.dtype)
        self.operand = problem.hidden.dtype if halves.usable(problem) else self.dtype  # what goes into products
        self.weight, self.bias = problem.weight, problem.bias
        self.classes = problem.weight.shape[0]
        self.smooth = problem.smooth
        self.class_weight = local_class_weight(problem) if problem.smooth else None
        self.elementwise = elementwise(problem)
        self.capped = e.softcap is not None
        # What the product is multiplied by: up to the tanh, or altogether.
        self.inner = e.scale / e.softcap if e.softcap is not None else e.scale * e.post_scale
        self.outer = e.softcap * e.post_scale if e.softcap is not None else 1.0

    def columns(self, start: int, stop: int) -> Tensor:
        """Rows start..stop of the weight (C, D), as a product's operand in a layout that BLAS takes as it is."""
        piece = self.rows(self.weight[start:stop])
        return piece if 1 in piece.stride() or piece.numel() == 0 else piece.contiguous()

    def rows(self, values: Tensor) -> Tensor:
        """Rows (.., D) of hidden or of the weight as a product's operand."""
        values = values.to(self.operand)
        return values if self.operand == self.dtype else halves.rows_of(values)

    def turned(self, hidden: Tensor) -> Tensor:
        """hidden (R, D) as the operand (D, R) of `product`."""
        turned = hidden.to(self.operand).T
        return turned if self.operand == self.dtype else halves.rows_of(turned)

    def product(self, tile: Tensor, weight: Tensor, turned: Tensor, start: int) -> None:
        """tile (C, R) = what a tile holds: the logits, or tanh(scale x / softcap) where there is a cap."""
        if self.operand == self.dtype:
            torch.addmm(tile, weight, turned, beta=0, alpha=self.inner, out=tile)
        else:
            halves.product(tile, weight, turned, add=False)
            if self.inner != 1.0:
                tile.mul_(self.inner)
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

    def uniform(self, start: int, stop: int) -> Tensor:
        """The weights w (C,) of the uniform part of a chunk's classes."""
        if self.class_weight is None:
            return torch.ones(stop - start, dtype=self.dtype, device=self.weight.device)
        return self.class_weight[start:stop]

    def gradient(self, probs: Tensor, tile: Tensor, c: Coefficients, hit: Hit | None, start: int) -> Tensor:
        """d loss / d product (C, R) from coefficient times probability, in place of `tile` (which may be `probs`)."""
        if hit is not None:
            probs[hit.column, hit.row] = probs[hit.column, hit.row] - c.hit[hit.row]
        if c.uniform is not None:
            if self.class_weight is None:
                probs.sub_(c.uniform)
            else:
                probs.addr_(self.class_weight[start : start + probs.shape[0]], c.uniform, alpha=-1)
        if self.capped:
            tile.square_()
            torch.addcmul(probs, probs, tile, value=-1, out=tile)
        return tile


def locate(target: Tensor, chunks: list[tuple[int, int]]) -> list[Hit | None]:
    """The targets (R,) of a block by chunk of columns; one that is -1 is in none."""
    ordered, row = target.sort(stable=True)
    edges = [start for start, _ in chunks] + [chunks[-1][1]]
    cuts = torch.searchsorted(ordered, torch.tensor(edges, device=target.device)).tolist()
    return [
        Hit(ordered[low:high] - start, row[low:high]) if low < high else None
        for (start, _), low, high in zip(chunks, cuts[:-1], cuts[1:], strict=True)
    ]


class Collector:
    """Gathers the sums of a block of R rows, tile by tile."""

    def __init__(self, head: Head, rows: int, tiles: int, keep: bool) -> None:
        self.head, self.keep = head, keep
        options = {"dtype": head.dtype, "device": head.weight.device}
        self.max = torch.empty(tiles, rows, **options)  # up to and with each tile
        self.sumexp = torch.empty(tiles, rows, **options)
        self.target_logit = torch.zeros(rows, **options)
        self.smooth = torch.empty(tiles, rows, **options) if head.smooth else None
        self.weight: list[float | Tensor] = [0.0] * tiles

    def add(self, number: int, logits: Tensor, hit: Hit | None, start: int) -> None:
        """Take in tile `number`, logits (C, R) from column `start` on.

        They become exp(z - the maximum so far), or, where they need not be kept, nothing in particular.
        """
        if hit is not None:
            self.target_logit[hit.row] = logits[hit.column, hit.row]
        weights = weighted = None
        if self.smooth is not None:
            weighted = self.smooth[number]
            if self.head.class_weight is not None:
                weights = self.head.class_weight[start : start + logits.shape[0]]
            self.weight[number] = float(logits.shape[0]) if weights is None else weights.double().sum()
        before = self.max[number - 1] if number else None
        highest, sums = self.max[number], self.sumexp[number]
        self.head.elementwise.exp_sums(logits, before, highest, sums, weighted, weights, self.keep)

    def rescale(self, number: int) -> Tensor:
        """What sums (R,) over the tiles before `number` are multiplied by to be relative to its maximum."""
        return exp_(self.max[number - 1] - finite(self.max[number]))

    def sums(self) -> Sums:
        highest = self.max[-1].clone()
        shift = finite(highest)
        # A tile without any finite logit has sumexp 0, whatever it was shifted by.
        sumexp = self.sumexp.mul_((self.max - shift).exp_()).sum(0)
        smooth = None
        if self.smooth is not None:
            weight = torch.stack([torch.as_tensor(w, dtype=torch.float64, device=shift.device) for w in self.weight])
            down = finite(self.max).double() - shift.double()
            smooth = (self.smooth.double() + weight[:, None] * down).sum(0).to(shift.dtype)
        return Sums(highest, sumexp, self.target_logit, smooth)


def partials(sums: Sums, weight: float | Tensor) -> Partials:
    """The public form of `sums`, whose `smooth` is of the logits themselves; `weight` is the columns' sum of w."""
    smooth = sums.max.new_zeros(0)
    if sums.smooth is not None:
        smooth = (sums.smooth.double() + weight * finite(sums.max).double()).to(sums.max.dtype)
    return Partials(sums.max, sums.sumexp, sums.target_logit, smooth)


def concatenate(blocks: list[Sums], problem: Problem) -> Sums:
    """Sums of all blocks' rows; of no rows where there are no blocks."""
    none = problem.hidden.new_empty(0, dtype=statistics_dtype(problem.hidden.dtype))
    parts = list(zip(Sums(none, none, none, none if problem.smooth else None), *blocks, strict=True))
    return Sums(*(torch.cat(p) for p in parts[:3]), torch.cat(parts[3]) if problem.smooth else None)
