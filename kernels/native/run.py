# SPDX-License-Identifier: Apache-2.0
"""One problem through the compiled library: sums and gradients of the rows that are computed.

In come a problem and its rows (`rows.py`); out go their sums, and gradients into memory that is there. `plan.py` says in which
steps, and `steps.cpp` takes them.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..combine import local_class_weight
from ..rows import Coefficients, Rows
from ..spec import Epilogue, Grads, Norm, Partials, Problem, Sizes
from . import plan
from .library import DONE, MORE, Head, Library, compiled
from .plan import MOST_THREADS, Plan

_NO_GRADS = Grads(None, None, None)


def sums(problem: Problem, rows: Rows) -> Partials:
    """Partials (n,) of the computed rows, `smooth` in float64."""
    run = _Run(problem, rows, None, _NO_GRADS)
    found = run.make_sums()
    run.take(plan.sums(*run.sizes))
    return found


def gradients(problem: Problem, rows: Rows, norm: Norm, c: Coefficients, out: Grads) -> None:
    """Write the gradients of the computed rows from their norm (n,)."""
    run = _Run(problem, rows, c, out)
    run.head.highest, run.head.sumexp = (run.address(t.contiguous()) for t in norm)
    run.take(plan.gradients(*run.sizes))


def sums_and_gradients(problem: Problem, rows: Rows, c: Coefficients, out: Grads) -> Partials:
    """Partials (n,) of the computed rows, and their gradients."""
    run = _Run(problem, rows, c, out)
    found = run.make_sums()
    if not run.take(plan.sums_and_gradients(*run.sizes)):
        # The one-hot part is added apart here, and p inf - inf is NaN where (p - 1) inf is not.
        if out.bias is not None:
            out.bias.zero_()
        found = sums(problem, rows)
        gradients(problem, rows, Norm(found.max, found.sumexp), c, out)
    return found


def needed(sizes: Sizes, again: bool) -> int:
    """Bytes of the workspace that a loss of `sizes` takes at the most; `again`: gradients in a backward of their own."""
    threads = min(torch.get_num_threads(), MOST_THREADS)
    plans = [plan.sums, plan.gradients] if again else [plan.sums_and_gradients]
    return 4 * max(make(sizes, threads).size for make in plans)


class _Run:
    """A problem as the library is handed it, and the tensors that it points to."""

    def __init__(self, problem: Problem, rows: Rows, c: Coefficients | None, out: Grads) -> None:
        p, self.rows, self.top = problem, rows, problem.top
        self.kept: list[Tensor] = []
        weights = local_class_weight(p) if p.smooth else None
        threads = min(torch.get_num_threads(), MOST_THREADS)
        # Rows that are left out count for the default: fewer would make smaller steps.
        workspace = p.workspace or plan.default_workspace(p.hidden.shape[0], p.weight.shape[0], threads)
        sizes = Sizes(
            p.hidden.dtype, rows.count, *p.weight.shape, p.epilogue.softcap is not None, p.smooth,
            c is not None and c.uniform is not None, *(t is not None for t in out), workspace,
        )  # fmt: skip
        self.sizes = sizes, threads
        inner, outer = scales(p.epilogue)
        at = self.address
        self.head = Head(
            weight=at(p.weight), weight_row=p.weight.stride(0), weight_column=p.weight.stride(1),
            hidden=at(p.hidden), hidden_row=p.hidden.stride(0), hidden_column=p.hidden.stride(1),
            bias=at(None if p.bias is None else p.bias.float().contiguous()),
            class_weight=at(None if weights is None else weights.contiguous()),
            classes=sizes.classes, width=sizes.width, inner=inner, outer=outer, capped=sizes.capped, weighted=sizes.smooth,
            index=at(rows.index), target=at(rows.target.contiguous()),
            d_hidden=at(out.hidden), d_weight=at(out.weight), d_bias=at(out.bias),
        )  # fmt: skip
        if c is not None:
            self.head.prob, self.head.hit = (at(t.contiguous()) for t in (c.prob, c.hit))
        if c is not None and c.uniform is not None:
            self.head.uniform = at(c.uniform.contiguous())
            of_class = p.weight.new_ones(sizes.classes) if weights is None else weights.to(p.weight.dtype)
            self.head.uniform_weight = at((p.weight.T @ of_class).float())

    def address(self, values: Tensor | None) -> int | None:
        """Of the first number of a tensor, which lives as long as this; None for none."""
        if values is None:
            return None
        self.kept.append(values)
        return values.data_ptr()

    def make_sums(self) -> Partials:
        """Memory for the sums of the rows."""
        n, smooth = self.rows.count, self.rows.count if self.head.weighted else 0
        new = functools.partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever the program's defaults are
        best = new(n, dtype=torch.int64) if self.top else None
        made = Partials(new(n), new(n), new(n).zero_(), new(smooth, dtype=torch.float64), best)
        head = self.head
        head.highest, head.sumexp, head.target_logit, head.weighted_sum, head.best = map(self.address, made)
        return made

    def take(self, chosen: Plan) -> bool:
        """Whether all steps were taken: those that add one-hot parts apart end where something is not finite."""
        head, code = self.head, compiled(self.sizes[0].dtype)
        assert code is not None
        workspace = torch.empty(chosen.size, dtype=torch.float32, device="cpu")
        head.workspace, head.workspace_size = workspace.data_ptr(), chosen.size
        head.threads, head.columns = chosen.threads, chosen.columns
        return steps_taken(code, head, chosen) == DONE


def steps_taken(code: Library, head: Head, chosen: Plan) -> int:
    """Take all steps of a plan, and say how that ended; an interrupt gets its turn every now and then."""
    position, state, array = ctypes.c_int64(0), MORE, chosen.array
    while state == MORE:
        state = code.run(head, array, len(array), position)
    return state


def scales(e: Epilogue) -> tuple[float, float]:
    """What a product is multiplied by before the tanh, or altogether, and after it."""
    if e.softcap is None:
        return e.scale * e.post_scale, 1.0
    inner, outer = e.scale / e.softcap, e.softcap * e.post_scale
    return (inner, outer) if outer >= 0 else (-inner, -outer)  # tanh is odd
