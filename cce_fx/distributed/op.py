# SPDX-License-Identifier: Apache-2.0
"""The operators of one shard of a vocabulary: local work only, so that every collective stands in the graph itself.

`cce::linear_cross_entropy_partial` sweeps the columns of this process; `cce::linear_cross_entropy_shard_backward` makes its
gradients once the whole vocabulary's norm is known. `vocab.py` puts the collectives between them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..kernels.choose import choose
from ..kernels.combine import statistics_dtype
from ..kernels.spec import Needs, Norm, Partials, Problem, RowGrads, Shard
from ..op import HEAD, HEAD_ARGS, check, fake_grads, problem_of, some

_SHARD = f"{HEAD}, int start, int total"


def shard_problem(head: tuple[object, ...], start: int, total: int) -> Problem:
    """The problem of the columns [start, start + V) of `total`; class_weight holds one entry per class of all `total`."""
    return replace(problem_of(*head), shard=Shard(start, total))  # type: ignore[arg-type]


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> None:
    check(hidden, weight, bias, target, None)  # class weights are the whole vocabulary's


@torch.library.custom_op(
    "cce::linear_cross_entropy_partial",
    mutates_args=(),
    schema=f"({_SHARD}) -> (Tensor max, Tensor sumexp, Tensor target_logit, Tensor smooth)",
)
def linear_cross_entropy_partial(*args):  # type: ignore[no-untyped-def]
    """`Partials` of hidden (N, D) over this shard's weight (V, D), which may have no rows.

    Returns max, sumexp and target_logit (N,) and smooth (N,) or (0,), in the dtype of the statistics. Raises as
    `cce::linear_cross_entropy`; a target may be any of the `total` classes.
    """
    _check(*args[:4])
    problem = shard_problem(args[:HEAD_ARGS], *args[HEAD_ARGS:])
    if problem.weight.shape[0] == 0:
        return tuple(_nothing(problem)[:4])
    return tuple(choose(problem).partial(problem)[:4])


def _nothing(problem: Problem) -> Partials:
    """The sums over no columns."""
    rows, dtype = problem.hidden.shape[0], statistics_dtype(problem.hidden.dtype)
    zero = problem.hidden.new_zeros(3 if problem.smooth else 2, rows, dtype=dtype)
    smooth = zero[2].clone() if problem.smooth else zero.new_zeros(0)
    return Partials(torch.full_like(zero[0], -torch.inf), zero[0].clone(), zero[1].clone(), smooth)


@linear_cross_entropy_partial.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    _check(*args[:4])
    hidden, smooth = args[0], args[7]
    rows, dtype = hidden.shape[0], statistics_dtype(hidden.dtype)
    return tuple(hidden.new_empty(n, dtype=dtype) for n in (rows, rows, rows, rows if smooth else 0))


@torch.library.custom_op(
    "cce::linear_cross_entropy_shard_backward",
    mutates_args=(),
    schema=(
        f"({_SHARD}, Tensor max, Tensor sumexp, Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_smooth, bool need_hidden, "
        "bool need_weight, bool need_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)"
    ),
)
def linear_cross_entropy_shard_backward(*args):  # type: ignore[no-untyped-def]
    """Gradients from this shard's columns: d_hidden (N, D) is to be summed over all shards, the others are whole.

    max and sumexp (N,) are of the whole vocabulary. A gradient that is not needed comes back empty.
    """
    problem = shard_problem(args[:HEAD_ARGS], *args[HEAD_ARGS : HEAD_ARGS + 2])
    highest, sumexp, grad_nll, *rest = args[HEAD_ARGS + 2 :]
    needs = Needs(*rest[2:])
    if problem.weight.shape[0] == 0:
        return tuple(g.zero_() for g in fake_grads(problem.hidden, problem.weight, problem.bias, *needs))
    rows = RowGrads(torch.zeros_like(highest) if grad_nll is None else grad_nll, *rest[:2])
    return some(choose(problem).backward(problem, Norm(highest, sumexp), rows, needs), problem.hidden)


@linear_cross_entropy_shard_backward.register_fake
def _(*args):  # type: ignore[no-untyped-def]
    return fake_grads(*args[:3], *args[-3:])
