# SPDX-License-Identifier: Apache-2.0
"""Sizes that are symbols: numbers while a region is read, and references to inputs in the program that is made of it.

A region is read twice, with other numbers in the place of the symbols. What differs between the two programs depends on a size
that is not fixed, and is written as what it is of the size of one of the program's inputs; where it is nothing simple of any,
there is no program.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from ...functional import RowProgram
from ..values import example_size
from .axes import Axis, Dim, NotByRows, resolved
from .emit import Emitted

_FIRST = 10_007  # no symbol's number is smaller, so that few constants of a program are one
_LARGEST = 64  # what a size may be multiplied with or divided by, or what is added, for another to be known from it


class Numbers:
    """A number for each symbol: primes, not below the sizes of the example, so that sizes differ unless they are the same."""

    def __init__(self, reading: int) -> None:
        self.given: dict[sympy.Symbol, int] = {}
        self._factor = 3**reading

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            if symbol not in self.given:
                self.given[symbol] = self._next(example_size(value))
        return int(expression.subs(self.given))

    def _next(self, size: int) -> int:
        taken = self.given.values()
        return next(number for number in primes(self._factor * max(_FIRST, size)) if number not in taken)


def primes(first: int) -> Iterator[int]:
    """The primes above a number."""
    number = first
    while True:
        number = int(sympy.nextprime(number))
        yield number


@dataclass(frozen=True)
class Size:
    """What a number is of the size of a program's input: `size * times // over + plus`."""

    kind: str  # "head", "row" or "shared"
    which: int
    dim: int
    times: int = 1
    over: int = 1
    plus: int = 0

    def of(self, size: Any) -> Any:
        """The number, of the input's size: an int, or a proxy."""
        size = size if self.times == 1 else size * self.times
        size = size if self.over == 1 else size // self.over
        return size if not self.plus else size + self.plus

    def text(self) -> Any:
        return {"size": [self.kind, self.which, self.dim, self.times, self.over, self.plus]}


class _Known:
    """The sizes of a program's inputs in both readings."""

    def __init__(self, one: Emitted, two: Emitted) -> None:
        self._sizes: list[tuple[int, int, Size]] = []
        for a, b in zip(one.input_sizes(), two.input_sizes(), strict=True):
            if a[1] != b[1]:
                self._sizes.append((a[1], b[1], Size(*a[0])))

    def reference(self, a: int, b: int) -> Size:
        """What numbers of the two readings are. Raises NotByRows."""
        for x, y, size in self._sizes:
            if (x, y) == (a, b):
                return size
        for x, y, size in self._sizes:
            if a - x == b - y and abs(a - x) <= _LARGEST:
                return replace(size, plus=a - x)
            for times, over in ((a // x, 1), (1, x // a if a else 0)):
                if 0 < times * over <= _LARGEST and (x * times, y * times) == (a * over, b * over):
                    return replace(size, times=times, over=over)
        raise NotByRows("the program depends on a size that is not fixed")

    def merged(self, a: Any, b: Any) -> Any:
        """A part of a program's text in both readings as one."""
        if isinstance(a, dict) and isinstance(b, dict):
            return {k: self.merged(v, b.get(k)) for k, v in a.items()}
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
            return [self.merged(x, y) for x, y in zip(a, b, strict=True)]
        if a == b or (a != a and b != b):
            return a
        if isinstance(a, int) and isinstance(b, int):
            return self.reference(a, b).text()
        raise NotByRows("the program depends on a size that is not fixed")

    def of_axes(self, dims: Iterable[tuple[Sequence[Dim], Sequence[Dim]]]) -> dict[Axis, Size]:
        """What the axes of values are whose sizes differ, but for rows."""
        found = {}
        for ones, twos in dims:
            for one, two in zip(ones, twos, strict=True):
                for a, b in zip(resolved(one), resolved(two), strict=True):
                    if a.size != b.size and not a.row:
                        found[a] = self.reference(a.size, b.size)
        return found


def without_numbers(one: Emitted, two: Emitted) -> Emitted:
    """A program that was emitted from two readings, with references in the place of numbers that differ.

    Raises NotByRows where one is no reference, or the readings differ in anything else.
    """
    if one.reads() != two.reads() or len(one.program.code) != len(two.program.code):
        raise NotByRows("what the program does depends on a size that is not fixed")
    known = _Known(one, two)
    code = [known.merged(a, b) for a, b in zip(one.program.code, two.program.code, strict=True)]
    outputs = [
        replace(a, shape=tuple(known.merged(a.shape, b.shape)))
        for a, b in zip(one.program.outputs, two.program.outputs, strict=True)
    ]
    dims = [(a.dims, b.dims) for a, b in zip(one.row_inputs, two.row_inputs, strict=True)]
    dims += zip(one.output_dims, two.output_dims, strict=True)
    program = RowProgram(tuple((op, args, kwargs) for op, args, kwargs in code), tuple(outputs))
    return replace(one, program=program, sizes=known.of_axes(dims))
