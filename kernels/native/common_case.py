# SPDX-License-Identifier: Apache-2.0
"""The common loss in one call of the library: every target is a class, and only the loss of each row is wanted.

In comes a `Problem`; out go what `entry.py` makes of it too, or None where the problem is another one. What depends on sizes alone
is made once for them. For a small head this is most of the time: a dozen operations on N numbers take longer than its products.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Epilogue, Grads, Needs, Problem, RowGrads, Sizes, Stats
from . import plan, run
from .library import DONE, Head


@dataclass(frozen=True)
class Prepared:
    """What all problems of some sizes have in common."""

    head: Head  # without addresses
    plan: plan.Plan


@functools.lru_cache(maxsize=256)
def prepared(sizes: tuple[int, int, int], epilogue: Epilogue, dtype: torch.dtype, needs: tuple[bool, bool],
              workspace: int | None, threads: int) -> Prepared:  # fmt: skip
    rows, classes, width = sizes
    known = Sizes(
        dtype, rows, classes, width, epilogue.softcap is not None, hidden=needs[0], weight=needs[1],
        workspace=workspace or plan.default_workspace(rows, classes, threads),
    )  # fmt: skip
    chosen = (plan.sums_and_gradients if any(needs) else plan.sums)(known, threads)
    inner, outer = run.scales(epilogue)
    head = Head(
        classes=classes, width=width, inner=inner, outer=outer, capped=known.capped, workspace_size=chosen.size,
        threads=chosen.threads, columns=chosen.columns,
    )  # fmt: skip
    return Prepared(head, chosen)


def forward(problem: Problem) -> Stats | None:
    """Stats (N,), or None."""
    found = _made(problem, None, (False, False))
    return None if found is None else found[0]


def forward_backward(problem: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads] | None:
    """Stats (N,) and gradients, or None; where something is not finite, too."""
    e = problem.epilogue
    if grads.lse is not None or grads.smooth is not None or e.scale * e.post_scale != 1.0:
        return None
    return _made(problem, grads.nll.contiguous(), (needs.hidden, needs.weight))


def _made(p: Problem, grad: Tensor | None, needs: tuple[bool, bool]) -> tuple[Stats, Grads] | None:
    hidden, weight, target = p.hidden, p.weight, p.target
    (rows, width), classes = hidden.shape, weight.shape[0]
    ignored = p.ignore_index
    other = p.bias is not None or p.smooth or p.shard is not None or (ignored is not None and 0 <= ignored < classes)
    if other or rows == 0 or not target.is_contiguous() or (p.workspace is not None and p.workspace <= 0):
        return None
    threads = min(torch.get_num_threads(), plan.MOST_THREADS)
    made = prepared((rows, classes, width), p.epilogue, hidden.dtype, needs, p.workspace, threads)
    code = run.compiled(hidden.dtype)
    assert code is not None
    if not code.are_classes(target.data_ptr(), rows, classes):
        return None
    # Neither dtype nor device is the program's default.
    nll, lse, smooth, highest, sumexp = (hidden.new_empty(n, dtype=torch.float32) for n in (rows, rows, 0, rows, rows))
    top = hidden.new_empty(rows, dtype=torch.int64) if p.top else None
    stats = Stats(nll, lse, smooth, highest, sumexp, top)
    d_hidden = hidden.new_empty(hidden.shape) if needs[0] else None
    d_weight = weight.new_empty(weight.shape) if needs[1] else None
    workspace = hidden.new_empty(made.plan.size + rows, dtype=torch.float32)
    head = Head.from_buffer_copy(made.head)
    head.workspace = at = workspace.data_ptr()
    head.target_logit = at + 4 * made.plan.size
    head.weight, (head.weight_row, head.weight_column) = weight.data_ptr(), weight.stride()
    head.hidden, (head.hidden_row, head.hidden_column) = hidden.data_ptr(), hidden.stride()
    head.target = target.data_ptr()
    head.nll, head.lse, head.highest, head.sumexp = (t.data_ptr() for t in (nll, lse, highest, sumexp))
    head.best = None if top is None else top.data_ptr()
    if grad is not None:
        head.prob = head.hit = grad.data_ptr()
    head.d_hidden = None if d_hidden is None else d_hidden.data_ptr()
    head.d_weight = None if d_weight is None else d_weight.data_ptr()
    if run.steps_taken(code, head, made.plan) != DONE:
        return None
    return stats, Grads(d_hidden, d_weight, None)
