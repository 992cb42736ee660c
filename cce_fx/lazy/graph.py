# SPDX-License-Identifier: Apache-2.0
"""A loss taken outside the compiled graph, of lazy logits: cut by the very pass that cuts it inside.

The head chain, the lazy operations and the loss are written into a small fx graph, which goes through the pass. What the
pass declines reads the logits and runs as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .passes import Policy, fakes
from .passes.faults import Undo
from .passes.pipeline import apply
from .passes.rewriter import logits_of, write_logits, write_operands
from .passes.trace import trace

if TYPE_CHECKING:
    from .lazy import HeadChain, LazyLogits

_CACHE_SIZE = 64


def cut_loss(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The loss `func(lazy, *args, **kwargs)` without the logits, or NotImplemented."""
    if lazy.chain is None or torch.is_inference_mode_enabled() or not _plain_arguments(args, kwargs):
        return NotImplemented
    lazy.check_fresh()
    call = (func, _frozen(args), _frozen(tuple(kwargs.items())))
    made = _make(lazy, call, [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)],
                 lambda gm, node, rest: _cut(lazy, gm, node, rest, func, args, kwargs))  # fmt: skip
    if made is None:
        return NotImplemented
    loss = made.run()
    lazy.hook_up(loss)
    return loss


def read_rows(lazy: LazyLogits) -> Any:
    """The values of a tensor that is some rows of lazy logits, without the other rows; NotImplemented where it is not."""
    if lazy.chain is None:
        return NotImplemented
    lazy.check_fresh()
    made = _make(lazy, ("rows",), [], lambda gm, node, _: _only_rows(gm, node))
    return NotImplemented if made is None else made.run()


def row_source(lazy: LazyLogits) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """hidden (N, D), and what gives rows (R, D) of it their rows (R, V) of `lazy` (..., V); None where that is not known.

    Without gradients.
    """
    if lazy.chain is None:
        return None
    lazy.check_fresh()
    with torch.no_grad():
        made = _make(lazy, ("operands",), [], _row_operands)
        if made is None:
            return None
        hidden, weight, bias = made.run()
    view = made.graph.meta["view"]
    return hidden.flatten(0, -2), lambda rows: logits_of(view, lazy.dtype, rows, weight, bias)


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
    lazy: LazyLogits, call: tuple[Any, ...], tensors: list[Tensor],
    finish: Callable[[GraphModule, Node, Iterator[Node]], GraphModule | None],
) -> _Made | None:  # fmt: skip
    """What `finish` makes of the graph that computes `lazy`, its node, and nodes for `tensors`; made once for each kind.

    None where it makes nothing, or where lazy tensors were combined on the way.
    """
    chain = lazy.chain
    assert chain is not None
    if not all(_plain_arguments(op.args, dict(op.kwargs)) for op in lazy.ops):
        return None
    recorded = [a for op in lazy.ops for a in op.args if isinstance(a, Tensor)]
    values = [chain.hidden, *chain.inputs, *recorded, *tensors]
    cache: dict[Any, GraphModule | None] = chain.run.meta.setdefault("cce_fx_losses", {})
    ops = tuple((op.func, _frozen(op.args), _frozen(op.kwargs)) for op in lazy.ops)
    key = (ops, call, torch.is_grad_enabled(), lazy._requires_grad(), tuple(_describe(v) for v in values))
    if key not in cache:
        if len(cache) >= _CACHE_SIZE:
            cache.clear()
        with torch.autocast(lazy.device.type, enabled=False):
            cache[key] = finish(*_graph(chain, lazy, values))
    made = cache[key]
    return None if made is None else _Made(made, values)


def _plain_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    from .lazy import LazyLogits

    return not any(isinstance(a, LazyLogits) for a in (*args, *kwargs.values()))


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


def _graph(chain: HeadChain, lazy: LazyLogits, values: list[Any]) -> tuple[GraphModule, Node, Iterator[Node]]:
    """A graph of the chain and the lazy operations, with example values; its last node; inputs not used so far."""
    graph = Graph()
    inputs = [graph.placeholder(f"in{i}") for i in range(len(values))]
    head = 1 + len(chain.inputs)
    old = [n for n in chain.run.graph.nodes if n.op == "placeholder"]
    copies = dict(zip(old, inputs[:head], strict=True))
    node = graph.graph_copy(chain.run.graph, copies)
    rest = iter(inputs[head:])
    for op in lazy.ops:
        node = graph.call_function(op.func, (node, *_placed(op.args, rest)), dict(op.kwargs))
    graph.output(node)
    gm = GraphModule(chain.run, graph)
    fakes.evaluate(gm, values)
    return gm, node, rest


def _cut(
    lazy: LazyLogits,
    gm: GraphModule,
    node: Node,
    rest: Iterator[Node],
    func: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> GraphModule | None:
    """The loss after the graph, cut by the pass; None where that declines."""
    args = _placed(args, rest)
    kwargs = {k: next(rest) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        loss = gm.graph.call_function(func, (node, *args), kwargs)
    output.args = (loss,)
    fakes.propagate(gm, [loss], grad=torch.is_grad_enabled())
    policy = lazy.chain.run.meta.get("cce_fx_policy", Policy())  # type: ignore[union-attr]
    report, _ = apply(gm, replace(policy, min_vocab=0), Undo(gm))
    return gm if report.rewritten and all(r.logits == "unused" for r in report.rewritten) else None


def _only_rows(gm: GraphModule, node: Node) -> GraphModule | None:
    """The graph with its row operations done on hidden and not on logits; None where it does more than that."""
    view = trace(gm.graph).views.get(node)
    return gm if view is not None and write_logits(gm, view, node) else None


def _placed(args: tuple[Any, ...], inputs: Iterator[Node]) -> tuple[Any, ...]:
    return tuple(next(inputs) if isinstance(a, Tensor) else a for a in args)
