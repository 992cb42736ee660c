# SPDX-License-Identifier: Apache-2.0
"""Find: read a graph once, forwards, and say which nodes are views of a head's logits and which are losses on them.

Reading forwards keeps in-place changes honest: a node that writes to memory ends every view that reads the same memory,
so a loss after it sees no view, and a loss before it is unaffected.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from . import rules as rules  # registers them
from .canonical import canonical, mutated_arguments
from .fakes import WouldGuard
from .faults import stage
from .registry import BEGINNERS, RULES, Call, Outcome
from .rules.elementwise import detached
from .values import READINGS, Candidate, Decline, LogitsView, Reason, example_size, value_of

# Consumers of logits by which a user watches their gradient, which a rewritten loss does not pass through them.
_HOOKS = {"register_hook", "retain_grad", "register_post_accumulate_grad_hook"}


@dataclass
class Trace:
    """What a graph holds."""

    views: dict[Node, LogitsView] = field(default_factory=dict)
    heads: dict[Node, LogitsView] = field(default_factory=dict)  # those at their linear layers, changed later or not
    candidates: list[Candidate] = field(default_factory=list)
    readings: list[Candidate] = field(default_factory=list)  # what may be read beside a loss
    declines: list[Decline] = field(default_factory=list)  # of losses
    stops: dict[Node, Decline] = field(default_factory=dict)  # nodes at which a view ended
    transformed: set[Node] = field(default_factory=set)  # nodes that run under a transform of torch.func

    def needed(self) -> set[Node]:
        """The views that something reads which is neither a view, a candidate nor the graph's output."""
        anchors = {c.anchor for c in self.candidates}
        inside = {n for c in self.candidates for n in c.view.path}
        found: set[Node] = set()
        for node in reversed(list(self.views)):
            for user in node.users:
                if user in found or (user not in self.views and user not in anchors | inside and user.op != "output"):
                    found.add(node)
        return found


_LOSSES = {"cross_entropy", "nll_loss"}
# Whatever a rule says against these is told, too; without a head they are no loss.
_PARTS = {"gather", "take_along_dim", "logsumexp"}


def trace(graph: Graph) -> Trace:
    """Every view and every loss of a graph whose nodes carry example values. Linear in the number of nodes."""
    found, depth = Trace(), 0
    for node in graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        depth += _TRANSFORMS.get(getattr(node.target, "__name__", ""), 0)
        if depth > 0:
            found.transformed.add(node)
        with stage("finding losses", node):
            _end_mutated(found, node)
            name = canonical(node)
            outcome = _outcome(found, node, name)
        if isinstance(outcome, LogitsView):
            found.views[node] = outcome
            if outcome.path == (node,):
                found.heads[node] = outcome
        elif isinstance(outcome, Candidate):
            if outcome.result in READINGS:
                found.readings.append(outcome)
            else:
                found.candidates.append(_grad_cut(outcome))
        elif isinstance(outcome, Decline):
            found.stops[node] = outcome
            if name in _LOSSES or (name in _PARTS and _is_head(found, node)):
                found.declines.append(outcome)
        elif name in _LOSSES:
            found.declines.append(_why_not(found, node))
    return _without_hooked(found)


# Functions that stand in graphs where a transform of torch.func begins and ends, and forward-mode differentiation.
_TRANSFORMS = {
    **{f"_{kind}_increment_nesting": 1 for kind in ("grad", "vmap", "jvp", "func")},
    **{f"_{kind}_decrement_nesting": -1 for kind in ("grad", "vmap", "jvp", "func")},
    "_enter_dual_level": 1,
    "_exit_dual_level": -1,
}


def _outcome(found: Trace, node: Node, name: Any) -> Outcome:
    """What the rule of an operation says of a node; None where there is no rule, or nothing for it to read."""
    rule = RULES.get(name) if _hashable(name) else None
    if rule is None or not (name in BEGINNERS or any(n in found.views for n in node.all_input_nodes)):
        return None
    try:
        outcome = rule(Call(node, found.views))
    except WouldGuard as error:
        return Decline(Reason.DYNAMIC, node, str(error))
    if isinstance(outcome, Candidate) and node in found.transformed:
        return Decline(Reason.TRANSFORM, node)
    return outcome


def _is_head(found: Trace, node: Node) -> bool:
    """Whether a node's input is a view with more classes than hidden dimensions, and so no router or gate."""
    views = [found.views[n] for n in node.all_input_nodes if n in found.views]
    return any(example_size(v.classes) > example_size(v.hidden_size) for v in views)


def _hashable(name: object) -> bool:
    return getattr(name, "__hash__", None) is not None


def storage_of(node: Node | None) -> int | None:
    """What tells the memory of a node's value from that of others; None where that is not known."""
    value = value_of(node) if node is not None else None
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return None
    return value.untyped_storage()._cdata


def written_between(nodes: Iterable[Node], first: Node, last: Node) -> bool:
    """Whether the memory of some nodes is written to by the nodes from one on, up to another."""
    memory = {storage_of(n) for n in nodes} - {None}
    return any(storage_of(n) in memory for node in nodes_between(first, last) for n in mutated_arguments(node))


def nodes_between(first: Node, last: Node) -> Iterator[Node]:
    """The nodes from one on, up to another."""
    while first is not last:
        yield first
        first = first.next


def written_inputs(graph: Graph) -> list[int]:
    """The positions of a graph's inputs whose memory a node of it writes to."""
    written = {storage_of(n) for node in graph.nodes for n in mutated_arguments(node)} - {None}
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    return [i for i, n in enumerate(inputs) if storage_of(n) in written]


def switched_off(graph: Graph) -> dict[Node, Node]:
    """For each node that runs without gradients, what has switched them off."""
    found: dict[Node, Node] = {}
    off: Node | None = None
    for node in graph.nodes:
        if off is not None:
            found[node] = off
        name = getattr(node.target, "__name__", "")
        if name == "_enter_inference_mode" or (name == "_set_grad_enabled" and node.args[0] is False):
            off = off or node
        elif name in ("_exit_inference_mode", "_set_grad_enabled"):
            off = None
    return found


def _end_mutated(found: Trace, node: Node) -> None:
    written = {s for n in mutated_arguments(node) if (s := storage_of(n)) is not None}
    if not written:
        return
    for at, view in list(found.views.items()):
        if any(storage_of(n) in written for n in view.reads):
            del found.views[at]
            found.stops[at] = Decline(Reason.MUTATED, node)


def _grad_cut(candidate: Candidate) -> Candidate:
    """Where logits were made without gradient (under no_grad, say) of operands that have one, so is the loss."""
    view = candidate.view
    values = [value_of(n) for n in view.path[:-1]]
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if not tensors or tensors[-1].requires_grad or not any(o.requires_grad for o in view.operands):
        return candidate
    return replace(candidate, view=detached(view))


def _why_not(found: Trace, loss: Node) -> Decline:
    """The first thing, walking back from a loss, that ended a view; or that there is no linear layer at all."""
    node = loss.args[0] if loss.args else loss.kwargs.get("input")
    for _ in range(64):
        if not isinstance(node, Node):
            break
        if node in found.stops:
            return found.stops[node]
        if value_of(node) is None:
            return Decline(Reason.NO_META, node)
        sources = [n for n in node.all_input_nodes if n in found.views or n in found.stops]
        if any(n in found.views for n in sources):
            return Decline(Reason.NO_RULE, node, f"`{_spelling(node)}`")
        inputs = [n for n in node.all_input_nodes if isinstance(value_of(n), (torch.Tensor, tuple, list))]
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
