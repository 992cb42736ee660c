# SPDX-License-Identifier: Apache-2.0
"""Losses of several hidden states on one weight, joined into one call of their operator, whose rows are all of theirs.

A weight's gradient is as large as V x D, and each call makes one: those of chunks of a batch, of the steps of a decoder or of
the layers of an early exit would be held until the backward adds them up, and take more than logits do. In come the calls in
a graph; out goes one, which stands in the place of the last, and behind it whatever read the first ones.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..functional import HEAD_ARGS, LIKELIEST, rows_operator
from ..kernels.spec import Needs
from .autocast import autocast_at
from .canonical import mutated_arguments
from .fakes import WouldGuard, propagate
from .rewriter import Builder, erase_unused, in_its_place, size_of
from .scalar import (
    Coefficients,
    Flow,
    NotKnown,
    can_move,
    flow_from,
    has_gradient,
    make_known,
    out_of_place,
    replace_flow,
)
from .sharded import has_sharded_head
from .trace import Trace, nodes_between, storage_of, switched_off, written_between
from .values import Candidate, Result, same, value_of

T = TypeVar("T")
_STATISTICS, _WITH_GRADS = LIKELIEST  # `cce::linear_cross_entropy`, and the one with gradients in the forward
# The operators whose calls are joined, and which of their arguments have rows: a tensor or a list of them.
_ROWS = {_STATISTICS: (0, 3), rows_operator: (0, 2)}
_TOP = HEAD_ARGS - 1  # whether a call tells the likeliest classes


def on_one_weight(found: Trace) -> list[list[Candidate]]:
    """The losses of a graph, those together whose calls can be joined; none that is alone."""
    losses: list[Candidate] = []
    for candidate in found.candidates:
        grad = candidate.view.weight.requires_grad and value_of(candidate.anchor).requires_grad
        one = candidate.result is Result.LOSS and grad and not has_sharded_head(candidate.view)
        if one and not any(_of_one_product(candidate, other) for other in losses):
            losses.append(candidate)
    groups = grouped(losses, lambda one, other: _head_of(one) == _head_of(other))
    return [g for g in groups if len(g) > 1 and _can_join(g, found.transformed)]


def _head_of(c: Candidate) -> tuple[Any, ...]:
    """What losses have in common whose calls can be joined."""
    like = (c.loss.ignore_index, c.loss.label_smoothing > 0, c.loss.epilogue)
    return (c.view.weight, c.view.bias, c.view.dtype, c.class_weight, *like)


def _of_one_product(one: Candidate, other: Candidate) -> bool:
    return one.view.linear is other.view.linear and one.view.hidden == other.view.hidden


def grouped(items: Iterable[T], alike: Callable[[T, T], bool]) -> list[list[T]]:
    """Those together that are alike, in their order."""
    groups: list[list[T]] = []
    for item in items:
        group = next((g for g in groups if alike(g[0], item)), None)
        if group is None:
            groups.append(group := [])
        group.append(item)
    return groups


def _can_join(group: list[Candidate], transformed: Collection[Node]) -> bool:
    reads = [[n for o in c.view.operands for n in o.nodes] + [n for n in (c.target,) if n is not None] for c in group]
    return _behind_last([c.anchor for c in group], reads, transformed) is not None


def _behind_last(
    members: Sequence[Node], reads: Sequence[Iterable[Node]], transformed: Collection[Node]
) -> list[Node] | None:
    """What reads some nodes before the last of them, and would stand behind it if they stood there; None where it cannot.

    `reads` says what each of them is made of.
    """
    last, moved = members[-1], dict[Node, None]()
    between = list(nodes_between(members[0], last))
    for node in [*between, last]:
        if any(n in moved or n in members for n in node.all_input_nodes):
            if node in members:
                return None
            moved[node] = None
    stay = [n for n in between if n not in moved]
    inputs = [n for given in reads for n in given]
    read, written = _memory([*inputs, *(n for node in moved for n in (node, *node.all_input_nodes))]), _written(moved)
    if (
        None in written
        or _written(stay) & (read - {None})
        or written & _memory(n for m in stay for n in (m, *m.all_input_nodes))
    ):
        return None
    movable = all(node not in transformed and can_move(node) for node in moved)
    return list(moved) if movable and _in_one_mode(between, moved, last, inputs) else None


def _memory(nodes: Iterable[Node]) -> set[int | None]:
    return {storage_of(n) for n in nodes}


def _written(nodes: Iterable[Node]) -> set[int | None]:
    return _memory(n for node in nodes for n in mutated_arguments(node))


def _in_one_mode(between: Sequence[Node], moved: Collection[Node], last: Node, inputs: Sequence[Node]) -> bool:
    """Whether gradients are on, and autocast is, where some nodes stand as where the last one does."""
    off = switched_off(last.graph)
    if any(off.get(node) is not off.get(last) for node in moved):
        return False
    if not any("_autocast" in getattr(node.target, "__name__", "") for node in between):
        return True
    device = next(value.device for n in inputs if isinstance(value := value_of(n), Tensor))
    autocast = autocast_at(last, device)
    return all(autocast_at(node, device) == autocast for node in moved)


@dataclass
class Joined:
    """What became of losses on one weight."""

    early: set[Node] = field(default_factory=set)  # losses whose gradients are made in the forward
    sharing: set[Node] = field(default_factory=set)  # losses whose gradient of the weight is another one's

    def add(self, gm: GraphModule, anchors: Collection[Node], transformed: Collection[Node], early: bool) -> None:
        """Join the calls that were written for some losses, in place; `early` where gradients may be made in the forward."""
        calls = {
            n: loss.anchor for n in gm.graph.nodes if (loss := n.meta.get("cce_fx_loss")) and loss.anchor in anchors
        }
        joint = join(gm, list(calls), transformed)
        if joint is None:
            self.early |= {anchor for call, anchor in calls.items() if early and _loss_in_forward(gm, alone(call))}
            return
        self.sharing |= set(list(calls.values())[1:])
        if early and _loss_in_forward(gm, joint):
            self.early |= set(calls.values())


def join(gm: GraphModule, calls: Sequence[Node], transformed: Collection[Node]) -> Joint | None:
    """Join some calls in place; None, and they stay as they are, where that cannot be."""
    if len(calls) < 2 or not all(alike(calls[0], call) for call in calls):
        return None
    moved = _behind_last(calls, [call.all_input_nodes for call in calls], transformed)
    joint = None if moved is None else _join(gm, calls, moved)
    if joint is not None:
        out_of_place(gm)
    return joint


def alike(one: Node, other: Node) -> bool:
    """Whether two calls differ in nothing but values of rows: what was written for each is written in the same way."""
    if one.target is not other.target or one.target not in _ROWS:
        return False
    arguments = enumerate(zip(one.args, other.args, strict=True))
    return all((_like_rows if n in _ROWS[one.target] else _same)(a, b) for n, (a, b) in arguments if n != _TOP)


def _like_rows(a: Any, b: Any) -> bool:
    """Whether values of rows are alike but for their number."""
    if not isinstance(a, Node):
        return len(a) == len(b) and all(map(_like_rows, a, b))
    one, other = value_of(a), value_of(b)
    return one.dtype == other.dtype and one.device == other.device and _like_sizes(one.shape[1:], other.shape[1:])


def _like_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments are one value: one node, or the same operations on one, which nothing writes to between."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and bool(a == b)
    if a is b:
        return True
    made = a.op == b.op and a.op in ("call_function", "call_method") and a.target == b.target and can_move(a)
    if not made or a.kwargs or b.kwargs or not _same(a.args, b.args):
        return False
    first, last = (a, b) if a < b else (b, a)
    return not written_between((a, *a.all_input_nodes), first, last)


@dataclass(frozen=True, eq=False)
class Joint:
    """A call with the rows of several, and what it gives for each."""

    call: Node
    hidden: tuple[Node, ...]  # (N, D) of each
    results: dict[Node, int]  # what it returns, and at which place
    parts: dict[Node, tuple[int, int]]  # (N,): which result of the call it is of, and for which hidden state


def alone(call: Node) -> Joint:
    """A call that is joined with no other."""
    results = {u: int(u.args[1]) for u in call.users if u.target is operator.getitem}  # type: ignore[arg-type]
    return Joint(call, (hidden_of(call),), results, {u: (n, 0) for u, n in results.items()})


def _join(gm: GraphModule, calls: Sequence[Node], moved: Sequence[Node]) -> Joint | None:
    last, builder = calls[-1], Builder(gm.graph, {})
    hidden = [hidden_of(call) for call in calls]
    device = value_of(hidden[0]).device
    used = {u: number for number, call in enumerate(calls) for u in call.users if u.users}
    results: dict[Node, int] = {}
    parts: dict[Node, tuple[int, int]] = {}
    replaced: dict[Node, Node] = {}
    try:
        with builder.before(last):
            args = [builder.proxy(a) for a in calls[0].args]
            sizes = [size_of(value_of(h).shape[0], builder.proxy(h), 0) for h in hidden]
            if last.target is _STATISTICS:
                args[_TOP] = any(call.args[_TOP] for call in calls)
            for at in _ROWS[last.target]:
                args[at] = _of_all(builder, [call.args[at] for call in calls], hidden, sizes)
            out = last.target(*args)  # type: ignore[operator]
            for index in sorted({int(u.args[1]) for u in used}):  # type: ignore[arg-type]
                whole, start = out[index], 0
                results[whole.node] = index
                for number, size in enumerate(sizes):
                    part, start = _rows_from(whole, start, size, device), start + size
                    for old in [u for u, of in used.items() if of == number and u.args[1] == index]:
                        replaced[old], parts[part.node] = part.node, (index, number)
        propagate(gm, builder.written, grad=True)
    except WouldGuard:
        builder.undo()
        return None
    for node in moved:
        last.prepend(node)
    for old, new in replaced.items():
        in_its_place(old, new)
        old.replace_all_uses_with(new)
    # Results stand among what is moved, being read from the calls.
    erase_unused(gm.graph, [u for call in calls for u in list(call.users)] + list(calls))
    return Joint(out.node, tuple(hidden), results, parts)


def hidden_of(call: Node) -> Any:
    """The hidden state of a call, the first where there are several."""
    given = call.args[0]
    return given[0] if isinstance(given, (list, tuple)) else given


def _of_all(builder: Builder, given: Sequence[Any], hidden: Sequence[Node], sizes: Sequence[Any]) -> Any:
    """A tensor of rows, or each of a list, of all calls; as many as there are rows of hidden states."""
    if not isinstance(given[0], Node):
        return [_of_all(builder, each, hidden, sizes) for each in zip(*given, strict=True)]
    whole = torch.cat([builder.proxy(t) for t in given])
    rows = [sum(value_of(t).shape[0] for t in some) for some in (given, hidden)]
    return whole if same(*rows) else _rows_from(whole, 0, sum(sizes), value_of(given[0]).device)


def _rows_from(x: Any, start: Any, count: Any, device: torch.device) -> Any:
    """Some rows of a tensor. Where sizes are symbols, torch would guard on them for a slice, and does not for an index."""
    if isinstance(start, int) and isinstance(count, int):
        return x.narrow(0, start, count)
    return x[start + torch.arange(count, device=device)]


def _coefficients_of(builder: Builder, joint: Joint, flow: Flow) -> tuple[Coefficients, dict[int, Any]]:
    """The coefficients of a flow that begins with parts of a call's results, and those (N, ...) of each result that has any.

    Raises `NotKnown`.
    """
    known = Coefficients(builder, flow, {n: joint.hidden[joint.parts[n][1]] for n in flow.begins})
    found: dict[int, dict[int, Any]] = {}
    for n in flow.begins:
        index, number = joint.parts[n]
        found.setdefault(index, {})[number] = known.of(n)
    whole = {}
    for index, some in found.items():
        shape = value_of(next(n for n, at in joint.results.items() if at == index)).shape[1:]
        zero = next(iter(some.values())).new_zeros(()) if len(some) < len(joint.hidden) else None
        every = [some[n] if n in some else zero.expand([known.rows(h), *shape]) for n, h in enumerate(joint.hidden)]
        whole[index] = every[0] if len(every) == 1 else torch.cat(every)
    return known, whole


# Writes a call with gradients in the forward, of the coefficients (N, ...) of each result by its place: what the call returns,
# and where in it the result stands that the call without gradients has at a place.
WithGrads = Callable[[Builder, dict[int, Any]], tuple[Any, Callable[[int], int]]]


def in_forward(gm: GraphModule, joint: Joint, begins: Sequence[Node], with_grads: WithGrads) -> bool:
    """Make a call's gradients in the forward, in place, where some parts of its results flow into one scalar; whether they do."""
    flow = flow_from(gm.graph, begins) if begins else None
    if flow is None or not make_known(joint.call, flow):
        return False
    builder = Builder(gm.graph, {})
    try:
        with builder.before(joint.call):
            coefficients, of_results = _coefficients_of(builder, joint, flow)
            out, place = with_grads(builder, of_results)
            results = {old: out[place(n)].node for old, n in joint.results.items()}
        with builder.before(flow.scalar):
            total = coefficients.with_addends(builder, out[0])
        propagate(gm, builder.written, grad=True)
    except (NotKnown, WouldGuard):
        builder.undo()
        return False
    replace_flow(gm, flow, total.node, results)
    erase_unused(gm.graph, [*results, joint.call])
    return True


def _loss_in_forward(gm: GraphModule, joint: Joint) -> bool:
    """Turn a call of `cce::linear_cross_entropy` into one with gradients in the forward, in place; whether that is possible."""
    args = joint.call.args
    needs = Needs(*(isinstance(v := value_of(a), Tensor) and v.requires_grad for a in args[:3]))

    def with_grads(builder: Builder, weights: dict[int, Any]) -> tuple[Any, Callable[[int], int]]:
        nll = weights[0] if 0 in weights else torch.zeros_like(next(iter(weights.values())))
        given = (*map(builder.proxy, args), nll, weights.get(1), weights.get(2), *needs)
        return torch.ops.cce.linear_cross_entropy_with_grads.default(*given), _RESULTS.__getitem__

    return in_forward(gm, joint, [n for n in joint.parts if any(has_gradient(u) for u in n.users)], with_grads)


# Of what the call for each token returns, where the call with gradients in the forward returns it.
_RESULTS = {0: 1, 1: 2, 2: 3, LIKELIEST[_STATISTICS]: LIKELIEST[_WITH_GRADS]}
