# SPDX-License-Identifier: Apache-2.0
"""Where all that flows from some nodes ends in one scalar, with coefficients known beforehand, and those coefficients.

Gradients of a loss can then be made while its logits are at hand, in the forward. The coefficients are the scalar's gradient with
respect to each node. They are written into the graph by the rules of the few operations through which losses become a scalar.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .._torch import tree_leaves
from .canonical import CASTS, canonical, mutated_arguments
from .fakes import propagate
from .rewriter import Builder, erase_unused, in_its_place
from .trace import nodes_between, storage_of, written_between
from .values import same, value_of


class NotKnown(Exception):
    """A size that has to be known, and is not."""


class _Sizes:
    """Sizes of values that are not made yet, as numbers or as the rows of a hidden state, whichever they are."""

    def __init__(self, builder: Builder, hidden: Sequence[Node]) -> None:
        self.builder = builder
        self._hidden: Sequence[Node] = hidden  # (N, D) each

    def rows(self, hidden: Node) -> Any:
        count = value_of(hidden).shape[0]
        return count if isinstance(count, int) else self.builder.proxy(hidden).size(0)

    def numel(self, node: Node) -> Any:
        """How many elements a value has. Raises `NotKnown`."""
        shape = value_of(node).shape
        known = math.prod(s for s in shape if isinstance(s, int))
        if all(isinstance(s, int) for s in shape):
            return known
        for hidden in self._hidden:
            for each in {known, 1}:
                if same(value_of(node).numel(), value_of(hidden).shape[0] * each):
                    return self.rows(hidden) * each
        raise NotKnown

    def shape(self, node: Node) -> list[Any]:
        """The shape of a value, with -1 for the one size that is a symbol. Raises `NotKnown` where there are more."""
        found = [s if isinstance(s, int) else -1 for s in value_of(node).shape]
        if found.count(-1) > 1:
            raise NotKnown
        return found


# From the scalar's gradient with respect to a node to that with respect to its argument: a scalar, or of the shape of either.
_Rule = Callable[[Any, Node, Node, _Sizes], Any]


def _other(node: Node, of: Node) -> Any:
    a, b = node.args[:2]
    return b if a is of else a


def _same_order(c: Any, node: Node, of: Node, sizes: _Sizes) -> Any:
    return c if sizes.shape(of) == [-1] and sizes.shape(node) == [-1] else c.reshape(sizes.shape(of))


def _one_of(c: Any, node: Node, of: Node, sizes: _Sizes) -> Any:
    return c.select(0, list(node.args[0]).index(of))  # type: ignore[arg-type]


_RULES: dict[Any, tuple[bool, _Rule]] = {  # whether the rule needs the gradient in its whole shape
    "sum": (False, lambda c, n, x, s: c),
    "mean": (False, lambda c, n, x, s: c / s.numel(x)),
    "mul": (False, lambda c, n, x, s: c * s.builder.proxy(_other(n, x))),
    "div": (False, lambda c, n, x, s: c / s.builder.proxy(n.args[1])),
    "neg": (False, lambda c, n, x, s: -c),
    "add": (False, lambda c, n, x, s: c),
    "sub": (False, lambda c, n, x, s: c if n.args[0] is x else -c),
    "masked_fill": (False, lambda c, n, x, s: torch.where(s.builder.proxy(n.args[1]), 0.0, c)),
    "where": (False, lambda c, n, x, s: c),
    torch.stack: (True, _one_of),
    **{name: (False, lambda c, n, x, s: c.to(value_of(x).dtype)) for name in CASTS},
    **dict.fromkeys(("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze"), (True, _same_order)),
    "contiguous": (False, lambda c, n, x, s: c),
}


def _is_linear(node: Node, flowing: set[Node]) -> bool:
    """Whether a node is a linear function of those of its arguments that flow, by a rule above.

    A scalar may be affine: what is added to it, and NaN where a condition holds, is put in again at the end.
    """
    name = canonical(node)
    inputs = [n for n in node.all_input_nodes if n in flowing]
    if name not in _RULES or not isinstance(value_of(node), Tensor) or node.kwargs:
        return False
    if name is torch.stack:
        given = list(node.args[0])  # type: ignore[arg-type]
        return (
            len(node.args) == 1
            and set(given) <= flowing
            and len(set(given)) == len(given)
            and not value_of(given[0]).dim()
        )
    if name == "where":
        condition, value, other = node.args
        nan = isinstance(value, float) and math.isnan(value) and other is inputs[0]
        return nan and value_of(node).dim() == 0 and value_of(condition).dim() == 0
    if name in ("add", "sub"):
        return len(node.args) == 2 and (_adds(node, flowing) if len(inputs) == 2 else _has_addend(node, inputs[0]))
    others = [v for n in node.all_input_nodes if n not in flowing and isinstance(v := value_of(n), Tensor)]
    # A factor has one number, or one for each: the shapes of gradients are then known.
    if any(v.requires_grad or (v.dim() and not _shaped(v, value_of(node))) for v in others):
        return False
    if name in ("sum", "mean"):
        return len(node.args) == 1
    if name in ("mul", "div", "masked_fill"):
        fill = name != "masked_fill" or node.args[2] == 0
        first = node.args[0] is inputs[0]
        once = len(inputs) == 1 and node.args.count(inputs[0]) == 1
        return fill and once and (name == "mul" or first) and _shaped(value_of(inputs[0]), value_of(node))
    return len(inputs) == 1 and node.args[0] is inputs[0]


def _adds(node: Node, flowing: set[Node]) -> bool:
    return all(isinstance(a, Node) and a in flowing and _shaped(value_of(a), value_of(node)) for a in node.args)


def _has_addend(node: Node, of: Node) -> bool:
    """Whether a scalar is one that flows and something else, a number or a scalar."""
    other = value_of(_other(node, of)) if node.args.count(of) == 1 else None
    if isinstance(other, Tensor):
        scalar = other.dim() == 0 and other.dtype == value_of(node).dtype == value_of(of).dtype
    else:
        scalar = isinstance(other, (int, float))
    return scalar and value_of(of).dim() == 0


def _shaped(a: Tensor, b: Tensor) -> bool:
    return len(a.shape) == len(b.shape) and all(same(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def has_gradient(node: Node) -> bool:
    """Whether a gradient may flow through a reader. None flows through sizes."""
    leaves = tree_leaves(value_of(node))
    numbers = all(isinstance(v, (int, torch.SymInt)) for v in leaves) and leaves
    return not numbers and (
        node.op == "output" or any(not isinstance(v, Tensor) or v.requires_grad for v in leaves) or not leaves
    )


@dataclass(frozen=True)
class Flow:
    """What flows from some nodes into one scalar."""

    scalar: Node
    nodes: set[Node]  # all that flow, those that it begins with among them
    begins: tuple[Node, ...]

    @property
    def later(self) -> list[Node]:
        """The nodes after those that it begins with, and up to the scalar, in the graph's order."""
        return sorted(n for n in self.nodes if n not in self.begins)


def flow_from(graph: Graph, begins: Sequence[Node]) -> Flow | None:
    """How all that has a gradient flows from some nodes into one scalar, the first such; None where it does not."""
    roots, flowing, seen = set(begins), set(begins), 0
    for node in graph.nodes:
        seen += node in roots
        if seen == 0 or node in roots or not any(n in flowing for n in node.all_input_nodes):
            continue
        if _is_linear(node, flowing):
            flowing.add(node)
            way = _way(node, flowing) if value_of(node).dim() == 0 else set()
            if roots <= way and _leaves_only_by(node, way):
                names = {canonical(n) for n in way}
                return None if {"where", "masked_fill"} <= names else Flow(node, way, tuple(begins))
    return None


def _way(scalar: Node, flowing: set[Node]) -> set[Node]:
    """What flows into a scalar, itself among it."""
    way, stack = {scalar}, [scalar]
    while stack:
        for n in stack.pop().all_input_nodes:
            if n in flowing and n not in way:
                way.add(n)
                stack.append(n)
    return way


def _leaves_only_by(scalar: Node, way: set[Node]) -> bool:
    """Whether what flows into a scalar has no other reader with a gradient."""
    return all(u in way or not has_gradient(u) for n in way - {scalar} for u in n.users)


def out_of_place(gm: GraphModule) -> None:
    """Write `loss += more` as an addition where nobody can tell: `loss` is a scalar of its own that nothing else reads."""
    families: dict[Any, list[Node]] = {}
    for node in gm.graph.nodes:
        memory = storage_of(node)
        if memory is not None:
            families.setdefault(memory, []).append(node)
    for first, *rest in families.values():
        chain = [first, *rest]
        if (
            rest
            and first.op in ("call_function", "call_method")
            and value_of(first).dim() == 0
            and all(b.target is operator.iadd and b.args[0] is a and set(a.users) == {b} for a, b in pairwise(chain))
        ):
            for node in rest:
                node.target = operator.add
            propagate(gm, rest, grad=any(value_of(n).requires_grad for n in chain))


def make_known(call: Node, flow: Flow) -> bool:
    """Move what the coefficients of a flow are made of before a call that it begins behind; whether that is possible.

    It is not where something between writes to what flows, or to what that is multiplied by or added to.
    """
    read = {n for node in flow.later for n in (node, *node.all_input_nodes)}
    if written_between(read, call, flow.scalar):
        return False
    found: set[Node] = set()
    stack = [n for node in flow.later for n in _factors(node, flow)]
    while stack:
        node = stack.pop()
        if node in found or node <= call:
            continue
        reads = any(n in flow.nodes or n is call for n in node.all_input_nodes)
        if reads or node.op not in ("call_function", "call_method"):
            return False
        found.add(node)
        stack += node.all_input_nodes
    between = nodes_between(call.next, flow.scalar)
    if found and any(mutated_arguments(n) or not can_move(n) for n in between):
        return False
    for node in sorted(found):
        call.prepend(node)
    return True


def _factors(node: Node, flow: Flow) -> list[Node]:
    """What a node's rule reads beside what flows."""
    name = canonical(node)
    return [] if name in ("add", "sub", "where") else [n for n in node.all_input_nodes if n not in flow.nodes]


def can_move(node: Node) -> bool:
    """Whether a node gives the same at another place, as far as its operation tells."""
    name = str(canonical(node))
    return value_of(node) is not None and not any(part in name for part in ("drop", "rand", "bernoulli", "multinomial"))


class Coefficients:
    """The scalar's gradient with respect to each node of a flow, as it is written into the graph.

    Raises `NotKnown`.
    """

    def __init__(self, builder: Builder, flow: Flow, hidden: Mapping[Node, Node]) -> None:
        """`hidden` gives the hidden state (N, D) whose rows are those of a node (N, ...) that the flow begins with."""
        self._flow, self._hidden = flow, hidden
        self._sizes = _Sizes(builder, list(dict.fromkeys(hidden.values())))
        value = value_of(flow.scalar)
        one = builder.graph.call_function(torch.ones, ((),), {"dtype": value.dtype, "device": value.device})
        self._made: dict[Node, Any] = {flow.scalar: builder.proxy(one)}
        self._whole: set[Node] = set()  # whose gradient is of their shape; that of others is a scalar
        for node in reversed(flow.later):
            self._pass_on(node)

    def _pass_on(self, node: Node) -> None:
        """From a node to what it is made of."""
        made, whole = self._made, self._whole
        name = canonical(node)
        shaped, rule = _RULES[name]
        factors = [v for n in _factors(node, self._flow) if isinstance(v := value_of(n), Tensor)]
        for n in [n for n in node.all_input_nodes if n in self._flow.nodes]:
            part = made[node] if shaped and node not in whole else rule(made[node], node, n, self._sizes)
            if (node in whole or any(f.dim() for f in factors)) and name not in ("sum", "mean"):
                whole.add(n)
            made[n] = part if n not in made else made[n] + part

    def rows(self, hidden: Node) -> Any:
        """How many rows a hidden state has, a number or a proxy."""
        return self._sizes.rows(hidden)

    def of(self, begin: Node) -> Any:
        """Of the shape of a node that the flow begins with, in its dtype."""
        c, value = self._made[begin].to(value_of(begin).dtype), value_of(begin)
        return c if begin in self._whole else c.expand([self.rows(self._hidden[begin]), *value.shape[1:]])

    def with_addends(self, builder: Builder, total: Any) -> Any:
        """The scalar, from the sum of what flows times its coefficients."""
        dtype = value_of(self._flow.scalar).dtype
        total, conditions = total.to(dtype), []
        for node in self._flow.later:
            name, inputs = canonical(node), [n for n in node.all_input_nodes if n in self._flow.nodes]
            if name == "where":
                conditions.append(builder.proxy(node.args[0]))
            elif name in ("add", "sub") and len(inputs) == 1:
                other = builder.proxy(_other(node, inputs[0]))
                added = self._made[node] * other
                total = total - added if name == "sub" and node.args[0] is inputs[0] else total + added
        for condition in conditions:
            total = total + torch.where(condition, math.nan, 0.0)  # the others' gradients stay
        return total


def replace_flow(gm: GraphModule, flow: Flow, total: Node, parts: Mapping[Node, Node]) -> None:
    """Put `total` in the place of a flow's scalar, and what has no gradient in that of the nodes that it begins with."""
    in_its_place(flow.scalar, total)
    flow.scalar.replace_all_uses_with(total)
    for old, new in parts.items():
        old.replace_all_uses_with(new)
    way = sorted(flow.nodes, reverse=True)
    erase_unused(gm.graph, way)
    # Readers without a gradient, of losses that are told, stay; what they read has none any more.
    propagate(gm, [n for n in reversed(way) if not n._erased], grad=True)
