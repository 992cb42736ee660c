# SPDX-License-Identifier: Apache-2.0
"""Gradients in the forward: where all that a row program returns flows into one scalar, with coefficients known beforehand.

The coefficients are the scalar's gradient with respect to each output. They are written into the graph before the program, by
the rules of the few operations through which a loss of rows becomes a scalar.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..._torch import tree_leaves
from ...functional import RowProgram, rows_with_grads, statistics_dtype
from ..canonical import CASTS, canonical, mutated_arguments
from ..fakes import WouldGuard, propagate
from ..rewriter import Builder, erase_unused
from ..values import same, value_of
from .own_gradient import is_in_proportion


class _NotKnown(Exception):
    """A size that has to be known, and is not."""


class _Sizes:
    """Sizes of values that are not made yet, as numbers or as the rows' count, whichever they are."""

    def __init__(self, builder: Builder, hidden: Node) -> None:
        self.builder = builder
        self._hidden, self._count = hidden, value_of(hidden).shape[0]

    @property
    def rows(self) -> Any:
        return self._count if isinstance(self._count, int) else self.builder.proxy(self._hidden).size(0)

    def numel(self, node: Node) -> Any:
        """How many elements a value has. Raises `_NotKnown`."""
        shape = value_of(node).shape
        known = math.prod(s for s in shape if isinstance(s, int))
        if all(isinstance(s, int) for s in shape):
            return known
        for each in {known, 1}:
            if same(value_of(node).numel(), self._count * each):
                return self.rows * each
        raise _NotKnown

    def shape(self, node: Node) -> list[Any]:
        """The shape of a value, with -1 for the one size that is a symbol. Raises `_NotKnown` where there are more."""
        found = [s if isinstance(s, int) else -1 for s in value_of(node).shape]
        if found.count(-1) > 1:
            raise _NotKnown
        return found


# From the scalar's gradient with respect to a node to that with respect to its argument: a scalar, or of the shape of either.
_Rule = Callable[[Any, Node, Node, _Sizes], Any]


def _other(node: Node, of: Node) -> Any:
    a, b = node.args[:2]
    return b if a is of else a


def _same_order(c: Any, node: Node, of: Node, sizes: _Sizes) -> Any:
    return c if sizes.shape(of) == [-1] and sizes.shape(node) == [-1] else c.reshape(sizes.shape(of))


_RULES: dict[str, tuple[bool, _Rule]] = {  # whether the rule needs the gradient in its whole shape
    "sum": (False, lambda c, n, x, s: c),
    "mean": (False, lambda c, n, x, s: c / s.numel(x)),
    "mul": (False, lambda c, n, x, s: c * s.builder.proxy(_other(n, x))),
    "div": (False, lambda c, n, x, s: c / s.builder.proxy(n.args[1])),
    "neg": (False, lambda c, n, x, s: -c),
    "add": (False, lambda c, n, x, s: c),
    "sub": (False, lambda c, n, x, s: c if n.args[0] is x else -c),
    "masked_fill": (False, lambda c, n, x, s: torch.where(s.builder.proxy(n.args[1]), 0.0, c)),
    **{name: (False, lambda c, n, x, s: c.to(value_of(x).dtype)) for name in CASTS},
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"), (True, _same_order)),
    "contiguous": (False, lambda c, n, x, s: c),
}


def _is_linear(node: Node, flowing: set[Node]) -> bool:
    """Whether a node is a linear function of those of its arguments that flow, by a rule above."""
    name = canonical(node)
    inputs = [n for n in node.all_input_nodes if n in flowing]
    if name not in _RULES or not isinstance(value_of(node), Tensor) or node.kwargs:
        return False
    others = [v for n in node.all_input_nodes if n not in flowing and isinstance(v := value_of(n), Tensor)]
    # A factor has one number, or one for each: the shapes of gradients are then known.
    if any(v.requires_grad or (v.dim() and not _shaped(v, value_of(node))) for v in others):
        return False
    if name in ("sum", "mean"):
        return len(node.args) == 1
    if name in ("add", "sub"):
        return (
            len(node.args) == 2
            and all(isinstance(a, Node) and a in flowing for a in node.args)
            and _alike(node, inputs)
        )
    if name in ("mul", "div", "masked_fill"):
        fill = name != "masked_fill" or node.args[2] == 0
        first = node.args[0] is inputs[0]
        once = len(inputs) == 1 and node.args.count(inputs[0]) == 1
        return fill and once and (name == "mul" or first) and _alike(node, inputs)
    return len(inputs) == 1 and node.args[0] is inputs[0]


def _shaped(a: Tensor, b: Tensor) -> bool:
    return len(a.shape) == len(b.shape) and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _alike(node: Node, inputs: list[Node]) -> bool:
    return all(_shaped(value_of(n), value_of(node)) for n in inputs)


def _grads(node: Node) -> bool:
    """Whether a gradient may flow through a reader. None flows through sizes."""
    leaves = tree_leaves(value_of(node))
    numbers = all(isinstance(v, (int, torch.SymInt)) for v in leaves) and leaves
    return not numbers and (
        node.op == "output" or any(not isinstance(v, Tensor) or v.requires_grad for v in leaves) or not leaves
    )


def make_gradients_in_forward(gm: GraphModule, call: Node) -> bool:
    """Turn a call of `cce::rows` into one of `cce::rows_with_grads`, in place; whether that is possible."""
    outputs = [u for u in call.users if u.target is operator.getitem]
    flowing = {u for u in outputs if value_of(u).requires_grad}
    if not flowing or not is_in_proportion(RowProgram.of(str(call.args[4]))):
        return False
    roots = set(flowing)
    after = False
    scalar = None
    for node in gm.graph.nodes:
        after = after or node is call
        if not after or node in roots or not any(n in flowing for n in node.all_input_nodes):
            continue
        if _is_linear(node, flowing):
            flowing.add(node)
            if value_of(node).dim() == 0 and _all_flow_into(node, flowing, roots):
                scalar = node
                break
    if scalar is None:
        return False
    return _rewrite(gm, call, outputs, scalar, flowing)


def _all_flow_into(scalar: Node, flowing: set[Node], roots: set[Node]) -> bool:
    """Whether what flows has no reader with a gradient but those on the way to a scalar."""
    way, stack = {scalar}, [scalar]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n in flowing and n not in way:
                way.add(n)
                stack.append(n)
    return roots <= way and all(u in way or not _grads(u) for n in way - {scalar} for u in n.users)


def _rewrite(gm: GraphModule, call: Node, outputs: list[Node], scalar: Node, flowing: set[Node]) -> bool:
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    late = _later(gm, call, scalar, flowing, order)
    if late is None:
        return False
    for node in late:
        call.prepend(node)
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    builder = Builder(gm.graph, {})
    hidden, weight, rows, shared, *how = call.args
    inputs = [*hidden, *weight, *rows, *shared]  # type: ignore[misc]
    needs = [bool(value_of(n).requires_grad) for n in inputs]
    try:
        with builder.before(call):
            coefficients = _coefficients(builder, call, outputs, scalar, flowing, order)
            groups = [builder.proxy(list(g)) for g in (hidden, weight, rows, shared)]  # type: ignore[arg-type]
            out = rows_with_grads(*groups, coefficients, needs, *how)
            total, dtype = out[0], value_of(scalar).dtype
            total = total if statistics_dtype(value_of(hidden[0]).dtype) == dtype else total.to(dtype)  # type: ignore[index]
            parts = {o: out[o.args[1] + 1] for o in outputs}  # type: ignore[operator]
        propagate(gm, builder.written, grad=True)
    except (_NotKnown, WouldGuard):
        builder.undo()
        return False
    scalar.replace_all_uses_with(total.node)
    for old, new in parts.items():
        old.replace_all_uses_with(new.node)
    way = sorted((n for n in flowing if n in order), key=order.__getitem__, reverse=True)
    erase_unused(gm.graph, [*way, *(o for o in outputs if o not in flowing), call])
    # Readers without a gradient, of losses that are told, stay; what they read has none any more.
    propagate(gm, [n for n in reversed(way) if not n._erased], grad=True)
    return True


def _coefficients(
    builder: Builder, call: Node, outputs: list[Node], scalar: Node, flowing: set[Node], order: dict[Node, int]
) -> list[Any]:
    """The scalar's gradient with respect to each differentiable output, of its shape."""
    value, sizes = value_of(scalar), _Sizes(builder, call.args[0][0])  # type: ignore[index,arg-type]
    one = builder.graph.call_function(torch.ones, ((),), {"dtype": value.dtype, "device": value.device})
    made: dict[Node, Any] = {scalar: builder.proxy(one)}
    whole: set[Node] = set()  # whose gradient is of their shape; that of others is a scalar
    for node in sorted(flowing, key=order.__getitem__, reverse=True):
        if node not in made or node in outputs:
            continue
        shaped, rule = _RULES[str(canonical(node))]
        factors = [v for n in node.all_input_nodes if n not in flowing and isinstance(v := value_of(n), Tensor)]
        for n in [n for n in node.all_input_nodes if n in flowing]:
            part = made[node] if shaped and node not in whole else rule(made[node], node, n, sizes)
            if (node in whole or any(f.dim() for f in factors)) and canonical(node) not in ("sum", "mean"):
                whole.add(n)
            made[n] = part if n not in made else made[n] + part
    found = []
    for output in sorted((o for o in outputs if o in made), key=lambda o: o.args[1]):  # type: ignore[arg-type,return-value]
        c = made[output].to(value_of(output).dtype)
        found.append(c if output in whole else c.expand([sizes.rows, *value_of(output).shape[1:]]))
    return found


def _later(gm: GraphModule, call: Node, scalar: Node, flowing: set[Node], order: dict[Node, int]) -> list[Node] | None:
    """The nodes after a call that make the factors of what flows from it, to be moved before it; None where they cannot be."""
    found: set[Node] = set()
    stack = [n for f in flowing if f in order for n in f.all_input_nodes if n not in flowing]
    while stack:
        node = stack.pop()
        if node in found or order[node] <= order[call]:
            continue
        if any(n in flowing or n is call for n in node.all_input_nodes) or node.op not in (
            "call_function",
            "call_method",
        ):
            return None
        found.add(node)
        stack += node.all_input_nodes
    if found:
        between = [n for n in gm.graph.nodes if order[call] < order[n] < order[scalar]]
        if any(mutated_arguments(n) or not _can_move(n) for n in between):
            return None
    return sorted(found, key=order.__getitem__)


def _can_move(node: Node) -> bool:
    name = str(canonical(node))
    return value_of(node) is not None and not any(part in name for part in ("drop", "rand", "bernoulli", "multinomial"))
