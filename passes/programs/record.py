# SPDX-License-Identifier: Apache-2.0
"""A recorder of aten operations on tensors whose dimensions are axes.

A region's nodes are run on fake tensors of sizes that are numbers, and each aten operation below them is written down with
the axes of its results by its rule in `operations.py`, or by what torch decomposes it to. What comes out is not yet a program:
until the region ends, a dimension may still turn out to be rows.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..._torch import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    decomposition_table,
    disable_modes,
)
from ..values import Operand
from .axes import Dim, NotByRows, RowsMixed, distinct


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
    source: Head | Leaf | Places | Made
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


PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")


class Recorder(TorchDispatchMode):
    """Notes what is done to fake tensors while it is the current mode."""

    def __init__(
        self, rules: dict[str, Callable[..., Any]], is_pointwise: Callable[[OpOverload], bool], autocast: bool
    ) -> None:
        super().__init__()
        # Fakes are tensors on meta, which are made in a tenth of the time; but autocast asks for a device.
        self._fake_mode: FakeTensorMode | None = FakeTensorMode() if autocast else None
        self._rules = rules
        self._is_pointwise = is_pointwise
        self._values: dict[int, Value] = {}
        self._changed: dict[int, str] = {}  # fakes whose memory an operation wrote to by another name
        self._kept: list[Tensor] = []  # an id is a tensor's only while it lives
        self._views: dict[
            int, tuple[Tensor, Any, tuple[Any, ...]]
        ] = {}  # of what, by which operation, and its arguments
        self._memory: dict[int, list[int]] = {}  # fakes by their storage
        self._known: dict[Any, Any] = {}  # results of operations, by the kinds of their arguments
        self.products: int = 0  # how many were recorded

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function of a graph returns for arguments in which tensors are fake."""
        with torch.no_grad(), self._fake_mode or contextlib.nullcontext(), self:
            return function(*args, **kwargs)

    def empty(
        self, like: Tensor, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """A fake of some shape, on the device of another tensor."""
        with self._fake_mode or contextlib.nullcontext():
            device = like.device if self._fake_mode else torch.device("meta")
            if stride is None:
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def enter(self, fake: Tensor, value: Value) -> Tensor:
        """Make a tensor known."""
        if not distinct(value.dims):
            raise RowsMixed("rows lie along two dimensions of one tensor")
        self._values[id(fake)] = value
        self._kept.append(fake)
        self._memory.setdefault(_memory_of(fake), []).append(id(fake))
        return fake

    def value(self, fake: Tensor) -> Value:
        """What is known of a tensor. Raises NotByRows for one that the region does not know, or that was changed."""
        if id(fake) in self._changed:
            raise NotByRows(self._changed[id(fake)])
        if id(fake) not in self._values:
            constant = fake if type(fake) is Tensor else getattr(fake, "constant", None)
            if constant is None or constant.dim() or constant.device.type == "meta":
                raise NotByRows("a constant tensor of the program's own")
            with disable_modes():
                number = constant.item()
            made = Made("aten.full.default", (Shape(()), number), {"dtype": fake.dtype})
            self.enter(fake, Value([], fake.dtype, made))
        return self._values[id(fake)]

    def detach(self, fake: Tensor) -> None:
        """No gradient flows through a tensor, as the program has it."""
        value = self.value(fake)
        self._values[id(fake)] = Value(value.dims, value.dtype, Made("aten.detach.default", (value,)))

    def new(
        self, fake: Tensor, dims: Sequence[Dim], source: Any, index: int | None = None, grad: bool = False
    ) -> Value:
        """A result of an operation, checked against its fake."""
        assert len(dims) == fake.dim(), (dims, fake.shape)
        return Value(list(dims), fake.dtype, source, index, grad and fake.dtype.is_floating_point)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given = kwargs or {}, _tensors((args, kwargs))
        if self._fake_mode is None and (kwargs.get("device") is not None or (not given and _makes(func))):
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = self._result(func, args, kwargs)
        made = _tensors(out)
        if (not made and not given) or func.namespace == "prim":
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotByRows(f"`{func}` draws random numbers")
        if func._schema.is_mutable:
            self._write(func, args, kwargs)
            return out
        values = self._recorded(func, args, kwargs, out)
        for fake, value in zip(made, values, strict=True):
            if not any(fake is t for t in given):
                self.enter(fake, value)
                if func.is_view and fake is out:
                    self._views[id(fake)] = (args[0], func, args[1:])
        return out

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returns. Of one tensor, not a view, it is remembered for arguments of the same kinds."""
        if self._fake_mode is not None or func.is_view or func._schema.is_mutable:
            return func(*args, **kwargs)
        key = func, _kinds(args), _kinds(kwargs)
        try:
            known = self._known.get(key)
        except TypeError:  # an argument without a hash
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            plain = type(out) is Tensor and out.device.type == "meta" and not any(out is t for t in _tensors(args))
            if plain and out._base is None:
                self._known[key] = (out.shape, out.stride(), out.dtype)
            return out
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _recorded(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> list[Value]:
        name = name_of(func)
        if name.startswith("nll_loss") and args[1].dtype not in (torch.int64, torch.uint8):
            raise NotByRows("targets that torch itself refuses, and its decomposition does not")
        if func.namespace != "aten":
            raise NotByRows(f"`{func}` is no operation of torch's own")
        rule = self._rules.get(name)
        self.products += name in PRODUCTS
        if rule is None and self._is_pointwise(func):
            rule = self._rules["pointwise"]
        if rule is not None:
            args, kwargs = _replaced(args, self.value), _replaced(kwargs, self.value)
            return list(rule(Call(self, func, args, kwargs, _tensors(out))))
        decomposition = decomposition_table.get(func, func.decompose)
        with self:
            made = decomposition(*args, **kwargs)
        if made is NotImplemented:
            raise NotByRows(f"`{func}` is not known")
        return [self.value(t) for t in _tensors(made)]

    def _write(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        """An operation in place is the one out of place, whose result takes the tensor's name."""
        first = args[0]
        packet, overload = func._schema.name.split("::")[1], func._overloadname
        functional = getattr(torch.ops.aten, packet.removesuffix("_"), None)
        if not packet.endswith("_") or not hasattr(functional, overload) or "out" in kwargs:
            raise NotByRows(f"`{func}` writes to memory")
        target = self._values.get(id(first))
        if target is None or isinstance(target.source, Leaf):
            raise NotByRows(f"`{func}` writes to a tensor of the program's")
        with self:
            made = getattr(functional, overload)(*args, **kwargs)
            made = made if made.dtype == first.dtype else made.to(first.dtype)
            made = made if made.shape == first.shape else made.expand(first.shape)
        written = {id(first)}
        self._values[id(first)] = self.value(made)
        part = first
        while id(part) in self._views:  # what a part is of is written to as well
            whole, view, rest = self._views[id(part)]
            if self.value(whole).grad and view is torch.ops.aten.detach.default:
                raise NotByRows("logits are written to under another name, of which no gradient knows")
            with self:
                part_made = _written_back(view, whole, made, rest)
            written.add(id(whole))
            self._values[id(whole)] = self.value(part_made)
            part, made = whole, part_made
        for other in self._memory[_memory_of(first)]:
            if other not in written:
                self._changed[other] = f"`{func}` changes it in place under another name"


def _written_back(view: OpOverload, whole: Tensor, part: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """What a tensor is after a view of it was written over."""
    name, aten = name_of(view), torch.ops.aten
    if name == "select":
        return aten.select_scatter.default(whole, part, *rest)
    if name == "slice":
        return aten.slice_scatter.default(whole, part, *rest)
    if name in ("view", "_unsafe_view", "unsqueeze", "squeeze", "alias"):
        return aten.reshape.default(part, list(whole.shape))
    if name == "detach":
        return part
    raise NotByRows(f"a part of a tensor, by `{name}`, is written to")


@functools.cache
def _makes(func: OpOverload) -> bool:
    """Whether an operation makes a tensor on a device that it is told."""
    return any(a.name == "device" for a in func._schema.arguments)


def name_of(func: OpOverload) -> str:
    """An operation's name without its overload."""
    return str(func.overloadpacket.__name__)


def _memory_of(fake: Tensor) -> int:
    return fake.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments, or results, of aten operations: by hand, since torch's trees take longer than all else."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    return [t for x in tree for t in _tensors(x)]


def _replaced(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """Such arguments with the tensors replaced."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([_replaced(x, function) for x in tree])
    return {k: _replaced(v, function) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _kinds(argument: Any) -> Any:
    """What the shape, strides and dtype of a result depend on: those of tensors, and everything else."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, (tuple, list)):
        return tuple(_kinds(a) for a in argument)
    if isinstance(argument, dict):
        return tuple((k, _kinds(v)) for k, v in argument.items())
    return type(argument), argument


def values_in(argument: Any) -> list[Value]:
    """The values among the arguments of an operation as its rule sees them."""
    if isinstance(argument, Value):
        return [argument]
    return [v for x in argument for v in values_in(x)] if isinstance(argument, (list, tuple)) else []


class Call:
    """An aten operation as its rule sees it: values in the place of tensors, arguments by name."""

    def __init__(self, recorder: Recorder, func: OpOverload, args: Any, kwargs: Any, out: list[Tensor]) -> None:
        self.name: str = name_of(func)
        self.full: str = f"aten.{self.name}.{func._overloadname}"
        self.out: list[Tensor] = out
        self._recorder = recorder
        schema = func._schema.arguments
        given = dict(zip((a.name for a in schema), args, strict=False)) | dict(kwargs)
        self.arguments: dict[str, Any] = {a.name: given.get(a.name, a.default_value) for a in schema}
        self._by_name = {a.name for a in schema if a.kwarg_only}

    @property
    def values(self) -> list[Value]:
        """Every tensor among the arguments."""
        return [v for argument in self.arguments.values() for v in values_in(argument)]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def dims(self, name: str = "dim", of: str = "self") -> list[int]:
        """A dimension, or several, counted from the first; all where none is given."""
        rank, given = len(self[of].dims), self.arguments.get(name)
        if given is None or given == []:
            return list(range(rank))
        return [d % rank if rank else 0 for d in (given if isinstance(given, (list, tuple)) else [given])]

    def written(self, /, **changed: Any) -> Made:
        """The operation itself with arguments changed."""
        arguments = self.arguments | changed
        drop = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}
        args = tuple(v for k, v in arguments.items() if k not in self._by_name)
        named = {k: v for k, v in arguments.items() if k in self._by_name and k not in drop and v is not None}
        return Made(self.full, args, named)

    def made(self, source: Made | Places, *dims: Sequence[Dim], grad: bool | None = None) -> list[Value]:
        """The results, of these dimensions each, as an operation returns them."""
        flows = any(v.grad for v in self.values) if grad is None else grad
        numbers = itertools.count() if len(self.out) > 1 else itertools.repeat(None)
        return [
            self._recorder.new(fake, d, source, n, flows) for fake, d, n in zip(self.out, dims, numbers, strict=False)
        ]
