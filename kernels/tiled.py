# SPDX-License-Identifier: Apache-2.0
"""The kernel in torch operations over tiles: any device, float32, float64, bfloat16, float16.

Half-precision inputs are converted tile by tile; everything is accumulated in float32 and each result is rounded once.
All orders of summation are fixed, so results repeat bit by bit. See `spec` for the contract and the maths.
"""

from __future__ import annotations

from torch import Tensor

from . import fused
from .combine import combine as combine  # part of this module's interface
from .combine import finish as finish
from .combine import local_class_weight, log_sum_exp, mask_ignored
from .dropped import Dropped
from .held import held
from .plan import make_plan
from .rows import Rows, coefficients, select
from .spec import Grads, Needs, Norm, Partials, Problem, RowGrads, Stats
from .sweeps import new_grads, recompute, sweep
from .tile import Sums, concatenate, partials
from .whole import Whole, fits


def partial(problem: Problem) -> Partials:
    """Per-row sums (N,) over the columns of this shard."""
    _check(problem)
    rows = select(problem)
    found = partials(_sums(problem, rows), _local_weight(problem))
    smooth = _spread(found.smooth, rows, problem) if problem.smooth else found.smooth
    return Partials(*(_spread(t, rows, problem) for t in found[:3]), smooth)


def forward(problem: Problem) -> Stats:
    """Stats (N,) of the whole vocabulary. Raises ValueError for a shard: combine the partials of all shards instead."""
    _check(problem)
    _whole_vocabulary(problem)
    rows = select(problem)
    return _stats(problem, rows, _sums(problem, rows))


def backward(problem: Problem, norm: Norm, grads: RowGrads, needs: Needs) -> Grads:
    """Gradients from the norm (N,) (of the whole vocabulary, for a shard), recomputing the logits tile by tile."""
    _check(problem)
    rows, needs = select(problem), _possible(problem, needs)
    found = _from_norm(problem, rows, norm, grads, needs)
    if rows.index is None or problem.shard or _finite(norm, found):
        return found
    return _both(problem, select(problem, every=True), grads, needs)[1]


def _from_norm(problem: Problem, rows: Rows, norm: Norm, grads: RowGrads, needs: Needs) -> Grads:
    if not any(needs):
        return Grads(None, None, None)
    c = coefficients(problem, rows, grads)
    out = new_grads(problem, rows, needs)
    norm = Norm(*(rows.take(t, 0, t.shape[0]) for t in norm))
    if fused.gradients(problem, rows, norm, c, out):
        pass
    elif fits(problem, rows, make_plan(problem, rows, needs)):
        Whole(problem, rows).gradients(norm, c, out)
    elif rows.count:
        recompute(problem, rows, norm, c, needs, out)
    rows.clear_skipped(out.hidden)
    return out


def _sums(problem: Problem, rows: Rows) -> Sums:
    """Sums (n,) of the computed rows."""
    if (sums := fused.sums(problem, rows)) is not None:
        return sums
    if fits(problem, rows, make_plan(problem, rows, Needs(False, False, False))):
        made = Whole(problem, rows)
        return made.sums(made.logits(keep=False))
    return concatenate(sweep(problem, rows), problem)


def _finite(norm: Norm, grads: Grads) -> bool:
    """Whether nothing here hints at a weight that is not finite.

    Such a weight makes the gradients of ignored rows NaN in a dense loss (0 * NaN), and through them the others; then
    they are computed again with no row left out.
    """
    found = (*norm, *(g for g in (grads.hidden, grads.bias) if g is not None))
    return all(bool(t.sum(dtype=norm.max.dtype).isfinite()) for t in found)


def forward_backward(
    problem: Problem, grads: RowGrads, needs: Needs, *, report: list[Dropped] | None = None
) -> tuple[Stats, Grads]:
    """Stats (N,), and the gradients of sum(grads * stats). `report` gets what a filter left out."""
    _check(problem)
    _whole_vocabulary(problem)
    rows = select(problem)
    stats, found = _both(problem, rows, grads, _possible(problem, needs), report)
    if rows.index is None or _finite(stats.norm, found):
        return stats, found
    return stats, _both(problem, select(problem, every=True), grads, _possible(problem, needs))[1]


def _both(
    problem: Problem, rows: Rows, grads: RowGrads, needs: Needs, report: list[Dropped] | None = None
) -> tuple[Stats, Grads]:
    if not any(needs):
        return _stats(problem, rows, _sums(problem, rows)), Grads(None, None, None)
    c, out = coefficients(problem, rows, grads), new_grads(problem, rows, needs)
    if (sums := fused.sums_and_gradients(problem, rows, c, out, report)) is not None:
        rows.clear_skipped(out.hidden)
        return _stats(problem, rows, sums), out
    plan = make_plan(problem, rows, needs)
    if fits(problem, rows, plan):
        sums = Whole(problem, rows).sums_and_gradients(c, out)
    else:
        blocks = held(problem, rows, c, plan, out, report)
        done = sum(b.max.shape[0] for b in blocks)
        if done < rows.count:
            blocks += sweep(problem, rows, done)
        sums = concatenate(blocks, problem)
        if done < rows.count:
            recompute(problem, rows, Norm(sums.max[done:], sums.sumexp[done:]), c, needs, out, done)
    rows.clear_skipped(out.hidden)
    return _stats(problem, rows, sums), out


def _check(problem: Problem) -> None:
    if problem.workspace is not None and problem.workspace <= 0:
        raise ValueError(f"workspace is a positive number of bytes, or None for the default, not {problem.workspace}")


def _whole_vocabulary(problem: Problem) -> None:
    shard = problem.shard
    if shard and (shard.start, shard.total) != (0, problem.weight.shape[0]):
        raise ValueError("a Shard has no statistics of its own: use partial() on each, then combine() and finish()")


def _local_weight(problem: Problem) -> float | Tensor:
    """sum_c w_c over this shard's columns."""
    weights = local_class_weight(problem)
    return float(problem.weight.shape[0]) if weights is None else weights.double().sum()


def _possible(problem: Problem, needs: Needs) -> Needs:
    return needs._replace(bias=needs.bias and problem.bias is not None)


def _stats(problem: Problem, rows: Rows, sums: Sums) -> Stats:
    """Stats (N,) from the sums (n,) of the computed rows."""
    log_sum = sums.sumexp.log()
    nll = (sums.max - sums.target_logit) + log_sum
    smooth = sums.max.new_zeros(0)
    if sums.smooth is not None:
        smooth = (_local_weight(problem) * log_sum.double() - sums.smooth.double()).to(nll.dtype)
        smooth = _spread(smooth, rows, problem)
    lse = log_sum_exp(sums.max, log_sum)
    nll, lse, highest, sumexp = (_spread(t, rows, problem) for t in (nll, lse, sums.max, sums.sumexp))
    stats = Stats(nll, lse, smooth, highest, sumexp)
    return mask_ignored(stats, problem) if rows.absent else stats


def _spread(values: Tensor, rows: Rows, problem: Problem) -> Tensor:
    """(n,) values of the computed rows among zeros (N,)."""
    if rows.index is None:
        return values
    return values.new_zeros(problem.target.shape[0]).index_copy_(0, rows.index, values)
