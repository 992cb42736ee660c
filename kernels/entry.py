# SPDX-License-Identifier: Apache-2.0
"""The contract of `spec.py` for a CPU-like device, out of three functions over the rows that are computed.

In comes a `Problem`; `rows.py` says which of its rows have to be computed, and with which coefficients. The three functions,
those of `portable/tiles.py` or `native/run.py`, see these rows alone. Out go statistics and gradients of all rows, which
`combine.py` makes of the sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .combine import finish, statistics_dtype
from .rows import Coefficients, Rows, coefficients, select
from .spec import Grads, Needs, Norm, Partials, Problem, RowGrads, Stats


@dataclass(frozen=True)
class EntryPoints:
    """`spec.Kernel`. Its functions get at least one row, and gradients to be written.

    Of the n computed rows they make Partials (n,), `smooth` in float64, and add to a gradient of the bias, which is zero and
    in the statistics' dtype. Of an (N, D) gradient of hidden they write the computed rows.
    """

    sums: Callable[[Problem, Rows], Partials]
    gradients: Callable[[Problem, Rows, Norm, Coefficients, Grads], None]
    sums_and_gradients: Callable[[Problem, Rows, Coefficients, Grads], Partials]

    def partial(self, problem: Problem) -> Partials:
        """Per-row sums (N,) over the columns of this shard."""
        _check(problem)
        rows = select(problem)
        found = _spread(self._sums(problem, rows), rows, problem)
        return found._replace(smooth=found.smooth.to(found.max.dtype), top=None)

    def forward(self, problem: Problem) -> Stats:
        """Stats (N,) of the whole vocabulary. Raises ValueError for a shard: combine the partials of all shards instead."""
        _check(problem)
        _check_whole(problem)
        rows = select(problem)
        return _stats(self._sums(problem, rows), rows, problem)

    def backward(self, problem: Problem, norm: Norm, grads: RowGrads, needs: Needs) -> Grads:
        """Gradients from the norm (N,), of the whole vocabulary for a shard too."""
        _check(problem)
        rows, out = select(problem), new_grads(problem, needs)
        if any(g is not None for g in out) and rows.count:
            taken = Norm(*(rows.take(t, 0, t.shape[0]) for t in norm))
            self.gradients(problem, rows, taken, coefficients(problem, rows, grads), out)
        found = _finished(problem, rows, out)
        if rows.index is None or problem.shard or _finite(norm, found):
            return found
        return self._both(problem, select(problem, every=True), grads, needs)[1]

    def forward_backward(self, problem: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
        """Stats (N,), and the gradients of sum(grads * stats)."""
        _check(problem)
        _check_whole(problem)
        rows = select(problem)
        stats, found = self._both(problem, rows, grads, needs)
        if rows.index is None or _finite(stats.norm, found):
            return stats, found
        return stats, self._both(problem, select(problem, every=True), grads, needs)[1]

    def _both(self, problem: Problem, rows: Rows, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
        out = new_grads(problem, needs)
        if any(g is not None for g in out) and rows.count:
            sums = self.sums_and_gradients(problem, rows, coefficients(problem, rows, grads), out)
        else:
            sums = self._sums(problem, rows)
        return _stats(sums, rows, problem), _finished(problem, rows, out)

    def _sums(self, problem: Problem, rows: Rows) -> Partials:
        if rows.count:
            return self.sums(problem, rows)
        none = problem.hidden.new_empty(0, dtype=statistics_dtype(problem.hidden.dtype))
        return Partials(none, none, none, none, none.long() if problem.top else None)


def new_grads(problem: Problem, needs: Needs) -> Grads:
    """Gradients to be written, and that of the bias, zero and in the statistics' dtype."""
    p = problem
    options = {"dtype": p.hidden.dtype, "device": p.hidden.device}
    bias = None
    if needs.bias and p.bias is not None:
        bias = torch.zeros(p.bias.shape, dtype=statistics_dtype(p.hidden.dtype), device=p.bias.device)
    return Grads(
        torch.empty(p.hidden.shape, **options) if needs.hidden else None,
        torch.empty(p.weight.shape, **options) if needs.weight else None,
        bias,
    )


def _finished(problem: Problem, rows: Rows, out: Grads) -> Grads:
    """Zeros where nothing was computed, and the bias's gradient in its own dtype."""
    if rows.count == 0:
        for g in out:
            if g is not None:
                g.zero_()
    elif rows.skipped is not None and out.hidden is not None:
        out.hidden.index_fill_(0, rows.skipped, 0)
    if out.bias is None or problem.bias is None or out.bias.dtype == problem.bias.dtype:
        return out
    return out._replace(bias=out.bias.to(problem.bias.dtype))


def _finite(norm: Norm, grads: Grads) -> bool:
    """Whether nothing here hints at a weight that is not finite.

    Such a weight makes the gradients of ignored rows NaN in a dense loss (0 * NaN), and through them the others; then
    they are computed again with no row left out.
    """
    found = (*norm, *(g for g in (grads.hidden, grads.bias) if g is not None))
    return all(bool(t.sum(dtype=norm.max.dtype).isfinite()) for t in found)


def _check(problem: Problem) -> None:
    if problem.workspace is not None and problem.workspace <= 0:
        raise ValueError(f"workspace is a positive number of bytes, or None for the default, not {problem.workspace}")


def _check_whole(problem: Problem) -> None:
    shard = problem.shard
    if shard and (shard.start, shard.total) != (0, problem.weight.shape[0]):
        raise ValueError("a Shard has no statistics of its own: use partial() on each, then combine() and finish()")


def _stats(sums: Partials, rows: Rows, problem: Problem) -> Stats:
    return finish(_spread(sums, rows, problem), problem, masked=rows.absent)


def _spread(sums: Partials, rows: Rows, problem: Problem) -> Partials:
    """The sums (n,) of the computed rows among zeros (N,), and -1 for the likeliest class."""
    if rows.index is None:
        return sums
    index, n = rows.index, problem.target.shape[0]
    wanted = {f: t for f, t in sums._asdict().items() if t is not None and (f != "smooth" or problem.smooth)}
    return sums._replace(
        **{f: t.new_full((n,), -1 if f == "top" else 0).index_copy_(0, index, t) for f, t in wanted.items()}
    )
