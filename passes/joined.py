# SPDX-License-Identifier: Apache-2.0
"""Losses of several hidden states on one weight, joined into one call of their operator, whose rows are all of theirs.

A weight's gradient is as large as V x D, and each call makes one: those of chunks of a batch, of the steps of a decoder or of
the layers of an early exit would be held until the backward adds them up, and take more than logits do. In come the calls in
a graph; out goes one, which stands in the place of the last, and behind it whatever read the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..functional import LIKELIEST, rows_operator
from ..kernels.spec import Needs
from .autocast import autocast_at
from .canonical import mutated_arguments
from .fakes import WouldGuard, propagate
from .rewriter import Builder, erase_unused, size_of
from .scalar import Coefficients, Flow, NotKnown, can_move, flow_from, make_known, out_of_place, replace_flow
from .sharded import has_sharded_head
from .trace import Trace, storage_of, switched_off
from .values import Candidate, Result, same, value_of

T = TypeVar("T")
_STATISTICS, _WITH_GRADS = LIKELIEST  # `cce::linear_cross_entropy`, and the one with gradients in the forward
# The operators whose calls are joined, and which of their arguments have rows: a tensor or a list of them.
_ROWS = {_STATISTICS: (0, 3), rows_operator: (0, 2)}


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
    first, last = members[0], members[-1]
    between, node = [], first
    while node is not last:
        between.append(node)
        node = node.next
    moved: dict[Node, None] = {}
    for node in [*between, last]:
        of_them = any(n in moved or n in members for n in node.all_input_nodes)
        if of_them and node in members:
            return None
        if of_them:
            moved[node] = None
    memory = {storage_of(n) for given in reads for n in given} | {
        storage_of(n) for m in moved for n in (m, *m.all_input_nodes)
    }
    memory -= {None}
    off, device = (
        switched_off(first.graph),
        next(value_of(n).device for given in reads for n in given if isinstance(value_of(n), Tensor)),
    )
    autocast = autocast_at(last, device)
    for node in between:
        written = {storage_of(n) for n in mutated_arguments(node)}
        if node in moved:
            same = off.get(node) is off.get(last) and autocast_at(node, device) == autocast
            if node in transformed or not can_move(node) or None in written or not same:
                return None
        elif written & memory:
            return None
    writes = {storage_of(n) for node in moved for n in mutated_arguments(node)}
    others = [n for n in between if n not in moved]
    if any(storage_of(n) in writes for node in others for n in (node, *node.all_input_nodes)):
        return None
    return list(moved)


def join_losses(gm: GraphModule, anchors: Sequence[Node], transformed: Collection[Node], early: bool) -> bool:
    """Join the calls that were written for some losses, in place; whether gradients are made in the forward, which `early` allows."""
    calls = [n for n in gm.graph.nodes if (loss := n.meta.get("cce_fx_loss")) is not None and loss.anchor in anchors]
    joint = join(gm, calls, transformed)
    return joint is not None and early and _in_forward(gm, joint)


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
    return all(n in _ROWS[one.target] or _same(a, b) for n, (a, b) in enumerate(zip(one.args, other.args, strict=True)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if not isinstance(a, Node) or not isinstance(b, Node):
        return type(a) is type(b) and bool(a == b)
    written = a.op == b.op and a.op in ("call_function", "call_method") and a.target == b.target and can_move(a)
    return a is b or (written and _same(a.args, b.args) and not a.kwargs and not b.kwargs)


@dataclass(frozen=True, eq=False)
class Joint:
    """A call with the rows of several, and what it gives for each."""

    call: Node
    hidden: tuple[Node, ...]  # (N, D) of each
    results: dict[int, Node]  # what it returns, by its place
    parts: dict[Node, tuple[int, int]]  # (N,): which result of the call it is of, and for which hidden state


def _join(gm: GraphModule, calls: Sequence[Node], moved: Sequence[Node]) -> Joint | None:
    last, builder = calls[-1], Builder(gm.graph, {})
    hidden = [hidden_of(call) for call in calls]
    device = value_of(hidden[0]).device
    used = {u: number for number, call in enumerate(calls) for u in call.users if u.users}
    results: dict[int, Node] = {}
    parts: dict[Node, tuple[int, int]] = {}
    replaced: dict[Node, Node] = {}
    try:
        with builder.before(last):
            args = [builder.proxy(a) for a in calls[0].args]
            sizes = [size_of(value_of(h).shape[0], builder.proxy(h), 0) for h in hidden]
            for at in _ROWS[last.target]:
                args[at] = _of_all(builder, [call.args[at] for call in calls], hidden, sizes)
            out = last.target(*args)  # type: ignore[operator]
            for index in sorted({int(u.args[1]) for u in used}):  # type: ignore[arg-type]
                whole, start = out[index], 0
                results[index] = whole.node
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
        old.replace_all_uses_with(new)
    # Results stand among what is moved, being read from the calls.
    erase_unused(gm.graph, [u for call in calls for u in list(call.users)] + list(calls))
    gm.graph.lint()
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


def coefficients_of(builder: Builder, joint: Joint, flow: Flow) -> tuple[Coefficients, dict[int, Any]]:
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
        zero, shape = next(iter(some.values())).new_zeros(()), value_of(joint.results[index]).shape[1:]
        every = [some.get(n, zero.expand([known.rows(h), *shape])) for n, h in enumerate(joint.hidden)]
        whole[index] = every[0] if len(every) == 1 else torch.cat(every)
    return known, whole


def flow_of(gm: GraphModule, joint: Joint) -> Flow | None:
    """How all results of a call that have a gradient flow into one scalar, the first such, with what its coefficients are made of
    before the call; None where they do not."""
    begins = [n for n in joint.parts if value_of(n).requires_grad and n.users]
    flow = flow_from(gm.graph, begins) if begins else None
    return flow if flow is not None and make_known(gm, joint.call, flow) else None


def _in_forward(gm: GraphModule, joint: Joint) -> bool:
    """Make a call's gradients in the forward, in place, where all of the losses flow into one scalar; whether they do."""
    flow = flow_of(gm, joint)
    if flow is None:
        return False
    call, builder = joint.call, Builder(gm.graph, {})
    needs = Needs(*(isinstance(v := value_of(a), Tensor) and v.requires_grad for a in call.args[:3]))
    try:
        with builder.before(call):
            coefficients, weights = coefficients_of(builder, joint, flow)
            nll = weights[0] if 0 in weights else torch.zeros_like(next(iter(weights.values())))
            given = [builder.proxy(a) for a in call.args]
            out = torch.ops.cce.linear_cross_entropy_with_grads.default(
                *given, nll, weights.get(1), weights.get(2), *needs
            )
            results = {old: out[_RESULTS[index]].node for index, old in joint.results.items()}
        with builder.before(flow.scalar):
            total = coefficients.with_addends(builder, out[0])
        propagate(gm, builder.written, grad=True)
    except (NotKnown, WouldGuard):
        builder.undo()
        return False
    replace_flow(gm, flow, total.node, results)
    erase_unused(gm.graph, [*results, call])
    gm.graph.lint()
    return True


# Of what the call for each token returns, where the call with gradients in the forward returns it.
_RESULTS = {0: 1, 1: 2, 2: 3, LIKELIEST[_STATISTICS]: LIKELIEST[_WITH_GRADS]}
