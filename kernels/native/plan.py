# SPDX-License-Identifier: Apache-2.0
"""Which steps make the sums and gradients of a problem, of how many rows each, within a workspace.

In come the sizes of a problem, out goes a `Plan`: a few steps, each of which `steps.cpp` repeats until its rows are done.
`run.py` has plans made and gives them to the library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..spec import Sizes
from .library import Head, Library, Step, compiled

# Kinds of steps, as in head.h.
SUMS, TILES, WEIGHTS, GRADIENTS, PRODUCTS, GIVEN = range(6)
FILL = 16  # rows are filled up to a multiple of this, as in head.h
FEWEST_ROWS = 32  # whose tiles are stored; with fewer, making the logits twice is faster
MOST_THREADS = 256
_BLOCK = 256  # rows whose hidden states stay in the cache while the vocabulary passes by
_SUMS_BLOCK = 512  # and where no other product wants a place there
_AGAIN = 1024  # rows to a step whose logits are made twice, and whose gradient of hidden each thread has
_CALL = 1 << 40  # multiplications of a step, some seconds: an interrupt waits for its end
_PACKED = 1 << 17  # words of the weight that a thread keeps in its cache
_COLUMNS = (96, 252)  # fewest and most of a chunk
_MICRO = 12  # columns that the micro-kernel takes
_WORK = 1 << 20  # multiplications of a product that make another thread worth while
_SMALLEST_WORKSPACE, _LARGEST_WORKSPACE = 1 << 20, 16 << 20
_THREAD_WORKSPACE = 2 << 20  # of each thread, where many threads need more
_ROW_BYTES = 48  # that a row takes beside the workspace
_HEAD_POINTER = 1  # stands for any pointer that is not null


def default_workspace(rows: int, classes: int, threads: int) -> int:
    """Bytes that may be held beyond the results where nobody says how many: a 21st of the logits, which with what each row
    takes is a 20th of them, from 1 to 16 MiB with that."""
    most = max(_LARGEST_WORKSPACE, _THREAD_WORKSPACE * threads)
    return min(max(4 * rows * classes // 21, _SMALLEST_WORKSPACE), max(most - _ROW_BYTES * rows, most // 4))


@dataclass(frozen=True)
class Plan:
    """Steps, and what they have in common."""

    steps: tuple[Step, ...]
    threads: int
    columns: int  # of a chunk
    size: int  # float32 numbers of the workspace

    @functools.cached_property
    def array(self) -> ctypes.Array[Step]:
        return (Step * len(self.steps))(*self.steps)


@functools.lru_cache(maxsize=1024)
def sums(sizes: Sizes, threads: int) -> Plan:
    """Sums of all rows: one product of 2NDV operations."""
    return _first(sizes, threads, lambda p: p.sums(0))


@functools.lru_cache(maxsize=1024)
def sums_and_gradients(sizes: Sizes, threads: int) -> Plan:
    """Sums and gradients: 6NDV operations for rows whose logits fit into memory, 8NDV for others."""

    def make(p: _Planner) -> list[Step] | None:
        # With a cap, an entry of smoothing's part has a slope that an exponential does not tell any more.
        if sizes.capped and sizes.uniform:
            return _joined(p.sums(0), *p.apart(0))
        stored = p.stored() if (sizes.weight or sizes.bias) and not p.code.rounds else []
        done = stored[-1].last if stored else 0
        return stored if done == sizes.rows else _joined(stored, p.sums(done, hidden=sizes.hidden), p.weights(done))

    return _first(sizes, threads, make)


@functools.lru_cache(maxsize=1024)
def gradients(sizes: Sizes, threads: int) -> Plan:
    """Gradients where the sums are known: 6NDV operations, 8NDV in half precision."""

    def make(p: _Planner) -> list[Step] | None:
        if sizes.hidden and not p.code.rounds:  # each gradient is summed up in its own memory
            return p.again(weights=sizes.weight or sizes.bias)
        return _joined(*p.apart(0))

    return _first(sizes, threads, make)


@functools.lru_cache(maxsize=256)
def products(sizes: Sizes, threads: int) -> Plan:
    """The logits of all rows: one product of 2NDV operations."""
    return _one(sizes, threads, PRODUCTS, {})


@functools.lru_cache(maxsize=256)
def given(sizes: Sizes, threads: int, adds: bool) -> Plan:
    """Gradients from that of the products; `adds` where there is one of the weight already, to be added to."""
    return _one(sizes, threads, GIVEN, {"hidden": sizes.hidden, "weights": sizes.weight, "adds": adds})


def _one(sizes: Sizes, threads: int, kind: int, flags: dict[str, int]) -> Plan:
    """One step for all rows at once, whatever the workspace."""
    planner = _Planner(sizes, threads, smallest=False)
    step = planner.step(kind, 0, sizes.rows, sizes.rows, **flags)
    return Plan((step,), planner.threads, planner.columns, planner.size(step))


def _first(sizes: Sizes, threads: int, make: Callable[[_Planner], list[Step] | None]) -> Plan:
    """The plan of the largest buffers that fit into the workspace, or of the smallest that there are."""
    for smallest in (False, True):
        planner = _Planner(sizes, threads, smallest)
        steps = make(planner)
        if steps is not None:
            size = max((planner.size(step) for step in steps), default=0)
            return Plan(tuple(steps), planner.threads, planner.columns, size)
    raise AssertionError("the smallest buffers are taken whatever the workspace")


def _joined(*parts: list[Step] | None) -> list[Step] | None:
    return None if any(p is None for p in parts) else [step for p in parts for step in p or ()]


class _Planner:
    """Finds the largest steps that fit into the workspace of a problem."""

    def __init__(self, sizes: Sizes, threads: int, smallest: bool) -> None:
        s, code = sizes, compiled(sizes.dtype)
        assert isinstance(code, Library)
        self.sizes, self.code, self.smallest = s, code, smallest
        workers = min(threads, -(-s.classes // _MICRO), s.rows * s.classes * s.width // _WORK)
        self.threads = 1 if smallest else max(workers, 1)
        self.columns = _MICRO if smallest else self._columns()
        self.budget = (default_workspace(s.rows, s.classes, threads) if s.workspace is None else s.workspace) // 4
        there = _HEAD_POINTER
        self.head = Head(
            classes=s.classes, width=s.width, capped=s.capped, weighted=s.smooth, threads=self.threads, columns=self.columns,
            d_hidden=there if s.hidden else None, d_weight=there if s.weight else None, d_bias=there if s.bias else None,
        )  # fmt: skip

    def _columns(self) -> int:
        """Columns of a chunk: as many as stay in a thread's cache, and so that all threads have as many chunks."""
        fewest, most = _COLUMNS
        most = max(fewest, min(most, _PACKED // _up(self.sizes.width, 2 * FILL)))
        each = -(-self.sizes.classes // self.threads)
        return _up(-(-each // -(-each // most)), _MICRO)

    def size(self, step: Step) -> int:
        """float32 numbers of the workspace that a step takes."""
        return int(self.code.workspace(self.head, step))

    def fits(self, step: Step) -> bool:
        return self.smallest or self.size(step) <= self.budget

    def step(self, kind: int, first: int, rows: int, block: int, **flags: int) -> Step:
        """A step for the rows from `first` on, `rows` at a time."""
        n, v = self.sizes.rows, self.sizes.classes
        return Step(kind=kind, first=first, last=n, rows=rows, block=block, begin=0, end=v, **{"classes": v, **flags})

    def sums(self, begin: int, hidden: bool = False) -> list[Step] | None:
        """Sums of the rows from `begin` on, with the gradient of hidden where it is wanted."""
        s = self.sizes
        for block in self._blocks(_BLOCK if hidden else _SUMS_BLOCK, FILL):
            rows = min(s.rows - begin, max(_CALL // (s.classes * s.width * block), 1) * block)
            step = self.step(SUMS, begin, rows, block, hidden=hidden)
            if self.fits(step):
                return [step]
        return None

    def stored(self) -> list[Step]:
        """Sums and gradients from stored tiles, of the first rows: as many as are best done so.

        The tiles of the first step may lie where the weight's gradient will be, which holds nothing yet.
        """
        s = self.sizes
        first = self._stored(0)
        if s.weight and (first is None or first.rows < s.rows):
            larger = self._largest(
                min(s.rows, s.width // FILL * FILL), lambda rows: self._tiles(0, rows, in_weight=True)
            )
            if larger is not None and (first is None or larger.rows > first.rows):
                if larger.rows < min(s.rows, FEWEST_ROWS):
                    return []
                wider = self._tiles(0, larger.rows, in_weight=True, part=2)
                larger = wider if self.size(wider) <= self.budget else larger
                larger.last = larger.rows
                rest = self._stored(larger.rows) if larger.rows < s.rows else None
                return [larger] if rest is None else [larger, rest]
        return [] if first is None else [first]

    def _stored(self, begin: int) -> Step | None:
        """A step for the rows from `begin` on, its tiles in the workspace."""
        left = self.sizes.rows - begin

        def make(rows: int) -> Step:
            return self._tiles(begin, rows, in_weight=False)

        step = self._largest(left, make)
        if step is None or step.rows < min(left, FEWEST_ROWS):
            return None
        return self._evened(left, step, make)

    def _tiles(self, begin: int, rows: int, in_weight: bool, part: int = 4) -> Step:
        """A step that stores tiles; what belongs to the rows of a block takes at most one of `part` parts of the workspace."""
        each = (1 + self.threads) * self.sizes.width
        fitting = (b for b in self._blocks(_BLOCK, FEWEST_ROWS) if part * b * each <= self.budget)
        block = next(fitting, FEWEST_ROWS)
        return self.step(TILES, begin, rows, block, hidden=self.sizes.hidden, weights=True, in_weight=in_weight)

    def apart(self, begin: int) -> tuple[list[Step] | None, ...]:
        """Gradients from sums that are known, that of hidden and the others each for itself."""
        return self.again(weights=False) if self.sizes.hidden else [], self.weights(begin)

    def weights(self, begin: int) -> list[Step] | None:
        """Gradients of weight and bias from sums that are known, of the rows from `begin` on: each is rounded once."""
        s = self.sizes
        if not (s.weight or s.bias):
            return []
        for block in self._blocks(_BLOCK, FILL):
            each = self.columns * self.threads
            classes = max(_CALL // ((s.rows - begin) * s.width * each), 1) * each
            step = self.step(WEIGHTS, begin, s.rows - begin, block, weights=True, classes=classes)
            if self.fits(step):
                return [step]
        return None

    def again(self, *, weights: bool) -> list[Step] | None:
        """Gradients from sums that are known, that of hidden among them."""

        def make(rows: int) -> Step:
            return self.step(GRADIENTS, 0, rows, min(_BLOCK, _up(rows)), hidden=True, weights=weights)

        n = self.sizes.rows
        if self.smallest:
            return [make(min(n, FILL))]
        largest = self._largest(min(n, _AGAIN), make)
        if largest is None or largest.rows < min(n, FEWEST_ROWS):
            return None
        return [self._evened(n, largest, make)]

    def _blocks(self, most: int, fewest: int) -> Iterator[int]:
        """Rows of a row block, the largest first."""
        while most >= fewest and not self.smallest:
            yield most
            most //= 2
        if self.smallest:
            yield fewest

    def _largest(self, limit: int, make: Callable[[int], Step]) -> Step | None:
        """The step of the most rows, at most `limit`, that fits into the workspace."""
        low, high, best = 0, -(-limit // FILL), None
        while low < high:
            middle = (low + high + 1) // 2
            step = make(min(middle * FILL, limit))
            if self.size(step) <= self.budget:
                low, best = middle, step
            else:
                high = middle - 1
        return best

    def _evened(self, total: int, step: Step, make: Callable[[int], Step]) -> Step:
        """A step of fewer rows, where steps for `total` rows are then as equal as can be."""
        even = make(min(total, step.rows, _up(-(-total // -(-total // step.rows)))))
        return even if self.size(even) <= self.budget else step


def _up(count: int, step: int = FILL) -> int:
    return -(-count // step) * step
