"""A loss taken outside the compiled graph, of lazy logits: cut by the very pass that cuts it inside.

The head chain, the lazy operations and the loss are written into a small fx graph, which goes through the pass. What the
pass declines reads the logits and runs as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .passes import Policy, fakes
from .passes.pipeline import apply

if TYPE_CHECKING:
    from .lazy import HeadChain, LazyLogits

_CACHE_SIZE = 64


def cut_loss(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The loss `func(lazy, *args, **kwargs)` without the logits, or NotImplemented."""
    chain = lazy.chain
    if chain is None or torch.is_inference_mode_enabled() or not _plain_arguments(args, kwargs):
        return NotImplemented
    lazy.check_fresh()
    recorded = [a for op in lazy.ops for a in op.args]
    tensors = [a for a in (*recorded, *args, *kwargs.values()) if isinstance(a, Tensor)]
    values = [chain.hidden, *chain.inputs, *tensors]
    cache: dict[Any, GraphModule | None] = chain.run.meta.setdefault("cce_fx_losses", {})
    ops = tuple((op.func, _frozen(op.args), _frozen(op.kwargs)) for op in lazy.ops)
    call = (func, _frozen(args), _frozen(tuple(kwargs.items())))
    key = (ops, call, torch.is_grad_enabled(), lazy._requires_grad(), tuple(_describe(v) for v in values))
    if key not in cache:
        if len(cache) >= _CACHE_SIZE:
            cache.clear()
        cache[key] = _compile(chain, lazy, func, args, kwargs, values)
    loss = cache[key]
    if loss is None:
        return NotImplemented
    with torch.autocast(lazy.device.type, enabled=False):
        return loss(*values)


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


def _compile(
    chain: HeadChain, lazy: LazyLogits, func: Callable[..., Any], args: Any, kwargs: Any, values: list[Any]
) -> GraphModule | None:
    graph = Graph()
    inputs = [graph.placeholder(f"in{i}") for i in range(len(values))]
    head = 1 + len(chain.inputs)
    old = [n for n in chain.run.graph.nodes if n.op == "placeholder"]
    copies = dict(zip(old, inputs[:head], strict=True))
    node = graph.graph_copy(chain.run.graph, copies)
    rest = iter(inputs[head:])
    for op in lazy.ops:
        node = graph.call_function(op.func, (node, *_placed(op.args, rest)), dict(op.kwargs))
    args = _placed(args, rest)
    kwargs = {k: next(rest) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    graph.output(graph.call_function(func, (node, *args), kwargs))
    gm = GraphModule(chain.run, graph)
    with torch.set_grad_enabled(torch.is_grad_enabled()), torch.autocast(lazy.device.type, enabled=False):
        fakes.ensure(gm, values)
        report, _ = apply(gm, Policy(min_vocab=0))
    return gm if report.rewritten and all(r.logits == "unused" for r in report.rewritten) else None


def _placed(args: tuple[Any, ...], inputs: Iterator[Node]) -> tuple[Any, ...]:
    return tuple(next(inputs) if isinstance(a, Tensor) else a for a in args)
