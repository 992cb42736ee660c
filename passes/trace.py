"""Find: read a graph once, forwards, and say which nodes are views of a head's logits and which are losses on them.

Reading forwards keeps in-place changes honest: a node that writes to memory ends every view that reads the same memory,
so a loss after it sees no view, and a loss before it is unaffected.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch.fx import Graph, Node

from . import rules as rules  # registers them
from .canonical import canonical, mutated_arguments
from .registry import RULES, Call
from .rules.elementwise import detached
from .values import Candidate, Decline, LogitsView, Operand, Reason, value_of

# Consumers of logits by which a user watches their gradient, which a rewritten loss does not pass through them.
_HOOKS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


@dataclass
class Trace:
    """What a graph holds."""

    views: dict[Node, LogitsView] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)  # of losses
    stops: dict[Node, Decline] = field(default_factory=dict)  # nodes at which a view ended


_LOSSES = {"cross_entropy", "nll_loss"}


def trace(graph: Graph) -> Trace:
    """Every view and every loss of a graph whose nodes carry example values. Linear in the number of nodes."""
    found = Trace()
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        _end_mutated(found, node)
        name = canonical(node)
        rule = RULES.get(name) if _hashable(name) else None
        outcome = rule(Call(node, found.views)) if rule is not None else None
        if isinstance(outcome, LogitsView):
            found.views[node] = outcome
        elif isinstance(outcome, Candidate):
            found.candidates.append(_grad_cut(outcome))
        elif isinstance(outcome, Decline):
            found.stops[node] = outcome
            if name in _LOSSES:
                found.declines.append(outcome)
        elif name in _LOSSES:
            found.declines.append(_why_not(found, node))
    return _without_hooked(found)


def _hashable(name: object) -> bool:
    return getattr(name, "__hash__", None) is not None


def _storage(node: Node | None) -> int | None:
    value = value_of(node) if node is not None else None
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata


def _reads(view: LogitsView) -> Iterable[Node]:
    """The nodes whose memory a rewritten loss reads at the loss's place, and those that the program computes on."""
    yield from view.path
    for operand in (view.hidden, view.weight, view.bias):
        if operand is None:
            continue
        yield operand.node
        for step in operand.steps:
            yield from _nodes_in(step.args)


def _nodes_in(value: object) -> Iterable[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, slice):
        yield from _nodes_in((value.start, value.stop, value.step))


def _end_mutated(found: Trace, node: Node) -> None:
    written = {s for n in mutated_arguments(node) if (s := _storage(n)) is not None}
    if not written:
        return
    for at, view in list(found.views.items()):
        if any(_storage(n) in written for n in _reads(view)):
            del found.views[at]
            found.stops[at] = Decline(Reason.MUTATED, node)


def _grad_cut(candidate: Candidate) -> Candidate:
    """Where logits were made without gradient (under no_grad, say) of operands that have one, so is the loss."""
    view, logits = candidate.view, candidate.anchor.args[0] if candidate.anchor.args else None
    value = value_of(logits) if isinstance(logits, Node) else None
    operands = [o for o in (view.hidden, view.weight, view.bias) if o is not None]
    if not isinstance(value, torch.Tensor) or value.requires_grad:
        return candidate
    if not any(_requires_grad(o) for o in operands):
        return candidate
    return replace(candidate, view=detached(view))


def _requires_grad(operand: Operand) -> bool:
    value = value_of(operand.node)
    return isinstance(value, torch.Tensor) and value.requires_grad


def _why_not(found: Trace, loss: Node) -> Decline:
    """The first thing, walking back from a loss, that ended a view; or that there is no linear layer at all."""
    node = loss.args[0] if loss.args else loss.kwargs.get("input")
    for _ in range(64):
        if not isinstance(node, Node):
            break
        if node in found.stops:
            stop = found.stops[node]
            return Decline(stop.reason, stop.node, stop.detail)
        sources = [n for n in node.all_input_nodes if n in found.views or n in found.stops]
        if any(n in found.views for n in sources):
            return Decline(Reason.NO_RULE, node, f"`{_spelling(node)}`")
        inputs = [n for n in node.all_input_nodes if isinstance(value_of(n), torch.Tensor)]
        node = sources[0] if sources else (inputs[0] if inputs else None)
    return Decline(Reason.NO_LINEAR, loss)


def _spelling(node: Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _without_hooked(found: Trace) -> Trace:
    """Set aside the losses whose logits' gradient is watched."""
    kept = []
    for candidate in found.candidates:
        hooks = [u for n in candidate.view.path for u in n.users if u.op == "call_method" and u.target in _HOOKS]
        if hooks:
            found.declines.append(Decline(Reason.HOOK, hooks[0]))
        else:
            kept.append(candidate)
    found.candidates = kept
    return found
