# SPDX-License-Identifier: Apache-2.0
"""Which calls of the compiled code make the sums and gradients of a problem, of how many rows each, within a workspace."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from ..elementwise import LEVELS
from ..plan import spans
from .fused import Call, compiled

FILL = 16  # rows are filled up to a multiple of this, as in head.h
FEWEST_HELD = 32  # rows to a block; with fewer, making the logits twice is faster
_STRETCH = 256  # rows whose hidden states stay in the cache while the vocabulary passes by
_SWEEP = 512  # and where no other product wants a place there
_AGAIN = 1024  # rows to a block whose logits are made twice, and whose gradient of hidden each thread holds
_CALL = 1 << 40  # multiplications of a call without tiles, some seconds: an interrupt waits for its end
_PACKED = 1 << 17  # words of the weight that a thread keeps in its cache
_COLUMNS = (96, 252)  # fewest and most of a chunk
_BLOCK = 12  # columns of a block of products
_WORK = 1 << 20  # multiplications of a product that make another thread worth while


@dataclass(frozen=True)
class Sizes:
    """What steps depend on. Equal sizes have equal steps."""

    dtype: torch.dtype
    rows: int
    classes: int
    width: int
    capped: bool
    smooth: bool  # whether sums of w z are wanted
    uniform: bool  # whether smoothing has a gradient
    hidden: bool  # gradients that are wanted
    weight: bool
    bias: bool
    filtered: bool
    threads: int  # at most
    budget: int  # numbers of the workspace

    @functools.cached_property
    def workers(self) -> int:
        threads = min(self.threads, -(-self.classes // _BLOCK), self.rows * self.classes * self.width // _WORK)
        return max(threads, 1)

    @functools.cached_property
    def columns(self) -> int:
        """Columns of a chunk: as many as stay in a thread's cache, and so that all threads have as many chunks."""
        fewest, most = _COLUMNS
        most = max(fewest, min(most, _PACKED // _up(self.width, 2 * FILL)))
        each = -(-self.classes // self.workers)
        return _up(-(-each // -(-each // most)), _BLOCK)

    @functools.cached_property
    def chunks(self) -> int:
        return -(-self.classes // self.columns)


@dataclass(frozen=True)
class Step:
    """One call, or two where tiles are held: which rows, which gradients, and where tiles lie."""

    what: str  # "sums", "held" (sums, then gradients from tiles), "weights", "gradients"
    first: int
    rows: int
    stretch: int
    size: int  # numbers of the workspace
    hidden: bool = False  # gradients that it makes
    weights: bool = False
    room: int = 0  # of `size`, what comes before the tiles
    lent: bool = False  # tiles lie in the memory of the weight's gradient, which holds nothing yet
    tail: int = 0  # tiles that lie in the gradient of hidden, where nothing is written yet
    classes: tuple[int, int] | None = None  # the columns that it looks at; None is all

    @property
    def last(self) -> int:
        return self.first + self.rows

    @property
    def padded(self) -> int:
        return _up(self.rows)


Steps = tuple[Step, ...]


@functools.lru_cache(maxsize=1024)
def sums(sizes: Sizes) -> Steps | None:
    """Sums of all rows: one product of 2NDV operations. None where the workspace is too small."""
    return _joined(_Planner(sizes).sweep(0, hidden=False))


@functools.lru_cache(maxsize=1024)
def sums_and_gradients(sizes: Sizes) -> Steps | None:
    """Sums and gradients: 6NDV operations for rows whose logits fit into memory, 8NDV for others."""
    plan = _Planner(sizes)
    # With a cap, an entry of smoothing's part has a slope that an exponential does not tell any more.
    if sizes.capped and sizes.uniform:
        return _joined(plan.sweep(0, hidden=False), *plan.apart(0))
    held = plan.held() if plan.holds else ()
    done = held[-1].last if held else 0
    return _joined(held, *(plan.sweep(done, hidden=sizes.hidden), plan.weights(done)) if done < sizes.rows else ())


@functools.lru_cache(maxsize=1024)
def gradients(sizes: Sizes) -> Steps | None:
    """Gradients where the sums are known: 6NDV operations, 8NDV in half precision."""
    plan = _Planner(sizes)
    if plan.code.tiles and sizes.hidden:  # each gradient is summed up in its own memory
        return plan.again(weights=sizes.weight or sizes.bias)
    return _joined(*plan.apart(0))


def largest(sizes: Sizes, *, again: bool) -> int | None:
    """Numbers of the workspace that sums and gradients take, in one go or, `again`, one after the other. None where it is too
    small."""
    if again:
        found = _joined(sums(sizes), gradients(sizes))
    else:
        found = _Planner(sizes).two_blocks() or sums_and_gradients(sizes)
    return None if found is None else max((step.size for step in found), default=0)


def _joined(*parts: Steps | None) -> Steps | None:
    return None if any(p is None for p in parts) else tuple(step for p in parts for step in p or ())


class _Planner:
    """Finds the largest steps that fit into the workspace of a problem."""

    def __init__(self, sizes: Sizes) -> None:
        code = compiled(sizes.dtype)
        assert code is not None
        self.sizes, self.code = sizes, code
        self.call = Call(
            end=sizes.classes, width=sizes.width, capped=sizes.capped, weighted=sizes.smooth,
            threads=sizes.workers, columns=sizes.columns,
        )  # fmt: skip

    def sweep(self, begin: int, *, hidden: bool) -> Steps | None:
        """Sums of the rows from `begin` on, with the gradient of hidden where it is wanted."""
        s = self.sizes
        for stretch in _halves(_STRETCH if hidden else _SWEEP, FILL):
            rows = min(s.rows - begin, max(_CALL // (s.classes * s.width * stretch), 1) * stretch)
            step = self._step("sums", rows, stretch, hidden=hidden)
            if step.size <= s.budget:
                return self._spread(step, begin)
        return None

    def held(self) -> Steps:
        """Sums and gradients of blocks whose logits are held, from the first row on; none where too few rows would fit."""
        steps: list[Step] = []
        while (first := steps[-1].last if steps else 0) < self.sizes.rows:
            step = self.held_block(first)
            if step is None:
                break
            steps.append(step)
        return tuple(steps)

    @property
    def holds(self) -> bool:
        """Whether tiles are held where there is room."""
        s = self.sizes
        return self.code.tiles is not None and (s.weight or s.bias or s.filtered) and not (s.capped and s.uniform)

    def two_blocks(self) -> Steps:
        """The first two of these blocks, of which there may be very many: those after them are like the second."""
        first = self.held_block(0) if self.holds else None
        second = self.held_block(first.last) if first is not None and first.last < self.sizes.rows else None
        return () if first is None or second is None else (first, second)

    def held_block(self, first: int) -> Step | None:
        """The next of these blocks."""
        s, left = self.sizes, self.sizes.rows - first
        free = s.width if s.hidden else 0  # numbers of the gradient of hidden for each row that is not done yet

        def held(rows: int) -> Step:
            tile = s.columns * _up(rows)
            tail = min(s.chunks, (left - rows) * free // tile)
            return self._tiled(first, rows, (s.chunks - tail) * tile, tail=tail)

        def lent(rows: int) -> Step:
            return self._tiled(first, rows, s.workers * s.columns * _up(rows), lent=True)

        step = self._largest(left, held)
        if first == 0 and s.weight and (step is None or step.rows < left):
            larger = self._largest(min(left, s.width // FILL * FILL), lent)
            if larger is not None and (step is None or larger.rows > step.rows):
                return larger if larger.rows >= min(left, FEWEST_HELD) else None
        if step is None or step.rows < min(left, FEWEST_HELD):
            return None
        return self._evened(left, step, held)

    def _tiled(self, first: int, rows: int, tiles: int, **where: int) -> Step:
        """A step whose tiles take `tiles` numbers of the workspace."""
        each = (1 + self.sizes.workers) * self.sizes.width  # numbers held for a row of a stretch: a small part of all
        fitting = (s for s in _halves(_STRETCH, FEWEST_HELD) if 4 * s * each <= self.sizes.budget)
        step = self._step("held", rows, next(fitting, FEWEST_HELD), hidden=self.sizes.hidden, weights=True)
        size = step.room + self.sizes.chunks * _up(rows) + tiles + self.sizes.filtered * LEVELS * _up(rows)
        return replace(step, first=first, size=size, **where)

    def apart(self, begin: int) -> tuple[Steps | None, ...]:
        """Gradients from sums that are known, that of hidden and the others each for itself."""
        return self.again(weights=False) if self.sizes.hidden else (), self.weights(begin)

    def weights(self, begin: int) -> Steps | None:
        """Gradients of weight and bias from sums that are known, of the rows from `begin` on: each is rounded once."""
        s = self.sizes
        if not (s.weight or s.bias):
            return ()
        for stretch in _halves(_STRETCH, FILL):
            step = self._step("weights", s.rows - begin, stretch, weights=True)
            if step.size <= s.budget:
                each = s.columns * s.workers
                classes = max(_CALL // (step.rows * s.width * each), 1) * each
                return tuple(replace(step, first=begin, classes=part) for part in spans(s.classes, classes))
        return None

    def again(self, *, weights: bool) -> Steps | None:
        """Gradients from sums that are known, that of hidden among them."""

        def step(rows: int) -> Step:
            return self._step("gradients", rows, min(_STRETCH, _up(rows)), hidden=True, weights=weights)

        n = self.sizes.rows
        largest = self._largest(min(n, _AGAIN), step)
        if largest is None or largest.rows < min(n, FEWEST_HELD):
            return None
        return self._spread(self._evened(n, largest, step), 0)

    def _spread(self, step: Step, begin: int) -> Steps:
        """The same step for all rows from `begin` on."""
        return tuple(replace(step, first=i, rows=j - i) for i, j in spans(self.sizes.rows, step.rows, begin))

    def _largest(self, limit: int, make: Callable[[int], Step]) -> Step | None:
        """The step of the most rows, at most `limit`, that fits into the workspace."""
        low, high, best = 0, -(-limit // FILL), None
        while low < high:
            middle = (low + high + 1) // 2
            step = make(min(middle * FILL, limit))
            if step.size <= self.sizes.budget:
                low, best = middle, step
            else:
                high = middle - 1
        return best

    def _evened(self, total: int, step: Step, make: Callable[[int], Step]) -> Step:
        """A step of fewer rows, where steps for `total` rows are then as equal as can be. It may take more room, too."""
        even = make(min(total, step.rows, _up(-(-total // -(-total // step.rows)))))
        return even if even.size <= self.sizes.budget else step

    def _step(self, what: str, rows: int, stretch: int, *, hidden: bool = False, weights: bool = False) -> Step:
        call, there = self.call, 1  # room depends on which pointers are null
        call.rows, call.stretch, call.tiles = rows, stretch, there if what == "held" else None
        call.d_hidden = there if hidden else None
        call.d_weight = there if weights and self.sizes.weight else None
        kind = {"sums": 0, "held": 3 if self.sizes.filtered else 0, "weights": 1, "gradients": 2}[what]
        room = self.code.room(call, kind)
        return Step(what, 0, rows, stretch, room, hidden, weights, room)


def _up(count: int, step: int = FILL) -> int:
    return -(-count // step) * step


def _halves(most: int, fewest: int) -> Iterator[int]:
    while most >= fewest:
        yield most
        most //= 2
