# SPDX-License-Identifier: Apache-2.0
"""One name for one operation, whichever way the graph spells it.

`torch.Tensor.view` as a method, `aten.view.default` and `aten._unsafe_view.default` are all "view"; `operator.truediv`,
`torch.div` and `aten.div.Tensor` are all "div". Rules are registered under these names, or under a callable of the
user's own.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from .._torch import DTENSOR_CLOSURES, HigherOrderOperator, OpOverload, OpOverloadPacket, c_nn

_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "_unsafe_view": "view",
    "view_copy": "view",
    "_reshape_alias": "view",
    "view_as": "reshape_as",
    "_log_softmax": "log_softmax",
    "_softmax": "softmax",
    "cross_entropy_loss": "cross_entropy",
    "nll_loss_nd": "nll_loss",
    "nll_loss2d": "nll_loss",
    "_to_copy": "to",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "clone": "contiguous",
    "alias": "contiguous",
    "lift_fresh_copy": "contiguous",
    "concat": "cat",
    "concatenate": "cat",
    "numpy_T": "T",
    "matrix_H": "H",
}
# Attributes that Dynamo writes as `getattr` before torch 2.15, and as operators from then on.
_ATTRIBUTES = ("T", "mT", "H", "mH")

# Operations that change a tensor's dtype, or its device, and nothing else.
CASTS = ("float", "double", "half", "bfloat16", "to", "type", "type_as")

_NAMES = """
linear matmul mm addmm bmm baddbmm einsum tensordot conv1d conv2d conv3d
view reshape flatten unflatten squeeze unsqueeze transpose permute movedim t swapaxes swapdims moveaxis getitem narrow
select slice index_select roll view_as reshape_as expand masked_select rearrange
contiguous clone alias detach to float double half bfloat16 type type_as _to_copy
mul multiply div truediv true_divide divide neg negative tanh add sub subtract rsub
split chunk tensor_split unbind
log_softmax _log_softmax softmax _softmax log exp cross_entropy cross_entropy_loss nll_loss nll_loss_nd nll_loss2d gather
take_along_dim logsumexp masked_fill where cat concat concatenate dropout sum mean one_hot arange amax
""".split()


@functools.cache
def _functions() -> dict[Any, str]:
    found: dict[Any, str] = {}
    for name in _NAMES:
        for space in (torch, F, operator, c_nn, torch.special, torch.Tensor):
            function = getattr(space, name, None)
            if callable(function):
                found[function] = _ALIASES.get(name, name)
        method = getattr(torch.Tensor, f"__{name}__", None)
        if method is not None:
            found[method] = _ALIASES.get(name, name)
    for name in ("argmax", "argmin", "max", "min", "topk"):
        found |= {getattr(torch, name): name, getattr(torch.Tensor, name): name}
    found[torch.Tensor.__rmul__] = "mul"
    return found


def canonical(node: Node) -> str | Callable[..., Any] | None:
    """The operation's name, the target itself where it has none, or None for what is not an operation."""
    if node.op == "call_method":
        name = str(node.target)
        return _ALIASES.get(name, name)
    if node.op != "call_function":
        return None
    target: Any = node.target
    if target is getattr and node.args[1] in _ATTRIBUTES:
        return str(node.args[1])
    if isinstance(target, OpOverload):
        if target.namespace != "aten":
            return target.overloadpacket
        name = target._schema.name.split("::")[1]
        return _ALIASES.get(name, name)
    if isinstance(target, HigherOrderOperator):
        return target.name()
    if isinstance(target, OpOverloadPacket):
        if not target._qualified_op_name.startswith("aten::"):
            return target
        return _ALIASES.get(target.__name__, target.__name__)
    return canonical_callable(target)


def canonical_callable(function: Callable[..., Any]) -> str | Callable[..., Any]:
    """The name of a function or method descriptor, or itself where it has none."""
    if getattr(function, "__module__", None) == DTENSOR_CLOSURES:
        return function.__name__.removeprefix("prim_")
    try:
        return _functions().get(function, function)
    except TypeError:  # an unhashable callable
        return function


def arguments(node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node after the first, and those by name; of one of Dynamo's closures, what it closes over."""
    if getattr(node.target, "__module__", None) != DTENSOR_CLOSURES:
        return node.args[1:], dict(node.kwargs)
    inside = inspect.getclosurevars(node.target).nonlocals  # type: ignore[arg-type]
    return tuple(inside.get("args_as_value", ())), dict(inside.get("kwargs_as_value", {}))


# What `torch.export` writes beside a cast: a check of what the graph's own values tell already.
CHECKS = ("_assert_tensor_metadata",)


def mutated_arguments(node: Node) -> list[Node]:
    """The nodes whose tensors this node writes to."""
    if node.op not in ("call_function", "call_method"):
        return []
    target: Any = node.target
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, Node) else []
    if isinstance(target, OpOverload):
        if target._schema.is_mutable:
            for argument, value in zip(target._schema.arguments, node.args, strict=False):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    written += [
                        n for n in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(n, Node)
                    ]
        return written
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes if "mutation" in target.name() else written
    first = node.args[0] if node.args else None
    inplace = is_inplace_name(target) if isinstance(target, str) else is_inplace_callable(target)
    if isinstance(first, Node) and (inplace or node.kwargs.get("inplace") is True):
        written.append(first)
    return written


_HARMLESS = {"requires_grad_"}
_INPLACE = "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift setitem".split()
_INPLACE_METHODS = {f"__{name}__" for name in _INPLACE}
_INPLACE_OPERATORS = {getattr(operator, name) for name in _INPLACE}


@functools.cache
def is_inplace_name(method: str) -> bool:
    """Whether a Tensor method of that name writes to its tensor."""
    named = method.endswith("_") and not method.endswith("__") and method not in _HARMLESS
    return named or method in _INPLACE_METHODS


def is_inplace_callable(function: Callable[..., Any]) -> bool:
    """Whether a function or method descriptor writes to its first argument."""
    return function in _INPLACE_OPERATORS or is_inplace_name(getattr(function, "__name__", ""))
