# SPDX-License-Identifier: Apache-2.0
"""The contract: what a kernel is handed, what it returns, and the maths in between.

In comes a `Problem`, one language-model head with its targets; out go statistics of its rows and gradients. `choose.py` says
which of three implementations serves it: `portable/` (torch operations), `native/` (compiled for a CPU) or `triton/` (GPUs).
Where the loss is none of the kernel's, `Products` are what is left for it to do.

The maths, for row i with logits z_i = epilogue(W h_i + b) and target t_i (Cut Cross-Entropy, arXiv 2411.09009, section 3):

    lse_i    = log sum_c exp(z_ic)
    nll_i    = lse_i - z_{i,t_i}                   = -log p_i[t_i]
    smooth_i = sum_c w_c (lse_i - z_ic)            (w = class_weight, or ones)

    dz_ic    = p_ic (g_nll + g_lse + g_smooth sum(w)) - g_nll [c = t_i] - g_smooth w_c

from which dW, dh and db follow by the epilogue's derivative and the two products. Reductions, label smoothing, class
weights and z-loss are all sums of these three per-row quantities, formed outside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Epilogue:
    """What happens to `hidden @ weight.T + bias` before the softmax, in this order.

    z = post_scale * cap(scale * (h W^T + b)),  cap(x) = softcap * tanh(x / softcap), or x where softcap is None.
    """

    scale: float = 1.0
    softcap: float | None = None
    post_scale: float = 1.0


@dataclass(frozen=True)
class Shard:
    """The columns [start, start + weight.shape[0]) of a vocabulary of `total` classes, in vocabulary parallelism."""

    start: int
    total: int


@dataclass(frozen=True)
class Problem:
    """One language-model head with its targets. N rows, hidden size D, V classes (of this shard)."""

    hidden: Tensor  # (N, D) float; any strides
    weight: Tensor  # (V, D) float, dtype of hidden; any strides
    bias: Tensor | None  # (V,) dtype of hidden, or of the statistics
    target: Tensor  # (N,) int64, classes in [0, V) or ignore_index
    epilogue: Epilogue = field(default_factory=Epilogue)
    ignore_index: int | None = -100  # rows with this target have nll = smooth = 0, and no gradient
    skip_ignored: bool = True  # ignored rows are not computed at all: their lse is 0 too, and has no gradient
    smooth: bool = False  # whether smooth_i is wanted
    top: bool = False  # whether the likeliest classes are; not of a shard
    class_weight: Tensor | None = None  # (V,) weights of smooth_i; None is ones
    shard: Shard | None = None  # this rank's part of the vocabulary; None is all of it
    workspace: int | None = None  # bytes a kernel may hold beyond its outputs; None is the kernel's default
    filter_eps: float | None = None  # None is exact
    tune: bool = False  # whether a kernel may choose its block shapes by timing them


class Partials(NamedTuple):
    """Per-row sums over one vocabulary shard; float32, or float64 for float64 inputs. Rows not computed hold 0."""

    max: Tensor  # (N,) max_c z_c
    sumexp: Tensor  # (N,) sum_c exp(z_c - max)
    target_logit: Tensor  # (N,) z_t, or 0 where the target is ignored or in another shard
    smooth: Tensor  # (N,) sum_c w_c z_c, or (0,) where Problem.smooth is False
    top: Tensor | None = None  # (N,) int64, as in Stats


class Stats(NamedTuple):
    """Per-row results; float32, or float64 for float64 inputs. Ignored rows hold 0 (see Problem.skip_ignored).

    `top` of a row with a NaN is a class of one on a CPU, and any class on a GPU.
    """

    nll: Tensor  # (N,)
    lse: Tensor  # (N,)
    smooth: Tensor  # (N,), or (0,) where Problem.smooth is False
    max: Tensor  # (N,) max_c z_c
    sumexp: Tensor  # (N,) sum_c exp(z_c - max)
    top: Tensor | None = None  # (N,) int64, the first class of the largest logit; -1 where not computed

    @property
    def norm(self) -> Norm:
        return Norm(self.max, self.sumexp)


class Norm(NamedTuple):
    """What makes logits probabilities: p_ic = exp(z_ic - max_i) / sumexp_i.

    Two numbers a row and not lse alone, whose rounding, |lse| eps, would be an error of every probability.
    """

    max: Tensor  # (N,)
    sumexp: Tensor  # (N,)


class RowGrads(NamedTuple):
    """The loss's gradient with respect to Stats, row by row, in Stats' dtype; None is zero."""

    nll: Tensor  # (N,)
    lse: Tensor | None = None  # (N,)
    smooth: Tensor | None = None  # (N,)


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool = True
    weight: bool = True
    bias: bool = True


class Grads(NamedTuple):
    """Gradients in the dtypes of the inputs; None where not wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D), contiguous
    bias: Tensor | None  # (V,)


class Kernel(Protocol):
    """What each of the three folders exports.

    Statistics are in float32 (float64 for float64 inputs), gradients in the dtypes of the inputs. ValueError for a
    workspace that is not positive, and for a shard where the whole vocabulary is needed; IndexError on a CPU for a target
    that is neither a class nor ignore_index.
    """

    def partial(self, problem: Problem) -> Partials:
        """Sums of each row over the columns of this shard."""

    def forward(self, problem: Problem) -> Stats:
        """Statistics over the whole vocabulary: `partial` and `combine.finish`."""

    def backward(self, problem: Problem, norm: Norm, grads: RowGrads, needs: Needs) -> Grads:
        """Gradients from the norm, which is of the whole vocabulary; logits are made again, tile by tile."""

    def forward_backward(self, problem: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
        """Statistics, and the gradients of sum(grads * statistics), both while a tile of logits is at hand."""


class Products(Protocol):
    """The products of one head for blocks of R rows each, for losses that somebody else computes (`cce::rows`).

    Made by `of(weight, rows)`, with weight (V, D) and R. Gradients of hidden are in its dtype, those of the weight summed up in
    float32 (float64 for float64).
    """

    tile: Tensor  # (R, V), any strides: the logits of a block, and then the gradient that they have been given

    def logits(self, hidden: Tensor) -> None:
        """tile = hidden (R, D) @ weight.T."""

    def gradients(self, hidden: Tensor, d_hidden: Tensor | None, d_weight: Tensor | None, adds: bool) -> None:
        """d_hidden (R, D) = tile @ weight and d_weight (V, D) = tile.T @ hidden, or += where it `adds`. None is not wanted."""


@dataclass(frozen=True)
class Sizes:
    """What a kernel's use of memory depends on."""

    dtype: torch.dtype
    rows: int
    classes: int
    width: int  # D
    capped: bool = False
    smooth: bool = False  # whether sums of w z are wanted
    uniform: bool = False  # whether these have a gradient
    hidden: bool = False  # gradients that are wanted
    weight: bool = False
    bias: bool = False
    workspace: int | None = None  # bytes; None is the kernel's default
