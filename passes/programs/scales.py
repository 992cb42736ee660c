# SPDX-License-Identifier: Apache-2.0
"""Weights whose rows are scaled, as those of cosine heads are: the head is the weight's own, and its logits are scaled.

`h @ (W / n[:, None]).T` is `(h @ W.T) / n`: of the scaled weight nothing is made, and the scale's gradient is one number for
each class.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ..._torch import weight_norm
from ..canonical import canonical
from ..trace import written_between
from ..values import LogitsView, Operand, Scale, example_size, same, value_of

_TURNS = ("t", "T", "mT", "transpose", "permute")
# A scaled logit is rounded once more, which is little beside the roundings of a product of so many terms, and much in half
# precision, where a product is rounded once. A narrower weight is no larger than a block of logits.
_LEAST, _EXACT = 32, (torch.float32, torch.float64)


def unscaled(view: LogitsView, heads: Collection[Node]) -> tuple[LogitsView, list[Node]]:
    """A head of a scaled weight as one of the weight with scaled logits, and the nodes that are seen through, the last first.

    Only where nothing but `heads` reads the scaled weight, which would be there all the same.
    """
    steps = [step.name for step in view.weight.steps]
    if steps not in ([], ["t"]) or view.dtype not in _EXACT or example_size(view.hidden_size) < _LEAST:
        return view, []
    node, classes, scales, through = view.weight.node, len(steps), (), []
    while (found := _scaled(node, classes)) is not None and _read_by(node, view.hidden.node, heads):
        through.append(node)
        node, scales = found[0], (*found[1], *scales)
    kept = [node, *(n for scale in scales for n in scale.operand.nodes)]
    if not through or written_between([*kept, *through], through[-1], view.linear):
        return view, []
    return replace(view, weight=replace(view.weight, node=node), scales=scales), through


def _scaled(node: Node, classes: int) -> tuple[Node, tuple[Scale, ...]] | None:
    """The weight that a node scales, and by what for each place of the dimension `classes`."""
    found = _normalised(node, classes) or _weight_norm(node, classes) or _by_a_tensor(node, classes)
    if found is None:
        return None
    weight, scales = found
    given = [value_of(n) for n in (weight, *(n for scale in scales for n in scale.operand.nodes))]
    value = value_of(node)
    alike = all(isinstance(v, Tensor) and v.dtype == value.dtype and v.device == value.device for v in given)
    # Under no_grad no gradient flows, whatever it is made of.
    flows = alike and any(v.requires_grad for v in given) == value.requires_grad
    return found if flows and value.dtype in _EXACT and _same_shape(given[0], value) else None


def _same_shape(a: Tensor, b: Tensor) -> bool:
    return a.dim() == b.dim() == 2 and all(map(same, a.shape, b.shape))


def _length(x: Any, p: float, dim: int, least: float) -> Any:
    length = x.norm(p, dim)
    return length.clamp_min(least) if least else length


def _flat(x: Any) -> Any:
    return x.reshape(-1)


def _normalised(node: Node, classes: int) -> tuple[Node, tuple[Scale, ...]] | None:
    if node.target is not F.normalize:
        return None
    bound = inspect.signature(F.normalize).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    weight, p, dim, eps, out = bound.args
    plain = isinstance(weight, Node) and all(isinstance(n, (int, float)) for n in (p, dim, eps))
    if not plain or out is not None or dim % 2 != 1 - classes:
        return None
    return weight, (Scale(torch.div, Operand(weight).then("length", _length, p, 1 - classes, eps)),)


def _weight_norm(node: Node, classes: int) -> tuple[Node, tuple[Scale, ...]] | None:
    """`torch._weight_norm(v, g, dim)`: v times g over its lengths along the other dimensions."""
    if canonical(node) not in ("_weight_norm", weight_norm) or len(node.args) < 2:
        return None
    (v, g), dim = node.args[:2], node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if not isinstance(v, Node) or not isinstance(g, Node) or not isinstance(dim, int) or dim % 2 != classes:
        return None
    length = Operand(v).then("length", _length, 2, 1 - classes, 0.0)
    return v, (Scale(torch.div, length), Scale(torch.mul, Operand(g).then("flat", _flat)))


def _by_a_tensor(node: Node, classes: int) -> tuple[Node, tuple[Scale, ...]] | None:
    """`W * s` or `W / n`, with a number for each class."""
    name = canonical(node)
    if name not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    apply = torch.mul if name == "mul" else torch.div
    pairs = [node.args, node.args[::-1]] if name == "mul" else [node.args]
    for weight, by in pairs:
        by = _unexpanded(by, classes)
        if isinstance(weight, Node) and by is not None:
            return weight, (Scale(apply, Operand(by).then("flat", _flat)),)
    return None


def _unexpanded(by: Any, classes: int) -> Node | None:
    """The (V, 1), (1, V) or (V,) tensor, with the classes along `classes`, that is broadcast, or was expanded."""
    while isinstance(by, Node) and canonical(by) in ("expand", "expand_as"):
        by = by.args[0]
    value = value_of(by) if isinstance(by, Node) else None
    if not isinstance(value, Tensor) or value.dim() not in (1, 2):
        return None
    if value.dim() == 1:  # broadcast along the last dimension
        along, alone = value.shape[0], classes == 1
    else:
        along, alone = value.shape[classes], same(value.shape[1 - classes], 1)
    return by if alone and not same(along, 1) else None


def _read_by(node: Node, hidden: Node, heads: Collection[Node]) -> bool:
    """Whether nothing but heads reads a weight, transposed or scaled further."""
    return node is not hidden and all(
        u in heads or ((canonical(u) in _TURNS or _scaled(u, 0) or _scaled(u, 1)) and _read_by(u, hidden, heads))
        for u in node.users
    )
