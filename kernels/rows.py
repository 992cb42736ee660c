# SPDX-License-Identifier: Apache-2.0
"""Which rows are computed, and with which coefficients their logits' gradients are made.

In come a problem's targets and the loss's gradient row by row; out go `Rows` and `Coefficients`, which `entry.py` hands to the
functions of an implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import statistics_dtype, total_weight
from .spec import Problem, RowGrads


@dataclass(frozen=True)
class Rows:
    """The n rows of a problem that are computed, in order."""

    count: int  # n
    index: Tensor | None  # (n,) int64, their numbers among the N rows; None is all of them
    skipped: Tensor | None  # (N - n,) int64, the numbers of the others
    target: Tensor  # (n,) int64, the column of this shard, or -1: ignored, or in another shard
    valid: Tensor | None  # (n,) bool, False for an ignored row that is computed all the same; None is all True
    poisoned: Tensor | None  # (n,) bool, True for an ignored row that spreads NaN although its lse is masked
    absent: bool = True  # whether a target may be -1

    def take(self, values: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop of (N, ...) `values`: a view where all rows are computed, else a copy."""
        return values[start:stop] if self.index is None else values.index_select(0, self.index[start:stop])

    def put(self, out: Tensor, start: int, stop: int, values: Tensor) -> None:
        """Write rows start..stop of (N, ...) `out`; nothing to do for a view that `place` gave."""
        if self.index is not None:
            out.index_copy_(0, self.index[start:stop], values.to(out.dtype))
        elif values.dtype != out.dtype:
            out[start:stop].copy_(values)

    def place(self, out: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Where to sum up rows start..stop (R, D) in `dtype`: in `out` itself if its rows and dtype allow that."""
        if self.index is None and out.dtype == dtype:
            return out[start:stop]
        return out.new_empty((stop - start, out.shape[1]), dtype=dtype)


def select(problem: Problem, every: bool = False) -> Rows:
    """The rows of `problem` to compute; `every` leaves none out.

    An ignored row is left out where `skip_ignored` allows it, unless its hidden state is not finite: such a row makes
    every gradient NaN in a dense loss, and a run that has diverged should show it here too.

    Raises IndexError on CPU for a target that is neither a class nor ignore_index; other devices assert by themselves.
    """
    target = problem.target
    if _all_classes(problem):
        return Rows(target.shape[0], None, None, target, None, None, absent=False)
    valid = None if problem.ignore_index is None else target != problem.ignore_index
    _check_bounds(problem, valid)
    index = skipped = poisoned = None
    if valid is not None and problem.skip_ignored:
        poisoned = ~(valid | problem.hidden.sum(1).isfinite())
        keep = valid | poisoned
        if not every and not bool(keep.all()):
            index, skipped = keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]
            target, valid, poisoned = target[index], valid[index], poisoned[index]
    if valid is not None:
        target = target.masked_fill(~valid, -1)
    if problem.shard:
        target = target - problem.shard.start
        target = target.masked_fill((target < 0) | (target >= problem.weight.shape[0]), -1)
    return Rows(target.shape[0], index, skipped, target, valid, poisoned)


def _all_classes(problem: Problem) -> bool:
    """Whether every target is a class of this weight, and no class is ignored: the common case, told by one operation."""
    target, classes, ignore = problem.target, problem.weight.shape[0], problem.ignore_index
    may_ignore = ignore is not None and 0 <= ignore < classes
    if target.device.type != "cpu" or target.numel() == 0 or problem.shard or may_ignore:
        return False
    lowest, highest = torch.aminmax(target)
    return int(lowest) >= 0 and int(highest) < classes


def _check_bounds(problem: Problem, valid: Tensor | None) -> None:
    if problem.target.device.type != "cpu" or problem.target.numel() == 0:
        return
    classes = problem.shard.total if problem.shard else problem.weight.shape[0]
    bad = (problem.target < 0) | (problem.target >= classes)
    if valid is not None:
        bad &= valid
    if bool(bad.any()):
        raise IndexError(f"Target {int(problem.target[bad][0])} is out of bounds.")


@dataclass(frozen=True)
class Coefficients:
    """dx_ic = prob_i p_ic - hit_i [c = t_i] - uniform_i w_c, for the product x before the epilogue (softcap aside)."""

    prob: Tensor  # (n,)
    hit: Tensor  # (n,)
    uniform: Tensor | None  # (n,), or None where `smooth` has no gradient

    def __getitem__(self, rows: slice) -> Coefficients:
        return Coefficients(self.prob[rows], self.hit[rows], None if self.uniform is None else self.uniform[rows])


def coefficients(problem: Problem, rows: Rows, grads: RowGrads) -> Coefficients:
    """Coefficients of the computed rows, in the dtype of the statistics.

    Ignored rows get exact zeros, whatever their incoming gradients are: NaN too, as a mean over no rows gives. Those whose
    hidden state is not finite get NaN, which 0 times their softmax is.
    """
    dtype = statistics_dtype(problem.hidden.dtype)
    chain = problem.epilogue.scale * problem.epilogue.post_scale

    def chosen(grad: Tensor | None, ignored_too: bool = False) -> Tensor | None:
        if grad is None:
            return None
        grad = rows.take(grad, 0, problem.target.shape[0]).to(dtype)
        grad = grad if chain == 1.0 else grad * chain
        return grad if rows.valid is None or ignored_too else grad.masked_fill(~rows.valid, 0)

    nll = chosen(grads.nll)
    lse = chosen(grads.lse, ignored_too=not problem.skip_ignored)
    smooth = chosen(grads.smooth) if problem.smooth else None
    prob = nll
    if lse is not None:
        prob = prob + lse
    if smooth is not None:
        prob = prob + (smooth.double() * total_weight(problem)).to(dtype)
    if rows.poisoned is not None:
        prob = prob.masked_fill(rows.poisoned, torch.nan)
    return Coefficients(prob, nll, smooth)
