# SPDX-License-Identifier: Apache-2.0
"""From per-row sums over the vocabulary to statistics, for one shard or several.

In come Partials, out go Partials of more columns (`combine`) or Stats of all (`finish`). `entry.py` calls it for portable and
native, and the operators of a divided vocabulary for all three implementations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import Partials, Problem, Stats


def combine(parts: list[Partials]) -> Partials:
    """The sums over all shards of a vocabulary, from the sums over each.

    Args:
        parts: one entry per shard, in a fixed order; every tensor (N,), or (0,) for a `smooth` that is not wanted.

    Returns:
        Partials over the union of the columns. The order of `parts` fixes the order of the additions.
    """
    highest = torch.stack([p.max for p in parts]).amax(0)
    shift = finite(highest)
    sumexp = sum((p.sumexp * torch.exp(p.max - shift) for p in parts), start=torch.zeros_like(highest))
    target_logit = sum((p.target_logit for p in parts), start=torch.zeros_like(highest))
    smooth = sum((p.smooth for p in parts), start=torch.zeros_like(parts[0].smooth))
    return Partials(highest, sumexp, target_logit, smooth)


def finish(partials: Partials, problem: Problem, masked: bool = True) -> Stats:
    """Stats (N,) of `problem` from its sums over the whole vocabulary; `masked` unless no row is ignored."""
    p = partials
    log_sum = p.sumexp.log()
    # The difference first: lse - z_t would cancel the leading digits of two large numbers.
    nll = (p.max - p.target_logit) + log_sum
    lse = torch.where(p.max.isinf(), p.max, p.max + log_sum)  # as `torch.logsumexp`
    smooth = p.smooth.to(nll.dtype)
    if problem.smooth:
        total = lse.double() if lse.dtype == torch.float64 else p.max.double() + log_sum.double()
        smooth = (total_weight(problem) * total - p.smooth.double()).to(nll.dtype)
    stats = Stats(nll, lse, smooth, p.max, p.sumexp, p.top)
    return _mask_ignored(stats, problem) if masked else stats


def finite(highest: Tensor) -> Tensor:
    """The maximum as something to subtract: 0 for -inf, whose exponentials are then 0 and not NaN."""
    return highest.masked_fill(highest == -torch.inf, 0)


def _mask_ignored(stats: Stats, problem: Problem) -> Stats:
    """Stats with zeros for ignored rows (their lse, max and sumexp only where Problem.skip_ignored)."""
    if problem.ignore_index is None:
        return stats
    ignored = problem.target == problem.ignore_index
    zero = {"nll": stats.nll.masked_fill(ignored, 0)}
    if problem.smooth:
        zero["smooth"] = stats.smooth.masked_fill(ignored, 0)
    if problem.skip_ignored:
        zero |= {name: getattr(stats, name).masked_fill(ignored, 0) for name in ("lse", "max", "sumexp")}
        if stats.top is not None:
            zero["top"] = stats.top.masked_fill(ignored, -1)
    return stats._replace(**zero)


def total_weight(problem: Problem) -> float | Tensor:
    """sum_c w_c over the whole vocabulary, in float64; a float, or () on the device of `class_weight`."""
    shard, weights = problem.shard, problem.class_weight
    if weights is None:
        return float(shard.total if shard else problem.weight.shape[0])
    if shard and weights.shape[0] != shard.total:
        raise ValueError(
            f"with a Shard, class_weight holds the whole vocabulary ({shard.total}), not {weights.shape[0]} entries: "
            "its sum over all shards is needed"
        )
    return weights.double().sum()


def local_class_weight(problem: Problem) -> Tensor | None:
    """class_weight (V,) of this shard's columns, in the dtype of the statistics; None for ones."""
    weights, shard = problem.class_weight, problem.shard
    if weights is None:
        return None
    total_weight(problem)
    if shard:
        weights = weights[shard.start : shard.start + problem.weight.shape[0]]
    return weights.to(statistics_dtype(problem.hidden.dtype))


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulation and of statistics (nll, lse, smooth): float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
