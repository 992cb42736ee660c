# SPDX-License-Identifier: Apache-2.0
"""An `autograd.Function` within a region: its forward is recorded without a gradient, and beside it its backward, which counts.

Dynamo writes one as `autograd_function_apply(forward, backward, *args)`, with a graph each: the forward returns the results and
what it saves, the backward takes the results' gradients and what was saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..._torch import HigherOrderOperator
from ...functional import OWN_GRADIENT, RowProgram
from ..autocast import autocast_at
from ..canonical import canonical, mutated_arguments
from ..values import value_of
from .axes import NotByRows, OwnGradient, join
from .record import Recorder
from .value import Backward, Cotangent, Made, Value

_KNOWN = {"non_differentiable_idx", "saved_for_backward_idx", "dirty_idx"}


def graphs_of(node: Node) -> list[Node]:
    """The nodes of both graphs of a call of `autograd_function_apply`."""
    return [n for n in node.args[:2] if isinstance(n, Node) and n.op == "get_attr"]


def is_function(node: Node) -> bool:
    return isinstance(node.target, HigherOrderOperator) and canonical(node) == "autograd_function_apply"


def call_function(node: Node, recorder: Recorder, casts: bool, args: Sequence[Any]) -> Any:
    """What a call of an `autograd.Function` returns for arguments that are fake tensors of a recorder.

    Raises OwnGradient where it is not by rows, writes to its arguments, keeps tensors or graphs of its own, or where autocast is
    on (`casts` says that it may be), which would make of its backward something else than of its forward.
    """
    if any(isinstance(value_of(n), torch.SymFloat) for n in node.all_input_nodes):
        raise OwnGradient("an `autograd.Function` of a number that is not known")
    tensor = next(n for n in node.all_input_nodes if isinstance(value_of(n), Tensor))
    if casts and autocast_at(tensor) is not None:
        raise OwnGradient("an `autograd.Function` under autocast")
    try:
        return _recorded(node, recorder, args)
    except NotByRows as refusal:
        raise OwnGradient(f"an `autograd.Function`: {refusal}") from refusal


def _recorded(node: Node, recorder: Recorder, args: Sequence[Any]) -> Any:
    forward, backward = _graphs(node)
    inputs = [a for a in args if isinstance(a, Tensor)]
    out, saved = _Body(forward, recorder).run(*(_detached(recorder, a) for a in args))
    results: list[Tensor] = _made([out] if isinstance(out, Tensor) else list(out))
    values = [recorder.value(t) for t in results]
    coming = [
        recorder.enter(recorder.empty(t, t.dtype, t.shape), Value(v.dims, v.dtype, Cotangent(n)))
        for n, (t, v) in enumerate(zip(results, values, strict=True))
    ]
    # A gradient for each argument of the forward; for those that are no tensors, none.
    grads = _Body(backward, recorder).run(*coming, *saved)
    wanted = [g for a, g in zip(args, grads, strict=True) if isinstance(a, Tensor)]
    source = _with_gradients(recorder, inputs, wanted, values)
    constant = node.kwargs["non_differentiable_idx"]
    entered = []
    for n, (t, v) in enumerate(zip(results, values, strict=True)):
        value = Value(v.dims, v.dtype, source, n, v.dtype.is_floating_point)
        if n in constant:  # type: ignore[operator]
            value = Value(v.dims, v.dtype, Made("aten.detach.default", (value,)))
        entered.append(recorder.enter(recorder.empty(t, t.dtype, t.shape, t.stride()), value))
    return entered[0] if isinstance(out, Tensor) else type(out)(entered)


def _graphs(node: Node) -> tuple[GraphModule, GraphModule]:
    graphs = [getattr(node.graph.owning_module, str(n.target), None) for n in graphs_of(node)]
    forward, backward = graphs if len(graphs) == 2 else (None, None)
    if not isinstance(forward, GraphModule) or not isinstance(backward, GraphModule) or node.kwargs.keys() - _KNOWN:
        raise OwnGradient("an `autograd.Function` of an unknown form")
    if node.kwargs.get("dirty_idx"):
        raise OwnGradient("an `autograd.Function` that writes to its arguments")
    return forward, backward


def _with_gradients(recorder: Recorder, inputs: Sequence[Tensor], grads: Sequence[Any], values: list[Value]) -> Made:
    """The results with gradients of their own. Raises where the gradient of an argument is not by its rows."""
    flowing: list[Value] = []
    given: list[Value] = []
    for tensor, grad in zip(inputs, grads, strict=True):
        value = recorder.value(tensor)
        if grad is None or not value.grad:
            continue
        (grad,) = _made([grad])
        made = recorder.value(grad)
        if len(made.dims) != len(value.dims) or grad.shape != tensor.shape:
            raise OwnGradient("an `autograd.Function` whose gradient has another shape than its argument")
        for a, b in zip(value.dims, made.dims, strict=True):
            if a:
                join(a, b)
        flowing.append(value)
        given.append(made)
    return Made(OWN_GRADIENT, (tuple(flowing), tuple(values), Backward(tuple(given))))


def _detached(recorder: Recorder, argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return recorder.run(torch.ops.aten.detach.default, (argument,), {})


@dataclass
class _Refused:
    """A value that is not known, which is no harm where no gradient that counts is made of it."""

    why: NotByRows


def _made(values: list[Any]) -> list[Any]:
    """Values of a graph of the function's. Raises what one of them was refused for."""
    for value in values:
        if isinstance(value, _Refused):
            raise value.why
    return values


class _Body(torch.fx.Interpreter):
    def __init__(self, body: GraphModule, recorder: Recorder) -> None:
        super().__init__(body, garbage_collect_values=False)
        self._recorder = recorder

    def run_node(self, n: Node) -> Any:
        refused = [v for i in n.all_input_nodes if isinstance(v := self.env[i], _Refused)]
        try:
            return _made(refused) if refused and n.op != "output" else super().run_node(n)
        except NotByRows as refusal:
            if mutated_arguments(n):
                raise
            return _Refused(refusal)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = str(getattr(target, "__name__", ""))
        if name == "_set_grad_enabled":
            return None
        if isinstance(target, HigherOrderOperator) or name in ("_enter_autocast", "_exit_autocast"):
            raise OwnGradient(f"`{name}` in an `autograd.Function`")
        return self._recorder.run(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._recorder.run(getattr(type(args[0]), target), args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        raise OwnGradient("an `autograd.Function` that keeps a tensor of its own")


# --- whether twice the results' gradients give twice the arguments'

_FIRST = {  # linear functions of their first argument
    "reshape", "expand", "permute", "squeeze", "alias", "neg", "sum", "mean", "select", "slice", "div", "gather", "index",
    "cumsum", "flip", "diagonal", "_to_copy",
}  # fmt: skip
_SUMS = {  # and of several: which; zeros among them are as good
    "add": (0, 1), "sub": (0, 1), "where": (1, 2), "masked_fill": (0, 2), "index_put": (0, 2), "cat": (0,), "stack": (0,),
    "scatter": (0, 3), "scatter_add": (0, 3), "select_scatter": (0, 1), "slice_scatter": (0, 1),
}  # fmt: skip


def is_in_proportion(program: RowProgram) -> bool:
    """Whether gradients of a program's inputs are in proportion to those of its outputs.

    A derivative is; the backward of an `autograd.Function` where it is made of its results' gradients by linear operations.
    """
    return all(_is_linear(program, args) for name, args, _ in program.code if name == OWN_GRADIENT)


def _is_linear(program: RowProgram, args: Any) -> bool:
    taken, backward = args[2], args[3]["backward"]
    zeros = {n for n, name in enumerate(taken) if _is_zero(program, name)}
    linear: list[bool] = []

    def proportional(x: Any) -> bool:
        """Whether something is in proportion to the gradients; zero is."""
        if isinstance(x, list):
            return bool(x) and all(map(proportional, x))
        if not isinstance(x, dict):
            return isinstance(x, (int, float)) and x == 0
        ((kind, which),) = x.items()
        return kind == "grad" or (kind == "made" and linear[which[0]]) or (kind == "taken" and which in zeros)

    def known(x: Any) -> bool:
        """Whether something does not depend on the gradients."""
        if isinstance(x, list):
            return all(map(known, x))
        return not isinstance(x, dict) or next(iter(x)) not in ("grad", "made")

    for operation, given, named in backward["code"]:
        packet = operation.split(".")[1] if "." in operation else operation
        exact = named.get("rounding_mode") is None and _is_floating(named.get("dtype"))
        if packet in ("mul", "einsum"):
            factors = given[-2:]
            linear.append(any(proportional(a) and known(b) for a, b in (factors, factors[::-1])))
        else:
            terms = (0,) if packet in _FIRST else _SUMS.get(packet, ())
            each = [proportional(x) if n in terms else known(x) for n, x in enumerate(given)]
            linear.append(bool(terms) and exact and all(each))
    return all(map(proportional, backward["grads"]))


def _is_zero(program: RowProgram, name: Any) -> bool:
    if "made" not in name:
        return False
    operation, args, _ = program.code[name["made"][0]]
    return bool(operation == "aten.full.default" and args[1] == 0)


def _is_floating(dtype: Any) -> bool:
    return dtype is None or bool(getattr(torch, dtype["dtype"]).is_floating_point)
