# SPDX-License-Identifier: Apache-2.0
"""The tensors of a region: their dimensions, what they are made of, and marks for what depends on which dimensions are rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ..values import Operand
from .axes import Dim


@dataclass(frozen=True)
class Turned:
    """A head whose rows are the classes of a product, and its classes the rows."""

    node: Node


@dataclass(frozen=True, eq=False)
class Head:
    """The product of a head: one of the program's inputs, made for some rows at a time."""

    node: Node | Turned


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor of the graph, or a head's bias, that the region reads and does not make."""

    node: Node | Operand


@dataclass(frozen=True, eq=False)
class Places:
    """0, 1, 2, ... along a dimension."""


@dataclass(frozen=True, eq=False)
class Cotangent:
    """The gradient of a result of an `autograd.Function`, which its backward is given."""

    number: int  # of the result


@dataclass(frozen=True, eq=False)
class Made:
    """What an operation returns; its arguments hold values, and marks for what depends on which dimensions are rows."""

    operation: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Value:
    """A tensor of a region."""

    dims: list[Dim]
    dtype: torch.dtype
    source: Head | Leaf | Places | Cotangent | Made
    index: int | None = None  # which of the source's results
    grad: bool = False  # whether a gradient flows through it


@dataclass(frozen=True)
class At:
    """The number of a dimension in a row's value."""

    dims: Sequence[Dim]
    dim: int


@dataclass(frozen=True)
class Order:
    """The order of a permuted tensor's dimensions in a row's value."""

    dims: Sequence[Dim]
    order: Sequence[int]


@dataclass(frozen=True)
class Shape:
    """The sizes of a row's value."""

    dims: Sequence[Dim]


@dataclass(frozen=True)
class Aligned:
    """A value as broadcasting takes it beside results of these dimensions: without those of size 1 where they have rows."""

    value: Value
    dims: Sequence[Dim]


@dataclass(frozen=True)
class Product:
    """The equation of a product of two values: a letter for each dimension."""

    values: tuple[Value, Value]
    letters: tuple[str, str, str]  # of both, and of the result
    dims: Sequence[Dim]  # of the result


@dataclass(frozen=True)
class Chosen:
    """Index tensors, or None, for each dimension of a value: those of a row's value."""

    dims: Sequence[Dim]
    by_dim: tuple[Value | Aligned | None, ...]


@dataclass(frozen=True, eq=False)
class Backward:
    """The gradients that an `autograd.Function` says its arguments have, made of its results' gradients, and of other values."""

    grads: tuple[Value, ...]

    # Both are asked for again and again, and those of a function are made of those of the functions before it.

    @functools.cached_property
    def made(self) -> dict[int, Value]:
        """What it makes of the gradients that it is given, in order, by id."""
        found: dict[int, Value] = {}
        for value in in_order(self.grads):
            if isinstance(value.source, Cotangent) or any(id(v) in found for v in made_of(value)):
                found[id(value)] = value
        return found

    @functools.cached_property
    def taken(self) -> tuple[Value, ...]:
        """What it reads and does not make: values that are there without the gradients that it is given."""
        read = [*(v for value in self.made.values() for v in made_of(value)), *self.grads]
        return tuple({id(v): v for v in read if id(v) not in self.made}.values())


def _read(argument: Any, backward: bool) -> list[Value]:
    if isinstance(argument, Value):
        return [argument]
    if isinstance(argument, Backward):
        return list(argument.grads if backward else argument.taken)
    if isinstance(argument, Aligned):
        return [argument.value]
    if isinstance(argument, Chosen):
        return [v for i in argument.by_dim for v in _read(i, backward)]
    if isinstance(argument, (list, tuple)):
        return [v for a in argument for v in _read(a, backward)]
    return []


def made_of(value: Value, backward: bool = False) -> list[Value]:
    """The values in an operation's arguments; of a backward those that it takes from outside, or with `backward` its results."""
    source = value.source
    return _read((*source.args, *source.kwargs.values()), backward) if isinstance(source, Made) else []


def in_order(outputs: Sequence[Value], backward: bool = False) -> list[Value]:
    """Everything that values are made of, each after what it is made of; with `backward` what backwards make, too."""
    found: dict[int, Value] = {}
    stack = [(v, False) for v in reversed(outputs)]
    while stack:
        value, ready = stack.pop()
        if id(value) in found:
            continue
        if ready or not isinstance(value.source, Made):
            found[id(value)] = value
            continue
        stack.append((value, True))
        stack += [(v, False) for v in made_of(value, backward) if id(v) not in found]
    return list(found.values())
