"""The dense fp64 answer that every kernel is compared with. For tests only: it builds the (N, V) logits."""

from __future__ import annotations

import torch

from .spec import Grads, Needs, Problem, RowGrads, Stats


def stats(problem: Problem) -> Stats:
    """Stats in float64, differentiable through the hidden, weight and bias of `problem`."""
    p, e = problem, problem.epilogue
    z = p.hidden.double() @ p.weight.double().T
    if p.bias is not None:
        z = z + p.bias.double()
    z = z * e.scale
    if e.softcap is not None:
        z = e.softcap * torch.tanh(z / e.softcap)
    z = z * e.post_scale
    logp = z.log_softmax(-1)
    lse = z.logsumexp(-1)
    ignored = torch.zeros_like(p.target, dtype=torch.bool) if p.ignore_index is None else p.target == p.ignore_index
    nll = -logp.gather(1, p.target.masked_fill(ignored, 0)[:, None])[:, 0].masked_fill(ignored, 0)
    smooth = z.new_zeros(0)
    if p.smooth:
        w = z.new_ones(z.shape[1]) if p.class_weight is None else p.class_weight.double()
        smooth = -(logp * w).sum(-1).masked_fill(ignored, 0)
    if p.skip_ignored:
        lse = lse.masked_fill(ignored, 0)
    return Stats(nll, lse, smooth)


def forward_backward(problem: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
    """Stats and gradients in float64, by autograd."""
    wanted = [
        t.detach().double().requires_grad_(need) if t is not None else None
        for t, need in zip((problem.hidden, problem.weight, problem.bias), needs, strict=True)
    ]
    fields = {**problem.__dict__, "hidden": wanted[0], "weight": wanted[1], "bias": wanted[2]}
    out = stats(Problem(**fields))
    total = (out.nll * grads.nll.double()).sum()
    if grads.lse is not None:
        total = total + (out.lse * grads.lse.double()).sum()
    if grads.smooth is not None:
        total = total + (out.smooth * grads.smooth.double()).sum()
    leaves = [t for t in wanted if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(total, leaves)) if leaves else iter(())
    return Stats(*(t.detach() for t in out)), Grads(*(next(found) if t is not None and t.requires_grad else None for t in wanted))
