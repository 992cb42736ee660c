# SPDX-License-Identifier: Apache-2.0
"""A row program: what a loss does with one row of a head's logits, as text, and as a function of a block of rows.

The text is the argument of the operators in `row_op.py`: compiled graphs that hold it can be kept on disk. It is JSON with
the operations in order; a tensor is `{"head": n}`, `{"row": n}` (a value per row), `{"shared": n}` or `{"made": n}`. A number
that depends on a size that is not fixed is `{"size": [kind of input, its number, dimension, times, over, plus]}`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._torch import OpOverload


@dataclass(frozen=True)
class Output:
    """One value per row that a program returns."""

    value: Any  # which one, as the text names it
    shape: tuple[Any, ...]  # of one row's
    dtype: str
    grad: bool  # whether a gradient flows through it


@dataclass(frozen=True)
class RowProgram:
    """Operations on one row of the logits of each head, on values of the row, and on tensors that all rows share."""

    code: tuple[tuple[str, Any, Any], ...]  # (operation, args, kwargs)
    outputs: tuple[Output, ...]

    def text(self) -> str:
        outputs = [[o.value, list(o.shape), o.dtype, o.grad] for o in self.outputs]
        return json.dumps({"code": self.code, "outputs": outputs}, separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(512)
    def of(text: str) -> RowProgram:
        """The program that a text is of."""
        data = json.loads(text)
        outputs = tuple(Output(v, tuple(shape), dtype, grad) for v, shape, dtype, grad in data["outputs"])
        return RowProgram(tuple((op, args, kwargs) for op, args, kwargs in data["code"]), outputs)

    def one_row(self, heads: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of one row: of its logits (V,) of each head, its values, and the shared tensors."""
        inputs = {"head": heads, "row": rows, "shared": shared}
        made: list[Any] = []
        device = heads[0].device

        def value(x: Any) -> Any:
            if isinstance(x, list):
                return [value(i) for i in x]
            if not isinstance(x, dict):
                return x
            ((kind, which),) = x.items()
            if kind == "dtype":
                return getattr(torch, which)
            if kind == "size":
                return _size({k: _shapes(v) for k, v in inputs.items()}, which)
            if kind == "made":
                return made[which[0]] if which[1] is None else made[which[0]][which[1]]
            return inputs[kind][which]

        for name, args, kwargs in self.code:
            named = {k: value(v) for k, v in kwargs.items()}
            if name in _ON_A_DEVICE:
                named["device"] = device
            made.append(operation(name)(*(value(a) for a in args), **named))
        return tuple(value(o.value) for o in self.outputs)

    def output_shapes(
        self, weight: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> list[tuple[Any, ...]]:
        """The shape of one row's value of each output, for heads of the `weight` (V, D) and values (N, ...) of the rows."""
        shapes = {"head": [w.shape[:1] for w in weight], "row": [r.shape[1:] for r in rows], "shared": _shapes(shared)}
        return [tuple(_size(shapes, s["size"]) if isinstance(s, dict) else s for s in o.shape) for o in self.outputs]

    def block(self, heads: Sequence[Tensor], rows: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs (n, ...) of n rows: of logits (n, V), values (n, ...) and shared tensors."""
        in_dims = ((0,) * len(heads), (0,) * len(rows), (None,) * len(shared))
        given = (tuple(heads), tuple(rows), tuple(shared))
        empty = tuple(d for d, g in zip(in_dims, given, strict=True) if g)
        run = lambda *parts: self.one_row(*_filled(parts, given))  # noqa: E731
        return torch.vmap(run, in_dims=empty)(*(g for g in given if g))


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [t.shape for t in tensors]


def _size(shapes: dict[str, list[torch.Size]], reference: Sequence[Any]) -> Any:
    """A number that depends on the size of an input."""
    kind, which, dim, times, over, plus = reference
    return shapes[kind][which][dim] * times // over + plus


def _filled(parts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    left = iter(parts)
    return [next(left) if g else () for g in given]


# Operations that make a tensor from nothing.
_ON_A_DEVICE = {"aten.full.default", "aten.arange.default", "aten.arange.start", "aten.arange.start_step"}


@functools.cache
def operation(name: str) -> Any:
    """`aten.sum.dim_IntList`, say; and `einsum`."""
    if name == "einsum":
        return torch.einsum
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _added_by_places(whole: Tensor, dim: int, index: Tensor, source: Tensor) -> Any:
    """`scatter_add` of one number a row, the gradient of picking a class of each."""
    rank = whole.dim()
    one = [1 if d == dim % max(rank, 1) else size for d, size in enumerate(whole.shape)]
    if not rank or list(index.shape) != one or list(source.shape) != one:
        return NotImplemented
    shape = [whole.shape[d] if d == dim % rank else 1 for d in range(rank)]
    places = torch.arange(whole.shape[dim], device=whole.device).view(shape)
    return whole + torch.where(places == index, source, 0)


# Operations as a block that is compiled makes them: what is told place by place is fused, and held nowhere.
PLACE_BY_PLACE: dict[OpOverload, Callable[..., Any]] = {torch.ops.aten.scatter_add.default: _added_by_places}
