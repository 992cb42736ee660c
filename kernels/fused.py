# SPDX-License-Identifier: Apache-2.0
"""A head with its loss on a CPU by code that is compiled as a whole (`native/fused.cpp`), in float32, bfloat16 and float16.

Logits of some rows are made, reduced and multiplied chunk by chunk of the vocabulary while they are in a thread's cache; no
BLAS library is called. Where that cannot be (another processor, no compiler, a workspace too small for its buffers, numbers
that are not finite), the functions here give None or False, and the tiles of `sweeps` and `held` serve.
"""

from __future__ import annotations

from array import array
from dataclasses import replace

import torch
from torch import Tensor

from . import halves
from .combine import local_class_weight
from .dropped import Dropped
from .elementwise import LEVELS
from .filtered import Tails, choose, largest, room_of
from .native import steps
from .native.build import address
from .native.fused import MOST_THREADS, Call, compiled, is_wanted
from .native.steps import Sizes, Step, Steps
from .plan import elements
from .rows import Coefficients, Rows
from .spec import Epilogue, Grads, Norm, Problem
from .sweeps import bias_sum, put_bias
from .tile import Head, Sums

_NO_GRADS = Grads(None, None, None)


def sums(problem: Problem, rows: Rows) -> Sums | None:
    """Sums (n,) of the computed rows."""
    if not _usable(problem, rows):
        return None
    run = _Run(problem, rows, None, _NO_GRADS)
    found = steps.sums(run.sizes)
    return None if found is None else run.sums(found)


def sums_and_gradients(
    problem: Problem, rows: Rows, c: Coefficients, out: Grads, report: list[Dropped] | None = None
) -> Sums | None:
    """Sums (n,) of the computed rows, and gradients into `out`; None where they are still to be made. `report` gets what a
    filter left out, where there is one and the dtype is float32."""
    if not _usable(problem, rows):
        return None
    run = _Run(problem, rows, c, out)
    run.take_filter()
    found = steps.sums_and_gradients(run.sizes)
    made = None if found is None else run.sums(found)
    if made is not None and run.tails is not None and report is not None:
        report.append(run.tails.dropped)
    return made


def gradients(problem: Problem, rows: Rows, norm: Norm, c: Coefficients, out: Grads) -> bool:
    """Gradients from the norm (n,) into `out`; False where they are still to be made."""
    if not _usable(problem, rows):
        return False
    run = _Run(problem, rows, c, out)
    found = steps.gradients(run.sizes)
    return found is not None and run.gradients(found, norm)


def needed(sizes: Sizes, *, again: bool) -> int | None:
    """Bytes of the workspace that a loss of `sizes` takes at the most: its sums and gradients in one go, or `again`, one after
    the other. None where it is not for compiled code."""
    if (
        not min(sizes.rows, sizes.classes, sizes.width)
        or halves.preferred(sizes.dtype)
        or compiled(sizes.dtype) is None
    ):
        return None
    found = steps.largest(sizes, again=again)
    return None if found is None else 4 * found


def _usable(problem: Problem, rows: Rows) -> bool:
    hidden, weight, dtype = problem.hidden, problem.weight, problem.hidden.dtype
    if hidden.device.type != "cpu" or halves.usable(problem) or rows.count == 0 or weight.numel() == 0:
        return False
    return is_wanted(dtype, hidden.shape[0] * weight.shape[0]) and compiled(dtype) is not None


def _sizes(problem: Problem, rows: Rows, c: Coefficients | None, out: Grads) -> Sizes:
    (classes, width), n = problem.weight.shape, rows.count
    return Sizes(
        problem.hidden.dtype, n, classes, width, problem.epilogue.softcap is not None, problem.smooth,
        c is not None and c.uniform is not None, *(t is not None for t in out), False,
        min(torch.get_num_threads(), MOST_THREADS), elements(problem, problem.hidden.shape[0], fused=True),
    )  # fmt: skip


class _Run:
    """The steps of one problem, one after the other."""

    def __init__(self, problem: Problem, rows: Rows, c: Coefficients | None, out: Grads) -> None:
        p = problem
        self.problem, self.rows, self.c, self.out = problem, rows, c, out
        self.code = compiled(p.hidden.dtype)
        self.sizes = sizes = _sizes(problem, rows, c, out)
        self.tails = None
        self.bias = bias_sum(out.bias, torch.float32)
        weights = local_class_weight(p) if p.smooth else None
        inner, outer = _scales(p.epilogue)
        held = Held()
        self.call = Call(
            weight=held(p.weight), weight_row=p.weight.stride(0), weight_column=p.weight.stride(1),
            hidden=held(p.hidden), hidden_row=p.hidden.stride(0), hidden_column=p.hidden.stride(1),
            bias=held(None if p.bias is None else p.bias.float().contiguous()),
            class_weight=held(None if weights is None else weights.contiguous()),
            weight_total=_total(weights, sizes.classes) if p.smooth else 0.0,
            classes=sizes.classes, width=sizes.width, inner=inner, outer=outer, capped=sizes.capped, weighted=sizes.smooth,
            index=held(rows.index), target=held(rows.target.contiguous()), threads=sizes.workers, columns=sizes.columns,
        )  # fmt: skip
        self.held = held
        if c is not None:
            self._take_coefficients(c, weights)

    def _take_coefficients(self, c: Coefficients, weights: Tensor | None) -> None:
        p, call, out = self.problem, self.call, self.out
        call.prob, call.hit = (self.held(t.contiguous()) for t in (c.prob, c.hit))
        call.uniform = self.held(None if c.uniform is None else c.uniform.contiguous())
        if c.uniform is not None and out.hidden is not None:
            of_class = p.weight.new_ones(self.sizes.classes) if weights is None else weights.to(p.weight.dtype)
            call.uniform_weight = self.held((p.weight.T @ of_class).float())

    def take_filter(self) -> None:
        """Leave out what the problem's filter allows, if it has one: where the sums are made along with the gradients."""
        p = self.problem
        if p.filter_eps is not None and p.hidden.dtype == torch.float32 and bool(self.c.prob.isfinite().all()):
            room = room_of(p, self.sizes.budget, share=8)
            self.tails = Tails(p, Head(p), self.out, room)
            self.sizes = replace(self.sizes, filtered=True, budget=self.sizes.budget - room.elements)

    def sums(self, found: Steps) -> Sums | None:
        """Sums and gradients; None where something is not finite: the one-hot part is added apart here, and p inf - inf is NaN
        where (p - 1) inf is not."""
        new, n, call = torch.empty, self.sizes.rows, self.call
        made = Sums(new(n), new(n), torch.zeros(n), new(n) if self.sizes.smooth else None)
        call.highest, call.sumexp, call.target_logit, call.weighted_sum = (self.held(t) for t in made)
        if self._take(found):
            return made
        if self.out.bias is not None:
            self.out.bias.zero_()
        return None

    def gradients(self, found: Steps, norm: Norm) -> bool:
        self.call.highest, self.call.sumexp = (self.held(t.contiguous()) for t in norm)
        return self._take(found)

    def _take(self, found: Steps) -> bool:
        """All steps, or those up to one that makes something that is not finite."""
        call, code, out = self.call, self.code, self.out
        buffer = torch.empty(max(step.size for step in found))
        call.room = buffer.data_ptr()
        for step in found:
            call.first, call.rows, call.stretch = step.first, step.rows, step.stretch
            call.begin, call.end = step.classes or (0, self.sizes.classes)
            call.fresh = step.first == 0
            call.d_hidden = address(out.hidden) if step.hidden else None
            call.d_weight = address(out.weight) if step.weights else None
            call.d_bias = address(self.bias) if step.weights else None
            if step.what == "held":
                if not self._hold(step, buffer):
                    return False
            elif step.what == "sums":
                if not code.sums(call) and step.hidden:
                    return False
            elif step.what == "weights":
                code.weights(call)
            else:
                code.gradients(call)
        if self.tails is not None:
            self.tails.flush()
            self._take_uniform(sum(step.rows for step in found if step.what == "held"))
        put_bias(out.bias, self.bias)
        return True

    def _hold(self, step: Step, buffer: Tensor) -> bool:
        """Sums, and gradients from tiles that they leave; False where something is not finite."""
        call, code = self.call, self.code
        shifts = buffer[step.room :]
        places = self._places(step, shifts[self.sizes.chunks * step.padded :].data_ptr())
        call.tiles, call.shifts = places.buffer_info()[0], shifts.data_ptr()
        if self.tails is not None:  # which classes d_hidden is a sum over is not known yet
            call.d_hidden = None
        finite = bool(code.sums(call))
        if finite and self.tails is None:
            code.tiles(call)
        elif finite:
            self._take_kept(step, self.tails)
        call.tiles = call.shifts = None
        return finite

    def _places(self, step: Step, free: int) -> array[int]:
        """The address of each chunk's tile, of which `free` is the first that is free."""
        s, size = self.sizes, 4 * self.sizes.columns * step.padded
        if step.lent:
            # Each where the gradient of the chunk before it goes; the first of each thread has a place of its own.
            apart = 4 * s.columns * s.width
            first = self.out.weight.data_ptr() - apart
            places = array("q", range(first, first + apart * s.chunks, apart))
            for t in range(s.workers):
                places[s.chunks * t // s.workers] = free + t * size
            return places
        places = array("q", range(free, free + (s.chunks - step.tail) * size, size))
        if step.tail:
            tail = self.out.hidden[len(self.out.hidden) - (s.rows - step.last) :].data_ptr()
            places.extend(range(tail, tail + step.tail * size, size))
        return places

    def _take_kept(self, step: Step, tails: Tails) -> None:
        """Gradients from tiles of what a filter keeps, and the mean of the rest to `tails`."""
        call, prob = self.call, self.c.prob[step.first : step.last]
        levels = torch.empty(self.sizes.classes, dtype=torch.uint8)
        class_sums, mass = torch.empty(self.sizes.classes), torch.empty(LEVELS, step.padded)
        call.levels, call.class_sums, call.mass = (t.data_ptr() for t in (levels, class_sums, mass))
        call.top = float(largest(prob))
        self.code.levels(call)
        for_hidden, for_weight = choose(levels, class_sums, mass[:, : step.rows], prob, self.problem.filter_eps)
        more = bool(for_hidden.kept.sum() >= for_weight.kept.sum())
        call.keep_hidden, call.keep_weight, call.more = for_hidden.kept.data_ptr(), for_weight.kept.data_ptr(), more
        call.d_hidden = address(self.out.hidden)
        self.code.kept(call)
        if self.bias is not None:
            of_bias = for_hidden if more else for_weight
            self.bias.add_(of_bias.mean, alpha=float(of_bias.mass.sum()))
        numbers = self.rows.numbers(step.first, step.last)
        tails.add(numbers, for_hidden, for_weight, self.problem.hidden[numbers])

    def _take_uniform(self, count: int) -> None:
        """Take the uniform part of the first `count` rows off the gradients of weight and bias: kept columns are without it."""
        uniform, rows = self.c.uniform, self.rows.numbers(0, count)
        if uniform is None:
            return
        of_class = torch.ones(self.sizes.classes) if (w := local_class_weight(self.problem)) is None else w
        if self.out.weight is not None:
            self.out.weight.addr_(of_class, uniform[:count] @ self.problem.hidden[rows], alpha=-1)
        if self.bias is not None:
            self.bias.sub_(of_class * uniform[:count].sum())


class Held:
    """Addresses of tensors, which live as long as this."""

    def __init__(self) -> None:
        self.tensors: list[Tensor | None] = []

    def __call__(self, values: Tensor | None) -> int | None:
        self.tensors.append(values)
        return address(values)


def _scales(e: Epilogue) -> tuple[float, float]:
    """What a product is multiplied by before the tanh, or altogether, and after it."""
    if e.softcap is None:
        return e.scale * e.post_scale, 1.0
    inner, outer = e.scale / e.softcap, e.softcap * e.post_scale
    return (inner, outer) if outer >= 0 else (-inner, -outer)  # tanh is odd


def _total(weights: Tensor | None, classes: int) -> float:
    return float(classes) if weights is None else float(weights.double().sum())
