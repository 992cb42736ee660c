# SPDX-License-Identifier: Apache-2.0
"""An aten operation as its rule sees it, and what arguments and results hold."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..._torch import OpOverload
from .axes import Dim
from .value import Made, Places, Value

_DROPPED = ("device", "layout", "pin_memory", "memory_format", "non_blocking")


@dataclass(frozen=True)
class _Signature:
    """What an operation's schema says, which torch makes anew each time that it is asked."""

    name: str  # without the overload
    full: str
    defaults: dict[str, Any]
    by_name: frozenset[str]
    makes: bool  # whether it makes a tensor on a device that it is told
    mutable: bool
    view: bool


@functools.cache
def signature(func: OpOverload) -> _Signature:
    schema, name = func._schema, str(func.overloadpacket.__name__)
    return _Signature(
        name,
        f"aten.{name}.{func._overloadname}",
        {a.name: a.default_value for a in schema.arguments},
        frozenset(a.name for a in schema.arguments if a.kwarg_only),
        any(a.name == "device" for a in schema.arguments),
        schema.is_mutable,
        func.is_view,
    )


def tensors(tree: Any) -> list[Tensor]:
    """The tensors among arguments, or results, of aten operations: by hand, since torch's trees take longer than all else."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, (tuple, list)):
        return []
    found: list[Tensor] = []
    for x in tree:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, (tuple, list, dict)):
            found += tensors(x)
    return found


def replaced(tree: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Such arguments with the tensors, or what is of another kind, replaced."""
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)([replaced(x, function, kind) for x in tree])
    return {k: replaced(v, function, kind) for k, v in tree.items()} if isinstance(tree, dict) else tree


def values_in(argument: Any) -> list[Value]:
    """The values among the arguments of an operation as its rule sees them."""
    if isinstance(argument, Value):
        return [argument]
    return [v for x in argument for v in values_in(x)] if isinstance(argument, (list, tuple)) else []


class Call:
    """An aten operation as its rule sees it: values in the place of tensors, arguments by name."""

    def __init__(self, func: OpOverload, args: Any, kwargs: Any, out: list[Tensor]) -> None:
        self._signature: _Signature = signature(func)
        self.name: str = self._signature.name
        self.full: str = self._signature.full
        self.out: list[Tensor] = out
        defaults = self._signature.defaults
        self.arguments: dict[str, Any] = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}

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
        by_name = self._signature.by_name
        args = tuple(v for k, v in arguments.items() if k not in by_name)
        named = {k: v for k, v in arguments.items() if k in by_name and k not in _DROPPED and v is not None}
        return Made(self.full, args, named)

    def made(self, source: Made | Places, *dims: Sequence[Dim], grad: bool | None = None) -> list[Value]:
        """The results, of these dimensions each, as an operation returns them."""
        flows = any(v.grad for v in self.values) if grad is None else grad
        numbers = itertools.count() if len(self.out) > 1 else itertools.repeat(None)
        return [_result(fake, d, source, n, flows) for fake, d, n in zip(self.out, dims, numbers, strict=False)]


def _result(fake: Tensor, dims: Sequence[Dim], source: Any, index: int | None, grad: bool) -> Value:
    """A result of an operation, checked against its fake."""
    assert len(dims) == fake.dim(), (dims, fake.shape)
    return Value(list(dims), fake.dtype, source, index, grad and fake.dtype.is_floating_point)
