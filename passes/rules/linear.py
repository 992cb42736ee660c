"""Where a head begins: hidden @ weight.T with or without a bias, in each of its spellings."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..canonical import canonical
from ..registry import Call, Outcome, is_constant, rule
from ..values import LogitsView, Operand, value_of


def _plain(*nodes: Any, dims: tuple[int | None, ...]) -> bool:
    """Whether the nodes are tensors with those numbers of dimensions (None is any but zero)."""
    for node, dim in zip(nodes, dims, strict=True):
        value = value_of(node)
        if not isinstance(node, Node) or not isinstance(value, torch.Tensor):
            return False
        if (value.dim() == 0) if dim is None else (value.dim() != dim):
            return False
    return True


def _head(call: Call, hidden: Node, weight: Operand, bias: Node | None, class_dim: int = -1) -> LogitsView | None:
    result = call.result
    if not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        return None
    size = value_of(hidden).shape[-1]
    if not isinstance(size, int) or not isinstance(result.shape[class_dim], int):
        return None
    return LogitsView(
        linear=call.node,
        hidden_size=size,
        hidden=Operand(hidden),
        weight=weight,
        bias=None if bias is None else Operand(bias),
        dtype=result.dtype,
        class_dim=class_dim % result.dim(),
        shape=tuple(result.shape),
        path=(call.node,),
    )


_TRANSPOSES = {"t", "transpose", "permute", "T", "mT", "getattr"}


def transposed(node: Node) -> Operand:
    """The operand whose transpose `node`, a (D, V) tensor, is: seen through where it is itself a plain transpose."""
    name = canonical(node)
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is not None and isinstance(value_of(source), torch.Tensor) and value_of(source).dim() == 2:
        swaps = name == "t" or (name == "transpose" and {a % 2 for a in node.args[1:]} == {0, 1})
        if name == "permute":
            order = node.args[1:] if len(node.args) > 2 else node.args[1]
            swaps = [a % 2 for a in order] == [1, 0]  # type: ignore[union-attr]
        attribute = node.op == "call_function" and node.target is getattr and node.args[1:] in (("T",), ("mT",))
        if swaps or attribute:
            return Operand(source)
    return Operand(node).then("t", torch.t)


@rule("linear")
def linear(call: Call) -> Outcome:
    """F.linear(input, weight (V, D), bias (V,) or None)."""
    hidden, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    if not _plain(hidden, weight, dims=(None, 2)) or (bias is not None and not _plain(bias, dims=(1,))):
        return None
    return _head(call, hidden, Operand(weight), bias)


@rule("matmul", "mm")
def matmul(call: Call) -> Outcome:
    """hidden (..., D) @ weight (D, V)."""
    hidden = call.arg(0, "input")
    weight = call.arg(1, "mat2" if canonical(call.node) == "mm" else "other")
    if not _plain(hidden, weight, dims=(None, 2)):
        return None
    return _head(call, hidden, transposed(weight), None)


@rule("addmm")
def addmm(call: Call) -> Outcome:
    """bias (V,) + hidden (N, D) @ weight (D, V)."""
    bias, hidden, weight = call.arg(0, "input"), call.arg(1, "mat1"), call.arg(2, "mat2")
    if not _plain(bias, hidden, weight, dims=(1, 2, 2)):
        return None
    scales = (call.node.kwargs.get("beta", 1), call.node.kwargs.get("alpha", 1))
    if not all(is_constant(s) and s == 1 for s in scales):
        return None
    if value_of(bias).shape[0] != value_of(weight).shape[1]:
        return None
    return _head(call, hidden, transposed(weight), bias)
