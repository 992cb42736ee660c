# SPDX-License-Identifier: Apache-2.0
"""Lazy logits as a graph: a loss taken outside the compiled graph is cut by the very pass that cuts it inside.

The head chain, the lazy operations and the loss are written into a small fx graph, which goes through the pass. What the
pass declines reads the logits and runs as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..passes import Policy, fakes
from ..passes.autocast import autocast_of, under, written_under
from ..passes.faults import Fault, Undo, failed, stage
from ..passes.pipeline import apply
from ..passes.rewriter import logits_of, write_logits, write_operands
from ..passes.trace import trace
from ..passes.values import output_of
from .state import State, owned

_CACHE_SIZE = 64


def cut_loss(state: State, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The loss `func(lazy, *args, **kwargs)` of unread logits without making them, or NotImplemented."""
    if torch.is_inference_mode_enabled() or not _is_plain(args, kwargs):
        return NotImplemented
    grad = torch.is_grad_enabled() and state.root.grad
    if grad and not all(s.grad for s in state.path()):
        return NotImplemented  # a view made without gradients is a leaf of its own
    state.check_fresh(wait=False)
    assert state.root.chain is not None
    autocast = autocast_of(state.root.chain.hidden.device)
    call = (func, _frozen(args), _frozen(tuple(kwargs.items())), autocast)
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    with torch.set_grad_enabled(grad):
        made = _make(
            state, call, tensors, lambda gm, node, rest: _cut(state, gm, node, rest, func, args, kwargs, autocast)
        )
        if made is None:
            return NotImplemented
        loss = owned(made.run())
    state.hook_up(loss)
    return loss


def read_rows(state: State) -> Any:
    """The values of a tensor that is some rows of unread logits, without the other rows; NotImplemented where it is not."""
    if len({s.grad for s in state.path()}) > 1:
        return NotImplemented  # as in `cut_loss`
    state.check_fresh()
    with torch.inference_mode(False), torch.set_grad_enabled(state.grad):
        made = _make(state, ("rows",), [], lambda gm, node, _: _only_rows(gm, node))
        if made is None:
            return NotImplemented
        rows = made.run()
    state.hook_up(rows)
    return rows


def row_source(state: State) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """hidden (N, D), and what gives rows (R, D) of it their rows (R, V) of `state` (..., V); None where that is not known.

    Without gradients.
    """
    state.check_fresh()
    with torch.no_grad():
        made = _make(state, ("operands",), [], _row_operands)
        if made is None:
            return None
        hidden, weight, bias = made.run()
    view = made.graph.meta["view"]
    return hidden.reshape(-1, hidden.size(-1)), lambda rows: logits_of(view, state.like.dtype, rows, weight, bias)


def _row_operands(gm: GraphModule, node: Node, rest: Iterator[Node]) -> GraphModule | None:
    view = trace(gm.graph).views.get(node)
    if view is None or view.class_dim != len(view.shape) - 1 or not write_operands(gm, view):
        return None
    gm.meta["view"] = view
    return gm


@dataclass(frozen=True)
class _Made:
    """A graph and what it is run on."""

    graph: GraphModule
    values: list[Any]

    def run(self) -> Any:
        with torch.autocast(self.values[0].device.type, enabled=False):
            return self.graph(*self.values)


def _make(
    state: State, call: tuple[Any, ...], tensors: list[Tensor],
    finish: Callable[[GraphModule, Node, Iterator[Node]], GraphModule | None],
) -> _Made | None:  # fmt: skip
    """What `finish` makes of the graph that computes `state`, its node, and nodes for `tensors`; made once for each kind.

    None where it makes nothing, or where lazy tensors were combined on the way.
    """
    chain, ops = state.root.chain, state.ops
    assert chain is not None
    if not all(_is_plain(op.args, dict(op.kwargs)) for op in ops):
        return None
    recorded = [a for op in ops for a in op.args if isinstance(a, Tensor)]
    values = [chain.hidden, *chain.inputs, *recorded, *tensors]
    cache: dict[Any, GraphModule | None] = chain.run.meta.setdefault("cce_fx_losses", {})
    steps = tuple((op.func, _frozen(op.args), _frozen(op.kwargs), op.autocast) for op in ops)
    key = (chain.autocast, steps, call, torch.is_grad_enabled(), tuple(_describe(v) for v in values))
    if key not in cache:
        if len(cache) >= _CACHE_SIZE:
            cache.clear()
        cache[key] = _finished(state, values, finish)
    made = cache[key]
    return None if made is None else _Made(made, values)


def _finished(
    state: State, values: list[Any], finish: Callable[[GraphModule, Node, Iterator[Node]], GraphModule | None]
) -> GraphModule | None:
    """None where `finish` makes nothing, or fails."""
    gm, node, rest = _graph(state, values)
    try:
        with torch.autocast(values[0].device.type, enabled=False), stage("lazy logits", node):
            fakes.evaluate(gm, values)
            return finish(gm, node, rest)
    except Fault as fault:
        failed(fault)
        return None


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether there are no lazy tensors among arguments."""
    return not any(isinstance(a, State) or hasattr(a, "state") for a in (*args, *kwargs.values()))


def _frozen(value: Any) -> Any:
    """A hashable likeness of arguments, tensors left out."""
    if isinstance(value, (tuple, list)):
        return (type(value), *(_frozen(v) for v in value))
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    return Tensor if isinstance(value, Tensor) else value


def _describe(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return (tuple(value.shape), value.stride(), value.dtype, value.device, value.requires_grad)


def _graph(state: State, values: list[Any]) -> tuple[GraphModule, Node, Iterator[Node]]:
    """A graph of the chain and the lazy operations; its last node; inputs not used so far."""
    chain = state.root.chain
    assert chain is not None
    graph, device = Graph(), chain.hidden.device
    inputs = [graph.placeholder(f"in{i}") for i in range(len(values))]
    head = 1 + len(chain.inputs)
    old = [n for n in chain.run.graph.nodes if n.op == "placeholder"]
    copies = dict(zip(old, inputs[:head], strict=True))
    with written_under(graph, device, chain.autocast):
        node = graph.graph_copy(chain.run.graph, copies)
    rest = iter(inputs[head:])
    for op in state.ops:
        with written_under(graph, device, op.autocast):
            node = graph.call_function(op.func, (node, *_placed(op.args, rest)), dict(op.kwargs))
    graph.output(node)
    return GraphModule(chain.run, graph), node, rest


def _cut(
    state: State,
    gm: GraphModule,
    node: Node,
    rest: Iterator[Node],
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
    autocast: torch.dtype | None,
) -> GraphModule | None:
    """The loss after the graph, cut by the pass; None where that declines."""
    args = _placed(args, rest)
    kwargs = {k: next(rest) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    output, device = output_of(gm.graph), state.root.chain.hidden.device  # type: ignore[union-attr]
    with gm.graph.inserting_before(output), written_under(gm.graph, device, autocast):
        loss = gm.graph.call_function(func, (node, *args), kwargs)
    output.args = (loss,)
    with under(device, autocast):
        fakes.propagate(gm, [loss], grad=torch.is_grad_enabled())
    policy = state.root.chain.run.meta.get("cce_fx_policy", Policy())  # type: ignore[union-attr]
    report, _ = apply(gm, replace(policy, min_vocab=0), Undo(gm))
    return gm if report.rewritten and all(r.logits == "unused" for r in report.rewritten) else None


def _only_rows(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph with its row operations done on hidden and not on logits; None where it does more than that."""
    view = trace(gm.graph).views.get(node)
    return gm if view is not None and write_logits(gm, view, node) else None


def _placed(args: tuple[Any, ...], inputs: Iterator[Node]) -> tuple[Any, ...]:
    return tuple(next(inputs) if isinstance(a, Tensor) else a for a in args)
