# SPDX-License-Identifier: Apache-2.0
"""Which dimensions of a region's tensors are rows.

A dimension is a product of axes, (B, T) after two dimensions were flattened, and no axis at all where its size is 1. Axes of
different tensors that an operation takes side by side are joined to one. An axis is a row axis where a head's rows are joined
to it, and mixed where an operation makes a place along it depend on others; it is never both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


class NotByRows(Exception):
    """An operation of a region that is not known to treat each row by itself."""


class RowsMixed(NotByRows):
    """An operation of a region that makes a row depend on others."""


class OwnGradient(NotByRows):
    """An operation of a region whose gradient is not what follows from its forward."""


@dataclass(eq=False)
class Axis:
    """Places that are kept apart from one operation to the next."""

    size: int
    row: bool = False
    mixed: str = ""  # the operation that mixed its places
    joined: Axis | None = None  # what it is now the same as
    parts: tuple[Axis, ...] = ()  # what it was split into, outermost first


Dim = tuple[Axis, ...]


def resolved(dim: Dim) -> Dim:
    """The axes of a dimension as they are now."""
    for axis in dim:
        if axis.joined is not None or axis.parts:
            break
    else:
        return dim
    found: list[Axis] = []
    for axis in dim:
        while axis.joined is not None:
            axis = axis.joined
        found += resolved(axis.parts) if axis.parts else (axis,)
    return tuple(found)


def size_of(dim: Dim) -> int:
    return math.prod(axis.size for axis in resolved(dim))


def rows_in(dim: Dim) -> Dim:
    return tuple(axis for axis in resolved(dim) if axis.row)


def others_in(dim: Dim) -> Dim:
    return tuple(axis for axis in resolved(dim) if not axis.row)


def is_row(dim: Dim) -> bool:
    """Whether nothing but rows lies along a dimension, so that one row's value has no such dimension."""
    axes = resolved(dim)
    return bool(axes) and all(axis.row for axis in axes)


def fresh(size: int) -> Dim:
    return () if size == 1 else (Axis(size),)


def mix(dim: Dim, operation: str) -> None:
    """Note that an operation mixes the places of a dimension. Raises RowsMixed where rows lie along it."""
    for axis in resolved(dim):
        if axis.row:
            raise RowsMixed(f"`{operation}` mixes rows")
        axis.mixed = axis.mixed or operation


def join(a: Dim, b: Dim) -> None:
    """Note that two dimensions have the same places. Raises NotByRows where their axes do not fit, or rows would be mixed."""
    left, right = list(resolved(a)), list(resolved(b))
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if x is y:
            continue
        if x.size > y.size:
            left[:0] = list(split(x, y.size))
            right.insert(0, y)
        elif y.size > x.size:
            right[:0] = list(split(y, x.size))
            left.insert(0, x)
        else:
            _unite(x, y)
    if left or right:
        raise NotByRows("dimensions of different sizes are taken for one")


def split(axis: Axis, outer: int) -> tuple[Axis, Axis]:
    """An axis as two, of which the first has the size `outer`. Raises NotByRows where that does not divide it."""
    if outer < 1 or axis.size % outer:
        raise NotByRows(f"{axis.size} places are divided by {outer}")
    axis.parts = tuple(Axis(size, axis.row, axis.mixed) for size in (outer, axis.size // outer))
    return axis.parts  # type: ignore[return-value]


def _unite(x: Axis, y: Axis) -> None:
    for one, other in ((x, y), (y, x)):
        if one.row and other.mixed:
            raise RowsMixed(f"`{other.mixed}` mixes rows")
    y.joined = x
    x.row, x.mixed = x.row or y.row, x.mixed or y.mixed


def regrouped(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """The dimensions of a tensor with the same elements in the same order and other sizes, as `view` makes them."""
    axes = [axis for dim in dims for axis in resolved(dim)]
    found: list[Dim] = []
    for size in sizes:
        taken: list[Axis] = []
        left = size
        while left > 1:
            if not axes:
                raise NotByRows("a view of another number of elements")
            axis = axes.pop(0)
            if left % axis.size == 0:
                taken.append(axis)
                left //= axis.size
            else:
                outer, inner = split(axis, left)
                taken.append(outer)
                axes.insert(0, inner)
                left = 1
        found.append(tuple(taken))
    if axes:
        raise NotByRows("a view of another number of elements")
    return found


def distinct(dims: Sequence[Dim]) -> bool:
    """Whether no axis lies along two dimensions of one tensor, as in the diagonal of rows against rows."""
    axes = [axis for dim in dims for axis in resolved(dim)]
    return len(axes) == len(set(axes))
