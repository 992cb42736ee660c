# SPDX-License-Identifier: Apache-2.0
"""The dense float64 answer that every kernel is compared with.

In comes a `Problem`, out go statistics and gradients of the whole (N, V) logits, by autograd. For tests only, which begin in
tests/kernels/contract.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Grads, Needs, Problem, RowGrads, Stats


def logits(problem: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """The logits (N, V) by dense arithmetic in `dtype`, differentiable."""
    p, e = problem, problem.epilogue
    bias = None if p.bias is None else p.bias.to(dtype)
    z = torch.nn.functional.linear(p.hidden.to(dtype), p.weight.to(dtype), bias)
    z = z * e.scale
    if e.softcap is not None:
        z = e.softcap * torch.tanh(z / e.softcap)
    return z * e.post_scale


def stats(problem: Problem, dtype: torch.dtype = torch.float64) -> Stats:
    """Stats by dense arithmetic in `dtype`, differentiable through the hidden, weight and bias of `problem`."""
    p, z = problem, logits(problem, dtype)
    logp = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    highest = z.detach().amax(-1) if z.shape[1] else z.new_zeros(z.shape[0])
    sumexp = (z.detach() - highest.nan_to_num(neginf=0.0)[:, None]).exp().sum(-1)
    ignored = torch.zeros_like(p.target, dtype=torch.bool) if p.ignore_index is None else p.target == p.ignore_index
    nll = -logp.gather(1, p.target.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)
    smooth = z.new_zeros(0)
    if p.smooth:
        w = z.new_ones(z.shape[1]) if p.class_weight is None else p.class_weight.to(dtype)
        smooth = -(logp * w).sum(-1).masked_fill(ignored, 0)
    if p.skip_ignored:
        lse, highest, sumexp = (t.masked_fill(ignored, 0) for t in (lse, highest, sumexp))
    top = z.detach().argmax(-1) if p.top else None
    if top is not None and p.skip_ignored:
        top = top.masked_fill(ignored, -1)
    return Stats(nll, lse, smooth, highest, sumexp, top)


def forward_backward(
    problem: Problem, grads: RowGrads, needs: Needs, dtype: torch.dtype = torch.float64
) -> tuple[Stats, Grads]:
    """Stats and gradients by autograd in `dtype`; one other than float64 shows the error of a dense loss in it."""
    wanted = [
        t.detach().to(dtype).requires_grad_(need) if t is not None else None
        for t, need in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True)
    ]
    fields = {**problem.__dict__, "hidden": wanted[0], "weight": wanted[1], "bias": wanted[2]}
    out = stats(Problem(**fields), dtype)
    total = (out.nll * grads.nll.to(dtype)).sum()
    if grads.lse is not None:
        total = total + (out.lse * grads.lse.to(dtype)).sum()
    if grads.smooth is not None:
        total = total + (out.smooth * grads.smooth.to(dtype)).sum()
    leaves = [t for t in wanted if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(total, leaves)) if leaves else iter(())
    each = [next(found) if t is not None and t.requires_grad else None for t in wanted]
    return Stats(*(t if t is None else t.detach() for t in out)), Grads(*each)
