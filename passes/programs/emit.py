# SPDX-License-Identifier: Apache-2.0
"""From recorded operations to the program of one row: dimensions with rows are left out, now that it is known which they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from ...functional import OWN_GRADIENT, Output, RowProgram
from ..values import Operand
from .axes import Axis, Dim, NotByRows, RowsMixed, distinct, is_row, others_in, resolved, rows_in, size_of
from .value import (
    Aligned,
    At,
    Backward,
    Chosen,
    Cotangent,
    Head,
    Leaf,
    Made,
    Order,
    Places,
    Product,
    Shape,
    Turned,
    Value,
    in_order,
    made_of,
)


@dataclass(frozen=True)
class RowInput:
    """A value per row that a program reads: a tensor of the graph, or the places along its axes where there is none."""

    node: Node | Operand | None
    dims: tuple[Dim, ...]
    shape: tuple[int, ...]  # of one row's value


@dataclass
class Emitted:
    """A program and what it reads."""

    rows: tuple[Axis, ...]  # the row axes, outermost first
    row_dims: tuple[Dim, ...]  # of a head's logits without their classes
    heads: list[Node | Turned] = field(default_factory=list)
    row_inputs: list[RowInput] = field(default_factory=list)
    shared: list[Node | Operand] = field(default_factory=list)
    flows: set[Any] = field(default_factory=set)  # those of the heads and inputs to which a gradient flows
    program: RowProgram = field(default_factory=lambda: RowProgram((), ()))
    classes: list[int] = field(default_factory=list)  # of the heads
    shared_dims: list[Sequence[Dim]] = field(default_factory=list)
    output_dims: list[Sequence[Dim]] = field(default_factory=list)
    sizes: dict[Axis, Any] = field(default_factory=dict)  # a `Size` for each axis whose size is not fixed, but for rows

    def reads(self) -> Any:
        """What a program reads."""
        return self.heads, [r.node for r in self.row_inputs], self.shared

    def input_sizes(self) -> list[tuple[tuple[str, int, int], int]]:
        """The sizes of what one row of a program reads, by kind of input, number and dimension."""
        shapes = [("head", [(size,) for size in self.classes]), ("row", [r.shape for r in self.row_inputs])]
        shapes.append(("shared", [tuple(map(size_of, dims)) for dims in self.shared_dims]))
        return [
            ((kind, n, d), size)
            for kind, given in shapes
            for n, shape in enumerate(given)
            for d, size in enumerate(shape)
        ]


def kept(dims: Sequence[Dim]) -> list[int]:
    """The dimensions that one row's value has."""
    return [n for n, dim in enumerate(dims) if not is_row(dim)]


def row_shape(dims: Sequence[Dim]) -> tuple[int, ...]:
    """The shape of one row's value."""
    return tuple(math.prod(a.size for a in others_in(dims[n])) for n in kept(dims))


def row_axes(dims: Sequence[Dim]) -> list[Axis]:
    """Every row axis of a tensor, outermost first."""
    return [axis for dim in dims for axis in rows_in(dim)]


def emit(outputs: Sequence[Value]) -> Emitted:
    """The program that makes some values, which have the rows of the same heads.

    Raises NotByRows where heads have different rows, or rows that are no head's.
    """
    order = in_order(outputs)
    heads = [v for v in order if isinstance(v.source, Head)]
    if not heads:
        raise NotByRows("no head is read")
    rows = tuple(row_axes(heads[0].dims))
    known = {id(axis) for axis in rows}
    own = any(isinstance(v.source, Made) and v.source.operation == OWN_GRADIENT for v in order)
    for dims in dict.fromkeys(tuple(value.dims) for value in (in_order(outputs, backward=True) if own else order)):
        if not distinct(dims):
            raise RowsMixed("rows lie along two dimensions of one tensor")
        if any(id(axis) not in known for axis in row_axes(dims)):
            raise NotByRows("heads with different rows")
    if any(row_axes(v.dims) != list(rows) for v in heads):
        raise NotByRows("heads with different rows")
    writer = _Writer(Emitted(rows, tuple(map(resolved, heads[0].dims[:-1]))))
    for value in order:
        writer.write(value)
    found = writer.found
    found.flows = _flowing(outputs, writer)
    returned = tuple(
        Output(writer.named(v), row_shape(v.dims), str(v.dtype).removeprefix("torch."), v.grad) for v in outputs
    )
    found.program = RowProgram(tuple(writer.code), returned)
    found.output_dims = [v.dims for v in outputs]
    return found


def _flowing(outputs: Sequence[Value], writer: _Writer) -> set[Any]:
    """The names of the inputs that outputs are differentiable functions of."""
    found, seen = set(), set()
    stack = [v for v in outputs if v.grad]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value.source, Made):
            stack += [v for v in made_of(value) if v.grad]
        else:
            ((kind, number),) = writer.inputs[_key(value)].items()
            found.add((kind, number))
    return found


class _Writer:
    def __init__(self, found: Emitted) -> None:
        self.found: Emitted = found
        self.code: list[tuple[str, Any, Any]] = []
        self.inputs: dict[int, Any] = {}  # names of heads and leaves
        self._names: dict[int, Any] = {}  # of everything, by where it comes from
        self._gone: dict[Any, list[int]] = {}  # the dimensions that a value loses beside results of some dimensions

    def named(self, value: Value) -> Any:
        name = self._names[_key(value)]
        return {"made": [name["made"][0], value.index]} if value.index is not None else name

    def write(self, value: Value) -> None:
        source, key = value.source, _key(value)
        if key in self._names:
            return
        if isinstance(source, Head):
            self.inputs[key] = self._names[key] = {"head": _index(self.found.heads, source.node)}
            if len(self.found.classes) < len(self.found.heads):
                self.found.classes.append(size_of(value.dims[-1]))
            shape = list(row_shape(value.dims))
            if len(shape) > 1:  # rows of one, which are dimensions like others
                self._names[key] = self._append("aten.reshape.default", [self._names[key], shape], {})
        elif isinstance(source, Leaf):
            self.inputs[key] = self._names[key] = self._leaf(source.node, value.dims)
        elif isinstance(source, Places):
            self._names[key] = self._places(value)
            self.inputs[key] = {"places": key}  # no gradient flows to them
        else:
            args = [self._argument(a) for a in source.args]
            kwargs = {k: self._argument(v) for k, v in source.kwargs.items()}
            if source.operation == "einsum":
                args = [args[0], *args[1]]
            if source.operation == OWN_GRADIENT:
                args = [*args[:2], *args[2]]
            self._names[key] = self._append(source.operation, args, kwargs)

    def _append(self, operation: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
        self.code.append((operation, args, kwargs))
        return {"made": [len(self.code) - 1, None]}

    def _leaf(self, node: Node | Operand | None, dims: Sequence[Dim]) -> Any:
        if not row_axes(dims):
            assert node is not None
            number = _index(self.found.shared, node)
            if len(self.found.shared_dims) < len(self.found.shared):
                self.found.shared_dims.append(dims)
            return {"shared": number}
        return {"row": _index(self.found.row_inputs, RowInput(node, tuple(map(resolved, dims)), row_shape(dims)))}

    def _places(self, value: Value) -> Any:
        (dim,) = [resolved(d) for d in value.dims if d] or [()]
        if rows_in(dim) and others_in(dim):
            raise NotByRows("places along rows and other dimensions at once")
        if rows_in(dim):
            name = self._leaf(None, (dim,))
        else:
            name = self._append("aten.arange.default", [math.prod(a.size for a in dim)], {})
        return self._append("aten.reshape.default", [name, list(row_shape(value.dims))], {})

    def _argument(self, a: Any) -> Any:
        if a is None or isinstance(a, (bool, int, float, str)):
            return a
        match a:
            case Value():
                return self.named(a)
            case At():
                return kept(a.dims).index(a.dim)
            case Order():
                there = kept(a.dims)
                return [there.index(d) for d in a.order if d in there]
            case Shape():
                return list(row_shape(a.dims))
            case Aligned():
                return self._aligned(a)
            case Chosen():
                return [
                    None if (i := a.by_dim[n]) is None else self._argument(i)
                    for n in range(len(a.by_dim))
                    if not is_row(a.dims[n])
                ]
            case Product():
                return self._equation(a)
            case Backward():
                return self._backward(a)
            case torch.dtype():
                return {"dtype": str(a).removeprefix("torch.")}
            case list() | tuple():
                return [self._argument(i) for i in a]
        raise NotByRows(f"an argument of type {type(a).__name__}")

    def _aligned(self, a: Aligned) -> Any:
        name, key = self.named(a.value), (tuple(a.value.dims), tuple(a.dims))
        if key not in self._gone:
            dims, rank = a.value.dims, len(a.value.dims)
            beside = list(a.dims)[len(a.dims) - rank :] if len(a.dims) >= rank else list(dims)
            there = kept(dims)
            self._gone[key] = [there.index(n) for n in range(rank) if not dims[n] and is_row(beside[n])]
        gone = self._gone[key]
        return self._append("aten.squeeze.dims", [name, list(gone)], {}) if gone else name

    def _backward(self, a: Backward) -> Any:
        """The names of what a backward takes, and its code."""
        inner = _BackwardWriter(self.found, a.taken)
        for value in a.made.values():
            inner.write(value)
        grads = [inner.named(g) for g in a.grads]
        return [[self.named(v) for v in inner.taken], {"backward": {"code": inner.code, "grads": grads}}]

    def _equation(self, a: Product) -> str:
        words = []
        for letters, dims in zip(a.letters, (a.values[0].dims, a.values[1].dims, a.dims), strict=True):
            there = kept(dims)
            words.append("".join(letter for n, letter in enumerate(letters) if n in there))
        return f"{words[0]},{words[1]}->{words[2]}"


class _BackwardWriter(_Writer):
    """Of the code of a backward, which reads the values that it takes and the gradients that it is given."""

    def __init__(self, found: Emitted, taken: Sequence[Value]) -> None:
        super().__init__(found)
        self.taken: Sequence[Value] = taken
        self._numbers = {id(v): n for n, v in enumerate(taken)}

    def named(self, value: Value) -> Any:
        if isinstance(value.source, Cotangent):
            return {"grad": value.source.number}
        return {"taken": n} if (n := self._numbers.get(id(value))) is not None else super().named(value)

    def write(self, value: Value) -> None:
        if not isinstance(value.source, Cotangent):
            super().write(value)


def _key(value: Value) -> int:
    """What tells where a value comes from; views of places have a shape each."""
    return id(value) if isinstance(value.source, Places) else id(value.source)


def _index(found: list[Any], item: Any) -> int:
    if item not in found:
        found.append(item)
    return found.index(item)
