# SPDX-License-Identifier: Apache-2.0
"""Where a head begins: hidden @ weight.T with or without a bias, in each of its spellings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..._torch import is_concrete_int
from ..autocast import autocast_at
from ..canonical import canonical
from ..registry import Call, Outcome, is_constant, rule
from ..sharded import is_sharded
from ..values import Decline, LogitsView, Operand, Reason, known, same, value_of


def _plain(*nodes: Any, dims: tuple[int | None, ...]) -> bool:
    """Whether the nodes are tensors with those numbers of dimensions (None is any but zero)."""
    for node, dim in zip(nodes, dims, strict=True):
        value = value_of(node)
        if not isinstance(node, Node) or not isinstance(value, torch.Tensor):
            return False
        if (value.dim() == 0) if dim is None else (value.dim() != dim):
            return False
    return True


def _head(
    call: Call, hidden: Node, weight: Operand, bias: Node | None, class_dim: int = -1, size: Any = None
) -> LogitsView | Decline | None:
    """A view that begins here; `size` is D, by default the last of hidden's sizes."""
    result = call.result
    if not isinstance(result, torch.Tensor) or not result.dtype.is_floating_point:
        return None
    if result.device.type == "meta":  # nothing to save, and no kernel to be had
        return None
    size = value_of(hidden).shape[-1] if size is None else size
    size, *shape = (int(n) if is_concrete_int(n) else n for n in (size, *result.shape))
    classes = shape[class_dim]
    if isinstance(classes, int) and not classes:
        return None
    if not known(classes >= 1) or (is_sharded(result) and not all(isinstance(n, int) for n in (size, classes))):
        return Decline(Reason.DYNAMIC, call.node, f"hidden size {size}, {classes} classes")
    if not _multiplies(
        call.node, result.dtype, {value_of(n).dtype for n in (hidden, weight.node, bias) if n is not None}
    ):
        return None
    return LogitsView(
        linear=call.node,
        hidden_size=size,
        hidden=Operand(hidden),
        weight=weight,
        bias=None if bias is None else Operand(bias),
        dtype=result.dtype,
        class_dim=class_dim % result.dim(),
        shape=tuple(shape),
        path=(call.node,),
    )


def _multiplies(head: Node, result: torch.dtype, dtypes: set[torch.dtype]) -> bool:
    """Whether eager multiplies operands of these dtypes: of one, or of several that autocast makes one.

    A fake tensor's result says nothing of it: its dtype is hidden's, whatever the weight's.
    """
    if len(dtypes) == 1:
        return True
    low = result in (torch.bfloat16, torch.float16) and torch.float64 not in dtypes
    return low and autocast_at(head) is not None


def transposed(node: Node) -> Operand:
    """The operand whose transpose `node`, a (D, V) tensor, is: seen through where it is itself a plain transpose."""
    name = canonical(node)
    source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if source is not None and isinstance(value_of(source), torch.Tensor) and value_of(source).dim() == 2:
        swaps = name == "t" or (name == "transpose" and {a % 2 for a in node.args[1:]} == {0, 1})
        if name == "permute":
            order = node.args[1:] if len(node.args) > 2 else node.args[1]
            swaps = [a % 2 for a in order] == [1, 0]  # type: ignore[union-attr]
        if swaps or name in ("T", "mT"):
            return Operand(source)
    return Operand(node).then("t", torch.t)


@rule("linear", begins=True)
def linear(call: Call) -> Outcome:
    """F.linear(input, weight (V, D), bias (V,) or None)."""
    hidden, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    if not _plain(hidden, weight, dims=(None, 2)) or (bias is not None and not _plain(bias, dims=(1,))):
        return None
    return _head(call, hidden, Operand(weight), bias)


@rule("matmul", "mm", begins=True)
def matmul(call: Call) -> Outcome:
    """hidden (..., D) @ weight (D, V), or weight (V, D) @ hidden (..., D, T)."""
    hidden = call.arg(0, "input")
    weight = call.arg(1, "mat2" if canonical(call.node) == "mm" else "other")
    if _plain(hidden, weight, dims=(2, None)) and (rank := value_of(weight).dim()) > 2:
        return _moved_head(call, weight, rank - 2, Operand(hidden), None, rank - 2)
    if not _plain(hidden, weight, dims=(None, 2)):
        return None
    return _head(call, hidden, transposed(weight), None)


@rule("addmm", begins=True)
def addmm(call: Call) -> Outcome:
    """bias (V,) + hidden (N, D) @ weight (D, V)."""
    bias, hidden, weight = call.arg(0, "input"), call.arg(1, "mat1"), call.arg(2, "mat2")
    if not _plain(bias, hidden, weight, dims=(1, 2, 2)):
        return None
    scales = (call.node.kwargs.get("beta", 1), call.node.kwargs.get("alpha", 1))
    if not all(is_constant(s) and s == 1 for s in scales):
        return None
    if not same(value_of(bias).shape[0], value_of(weight).shape[1]):
        return None
    return _head(call, hidden, transposed(weight), bias)


@rule("bmm", begins=True)
def bmm(call: Call) -> Outcome:
    """hidden (1, N, D) @ weight (1, D, V): one batch, as exported graphs write it."""
    hidden, weight = call.arg(0, "input"), call.arg(1, "mat2")
    if not _plain(hidden, weight, dims=(3, 3)) or value_of(hidden).shape[0] != 1:
        return None
    return _head(call, hidden, Operand(weight).then("one", torch.select, 0, 0).then("t", torch.t), None)


@rule("einsum", begins=True)
def einsum(call: Call) -> Outcome:
    """Of a hidden state and a weight that share one letter, with the rows in hidden's order: "btd,vd->btv"."""
    equation = call.node.args[0] if call.node.args else None
    operands = call.node.args[1] if len(call.node.args) == 2 else call.node.args[1:]
    if not isinstance(equation, str) or not isinstance(operands, (tuple, list)) or len(operands) != 2:
        return None
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    if len(sides) != 2 or len(terms) != 2 or not sides[1].isalpha() or not all(t.isalpha() for t in terms):
        return None
    for (rows, per_class), (hidden, weight) in ((terms, operands), (terms[::-1], operands[::-1])):
        found = _einsum(call, rows, per_class, sides[1], hidden, weight)
        if found is not None:
            return found
    return None


def _einsum(call: Call, rows: str, per_class: str, out: str, hidden: Any, weight: Any) -> LogitsView | None:
    shared = set(rows) & set(per_class)
    if len(per_class) != 2 or len(shared) != 1 or not _plain(hidden, weight, dims=(len(rows), 2)):
        return None
    (d,) = shared
    v = per_class.replace(d, "")
    if out.replace(v, "") != rows.replace(d, "") or len(set(rows)) != len(rows) or v not in out:
        return None
    operand = Operand(weight) if per_class == v + d else transposed(weight)
    return _moved_head(call, hidden, rows.index(d), operand, None, out.index(v))


def _moved_head(
    call: Call, hidden: Node, hidden_dim: int, weight: Operand, bias: Node | None, class_dim: int
) -> LogitsView | Decline | None:
    """A head on a hidden state whose D is at `hidden_dim`, with V at `class_dim` of the result."""
    size = value_of(hidden).shape[hidden_dim]
    view = _head(call, hidden, weight, bias, class_dim, size)
    if not isinstance(view, LogitsView) or hidden_dim == class_dim:
        return view
    return replace(view, hidden=view.hidden.then("movedim", torch.movedim, hidden_dim, class_dim))


@rule("tensordot", begins=True)
def tensordot(call: Call) -> Outcome:
    """hidden (..., D) with weight over one dimension of each, hidden's the last."""
    hidden, weight, dims = call.arg(0, "a"), call.arg(1, "b"), call.arg(2, "dims", 2)
    if not _plain(hidden, weight, dims=(None, 2)):
        return None
    if dims == 1:
        dims = ([-1], [0])
    if not isinstance(dims, (tuple, list)) or len(dims) != 2 or not all(isinstance(d, (tuple, list)) for d in dims):
        return None
    (first, second), rank = dims, value_of(hidden).dim()
    if len(first) != 1 or len(second) != 1 or first[0] % rank != rank - 1:
        return None
    return _head(call, hidden, Operand(weight) if second[0] % 2 == 1 else transposed(weight), None)


@rule("conv1d", "conv2d", "conv3d", begins=True)
def convolution(call: Call) -> Outcome:
    """hidden (B, D, ...) under a kernel (V, D, 1, ...) of size 1: (B, V, ...)."""
    hidden, weight, bias = call.arg(0, "input"), call.arg(1, "weight"), call.arg(2, "bias")
    rank = {"conv1d": 3, "conv2d": 4, "conv3d": 5}[str(canonical(call.node))]
    if not _plain(hidden, weight, dims=(rank, rank)) or (bias is not None and not _plain(bias, dims=(1,))):
        return None
    rest = [(3, "stride", 1), (4, "padding", 0), (6, "groups", 1)]
    found = [set(a) if isinstance(a, (tuple, list)) else {a} for a in (call.arg(*r) for r in rest)]
    if any(size != 1 for size in value_of(weight).shape[2:]) or found not in ([{1}, {0}, {1}], [{1}, {"valid"}, {1}]):
        return None
    return _moved_head(call, hidden, 1, Operand(weight).then("kernel", torch.flatten, 1), bias, 1)
