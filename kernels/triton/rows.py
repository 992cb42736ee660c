# SPDX-License-Identifier: Apache-2.0
"""Which rows are computed, found on the device: no host synchronisation and no size that depends on data.

The kept rows are numbered by a prefix sum, and their numbers, targets and gradient coefficients are written to the
front of N-sized buffers, with their count beside them. Every later kernel is launched for N rows; a program whose block
starts at or after the count ends at once. This is safe to capture in a CUDA graph, which may be replayed with other
targets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine import statistics_dtype, total_weight
from ..spec import Norm, Problem, RowGrads
from .device import launch


@dataclass(frozen=True)
class Rows:
    """The kept rows, in order, at the front of (N,) buffers whose rest is undefined, or 0 for index and coefficients.

    dx_ic = prob_i exp(z_ic - max_i) - hit_i [c = column_i] - uniform_i w_c, for the product x before the epilogue
    (softcap aside).
    """

    index: Tensor  # (N,) int32, their numbers
    column: Tensor  # (N,) int32, the target among this shard's columns, or -1
    state: Tensor  # (2,) int32: how many are kept; 1 if every target is a class or ignored, else 0
    max: Tensor | None = None  # (N,) largest logit, where the norm is known
    prob: Tensor | None = None  # (N,) divided by sumexp, where the norm is known
    hit: Tensor | None = None  # (N,)
    uniform: Tensor | None = None  # (N,), None where `smooth` has no gradient
    unit: Tensor | None = None  # (1,) what every gradient still has to be multiplied by; None is 1
    packed: Tensor | None = None  # (N, D) their hidden states, row 0 after them; for tensor descriptors


@triton.jit
def _select(
    target,
    row_sum,
    row_max,
    row_sumexp,
    grad_nll,
    grad_lse,
    grad_smooth,
    total,
    index,
    column,
    state,
    kept_max,
    prob,
    hit,
    uniform,
    N,
    V,
    first,
    classes,
    ignore_index,
    CHAIN: tl.constexpr,
    IGNORE: tl.constexpr,
    SKIP: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = 0
    wrong = 0
    for start in range(0, N, BLOCK):
        row = start + tl.arange(0, BLOCK)
        inside = row < N
        t = tl.load(target + row, mask=inside, other=0)
        valid = inside
        if IGNORE:
            valid = inside & (t != ignore_index)
        wrong += tl.sum((valid & ((t < 0) | (t >= classes))).to(tl.int32))
        keep = inside
        poisoned = inside & False
        if SKIP:
            keep = valid
            if row_sum is not None:
                total_h = tl.load(row_sum + row, mask=inside, other=0.0)
                poisoned = inside & (valid == 0) & ((tl.abs(total_h) < float("inf")) == 0)
                keep = valid | poisoned
        local = t - first
        local = tl.where(valid & (local >= 0) & (local < V), local, -1)
        kept = keep.to(tl.int32)
        place = count + tl.cumsum(kept) - 1
        tl.store(index + place, row, mask=keep)
        tl.store(column + place, local.to(tl.int32), mask=keep)
        if GRADS:
            a = tl.load(grad_nll + row, mask=valid, other=0.0) * CHAIN
            p = a
            if grad_lse is not None:
                p += tl.load(grad_lse + row, mask=keep if not SKIP else valid, other=0.0) * CHAIN
            if grad_smooth is not None:
                u = tl.load(grad_smooth + row, mask=valid, other=0.0) * CHAIN
                p += u * tl.load(total)
                tl.store(uniform + place, u, mask=keep)
            # An ignored row with a hidden state that is not finite: 0 * NaN in a dense loss.
            p = tl.where(poisoned, float("nan"), p)
            if row_max is not None:
                p /= tl.load(row_sumexp + row, mask=keep, other=1.0)
                tl.store(kept_max + place, tl.load(row_max + row, mask=keep, other=0.0), mask=keep)
            tl.store(prob + place, p, mask=keep)
            tl.store(hit + place, a, mask=keep)
        count += tl.sum(kept)
    tl.store(state, count)
    tl.store(state + 1, (wrong == 0).to(tl.int32))


def select(problem: Problem, norm: Norm | None = None, grads: RowGrads | None = None) -> Rows:
    """The rows of `problem` to compute; with `grads` (N,), their coefficients too.

    A target that is neither a class nor ignored raises IndexError on the CPU, and fails a device-side assertion on a
    GPU, as eager does. In the gradient, an ignored row whose hidden state is not finite is kept and makes every
    gradient NaN, as a dense loss would: a run that has diverged shows it. Finding these costs one reading of hidden.
    """
    p, n, device = problem, problem.hidden.shape[0], problem.hidden.device
    dtype = statistics_dtype(p.hidden.dtype)
    index = torch.zeros(n, dtype=torch.int32, device=device)
    column = torch.empty(n, dtype=torch.int32, device=device)
    state = torch.empty(2, dtype=torch.int32, device=device)
    row_max = row_sumexp = kept_max = prob = hit = uniform = total = row_sum = unit = None
    grad_nll = grad_lse = grad_smooth = None
    if grads is not None:
        smooth = p.smooth and grads.smooth is not None
        coefficients = torch.zeros(3 if smooth else 2, n, dtype=dtype, device=device)
        prob, hit = coefficients[0], coefficients[1]
        grad_nll = grads.nll.to(dtype).contiguous()
        grad_lse = None if grads.lse is None else grads.lse.to(dtype).contiguous()
        if norm is not None:
            kept_max = torch.empty(n, dtype=dtype, device=device)
            row_max, row_sumexp = (t.to(dtype).contiguous() for t in norm)
        if smooth:
            assert grads.smooth is not None
            uniform, grad_smooth = coefficients[2], grads.smooth.to(dtype).contiguous()
            weight = total_weight(p)
            total = (
                weight.to(dtype) if isinstance(weight, Tensor) else torch.full((1,), weight, dtype=dtype, device=device)
            )
        if p.ignore_index is not None and p.skip_ignored:
            row_sum = p.hidden.sum(1, dtype=dtype)
    launch(
        device,
        _select,
        (1,),
        {"num_warps": 4},
        target=p.target.contiguous(),
        row_sum=row_sum,
        row_max=row_max,
        row_sumexp=row_sumexp,
        grad_nll=grad_nll,
        grad_lse=grad_lse,
        grad_smooth=grad_smooth,
        total=total,
        index=index,
        column=column,
        state=state,
        kept_max=kept_max,
        prob=prob,
        hit=hit,
        uniform=uniform,
        N=n,
        V=p.weight.shape[0],
        first=p.shard.start if p.shard else 0,
        classes=p.shard.total if p.shard else p.weight.shape[0],
        ignore_index=p.ignore_index if p.ignore_index is not None else 0,
        CHAIN=p.epilogue.scale * p.epilogue.post_scale,
        IGNORE=p.ignore_index is not None,
        SKIP=p.ignore_index is not None and p.skip_ignored,
        GRADS=grads is not None,
        BLOCK=1024,
    )
    _check(problem, state)
    if grads is not None and p.hidden.dtype == torch.float16:
        # Coefficients of a mean over many rows, times small probabilities, underflow in fp16: bring them near 1.
        largest = coefficients.abs().nan_to_num(0.0, 0.0, 0.0).amax()
        unit = torch.exp2(torch.floor(torch.log2(largest.clamp_min(2.0**-60)))).reshape(1)
        coefficients /= unit
    return Rows(index, column, state, kept_max, prob, hit, uniform, unit)


def _check(problem: Problem, state: Tensor) -> None:
    if state.device.type == "cuda":
        torch._assert_async(state[1])
    elif state.device.type == "cpu" and not int(state[1]):
        p = problem
        bad = (p.target < 0) | (p.target >= (p.shard.total if p.shard else p.weight.shape[0]))
        if p.ignore_index is not None:
            bad &= p.target != p.ignore_index
        raise IndexError(f"Target {int(p.target[bad][0])} is out of bounds.")
