# SPDX-License-Identifier: Apache-2.0
"""The backward, and the forward and backward in one."""

from __future__ import annotations

import torch

from ..spec import Grads, Needs, Norm, Problem, RowGrads, Stats
from .chunked import chunked, stored
from .cost import make_plan
from .filtering import Filter, make_filter
from .forward import forward
from .recompute import recompute
from .rows import select
from .tma import pack
from .tuning import tuned_head


def backward(
    problem: Problem,
    norm: Norm,
    grads: RowGrads,
    needs: Needs,
    *,
    deterministic: bool = True,
    strategy: str = "auto",
    products: str = "auto",
    report: list[Filter] | None = None,
) -> Grads:
    """Gradients of sum(grads * stats), from the norm (N,) (of the whole vocabulary, for a shard).

    Args:
        deterministic: has no effect, as every strategy repeats bit by bit; see `cost` for why.
        strategy: "recompute" (no scratch memory), "chunked" (scratch memory within `problem.workspace`), or "auto",
            which takes the faster by the model in `cost`.
        products: who multiplies in "chunked": "blas", "triton" or "auto".
        report: gets the `Filter` with the dropped mass appended where `problem.filter_eps` is set.

    Returns:
        Gradients in the dtype of the inputs, contiguous. Raises ValueError for an unknown strategy.
    """
    needs = needs._replace(bias=needs.bias and problem.bias is not None)
    head = tuned_head(problem)
    plan = make_plan(head, needs, strategy, products=products)
    if not any(needs) or 0 in (head.n, head.v, head.d):
        return _zeros(problem, needs)
    rows, found = select(problem, norm, grads), make_filter(problem)
    if plan.strategy == "recompute":
        out = recompute(head, rows, needs, found)
    else:
        out = chunked(head, pack(head, rows) if head.config.logits.tma else rows, needs, plan, found)
    if report is not None and found is not None:
        report.append(found)
    return out


def forward_backward(
    problem: Problem,
    grads: RowGrads,
    needs: Needs,
    *,
    deterministic: bool = True,
    strategy: str = "auto",
    products: str = "auto",
    report: list[Filter] | None = None,
) -> tuple[Stats, Grads]:
    """Stats (N,), and the gradients of sum(grads * stats). Arguments as in `backward`; no shard (ValueError)."""
    possible = needs._replace(bias=needs.bias and problem.bias is not None)
    if problem.shard is None and any(possible) and problem.hidden.numel() and problem.weight.numel():
        head = tuned_head(problem)
        plan = make_plan(head, possible, strategy, with_stats=True, products=products)
        if plan.strategy == "stored":
            rows = select(problem, grads=grads)
            return stored(head, rows, possible, plan)
    stats = forward(problem)
    options = {"deterministic": deterministic, "strategy": strategy, "products": products}
    return stats, backward(problem, stats.norm, grads, possible, report=report, **options)


def _zeros(problem: Problem, needs: Needs) -> Grads:
    wanted = zip((problem.hidden, problem.weight, problem.bias), needs, strict=True)
    return Grads(
        *(
            torch.zeros(t.shape, dtype=t.dtype, device=t.device) if need and t is not None else None
            for t, need in wanted
        )
    )
