# SPDX-License-Identifier: Apache-2.0
"""A row program: what a loss does with one row of a head's logits, as text, and as a function of a block of rows.

The text is the argument of the operators in `row_op.py`: compiled graphs that hold it can be kept on disk. It is JSON with
the operations in order; a tensor is `{"head": n}`, `{"row": n}` (a value per row), `{"shared": n}` or `{"made": n}`. A number
that depends on a size that is not fixed is `{"size": [kind of input, its number, dimension, times, over, plus]}`.

The operation `own_gradient` has the arguments of an `autograd.Function` that are differentiable, its results, what its backward
takes of the program, and `{"backward": {"code": ..., "grads": ...}}`, in whose code `{"taken": n}` is one of the latter and
`{"grad": n}` the gradient of a result.
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
        shapes = {kind: _shapes(tensors) for kind, tensors in inputs.items()}
        return tuple(_run(self.code, [o.value for o in self.outputs], inputs, shapes, heads[0].device))

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


def _run(
    code: Sequence[Any], outputs: list[Any], inputs: dict[str, Any], shapes: dict[str, Any], device: torch.device
) -> list[Any]:
    """The outputs of some code for inputs by kind; `shapes` are those that sizes refer to."""
    made: list[Any] = []

    def value(x: Any) -> Any:
        if isinstance(x, list):
            return [value(i) for i in x]
        if not isinstance(x, dict):
            return x
        ((kind, which),) = x.items()
        if kind == "dtype":
            return getattr(torch, which)
        if kind == "size":
            return _size(shapes, which)
        if kind == "made":
            return made[which[0]] if which[1] is None else made[which[0]][which[1]]
        if kind == "backward":
            return lambda taken, grads: _run(
                which["code"], which["grads"], {"taken": taken, "grad": grads}, shapes, device
            )
        return inputs[kind][which]

    for name, args, kwargs in code:
        named = {k: value(v) for k, v in kwargs.items()}
        if name in _ON_A_DEVICE:
            named["device"] = device
        made.append(operation(name)(*(value(a) for a in args), **named))
    return value(outputs)


class _OwnGradient(torch.autograd.Function):
    """Results with the gradients that a function of the program's gives them, row by row or for a block."""

    generate_vmap_rule = True

    @staticmethod
    def forward(backward: Any, inputs: int, results: int, *tensors: Tensor) -> Any:
        return tuple(t.clone() for t in tensors[inputs : inputs + results])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backward, ctx.inputs, ctx.results, *tensors = inputs
        ctx.save_for_backward(*tensors[ctx.inputs + ctx.results :])
        ctx.mark_non_differentiable(*(t for t in output if not t.dtype.is_floating_point))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        taken = ctx.saved_tensors
        found = ctx.backward(taken, grads)
        return (None, None, None, *found, *[None] * (ctx.results + len(taken)))


def _with_own_gradient(inputs: list[Tensor], results: list[Tensor], taken: list[Tensor], backward: Any) -> Any:
    return _OwnGradient.apply(backward, len(inputs), len(results), *inputs, *results, *taken)


def _shapes(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [t.shape for t in tensors]


def _size(shapes: dict[str, list[torch.Size]], reference: Sequence[Any]) -> Any:
    """A number that depends on the size of an input."""
    kind, which, dim, times, over, plus = reference
    return shapes[kind][which][dim] * times // over + plus


def _filled(parts: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    left = iter(parts)
    return [next(left) if g else () for g in given]


OWN_GRADIENT = "own_gradient"

# Operations that make a tensor from nothing.
_ON_A_DEVICE = {"aten.full.default", "aten.arange.default", "aten.arange.start", "aten.arange.start_step"}


_NOT_ATEN: dict[str, Callable[..., Any]] = {"einsum": torch.einsum, OWN_GRADIENT: _with_own_gradient}


@functools.cache
def operation(name: str) -> Any:
    """`aten.sum.dim_IntList`, say; `einsum` and `own_gradient`."""
    if name in _NOT_ATEN:
        return _NOT_ATEN[name]
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
