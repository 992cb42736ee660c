# SPDX-License-Identifier: Apache-2.0
"""Logits that a graph returns: cut out of the graph, and given back as `LazyLogits` after each call.

The head chain (from hidden to the returned tensor) moves into a small graph of its own. The compiled graph returns hidden
in the logits' place, and whatever else the chain needs and the graph computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .lazy import HeadChain, LazyLogits
from .lazy.tensor import are_large
from .options import Options
from .passes.autocast import autocast_at
from .passes.beside import tell_likeliest
from .passes.canonical import canonical
from .passes.decide import illegal_head
from .passes.faults import Undo
from .passes.policy import Policy
from .passes.registry import BEGINNERS
from .passes.rewriter import erase_unused
from .passes.sharded import sharded_nodes
from .passes.trace import Trace, storage_of
from .passes.values import Form, LogitsView, example_size, output_of, value_of


@dataclass(frozen=True)
class Source:
    """Where a chain's input is found at run time."""

    kind: str  # "input" or "output" of the compiled graph
    index: int


@dataclass(frozen=True)
class ViewOutput:
    """A returned tensor that is a view of lazy logits."""

    index: int  # among the graph's outputs
    run: GraphModule  # (logits, *inputs) -> the view
    sources: tuple[Source, ...]  # of the inputs


@dataclass(frozen=True)
class LazyOutput:
    """One returned tensor to be replaced, with the returned views of its memory."""

    places: tuple[int, ...]  # among the graph's outputs; none where only views are returned
    linear: str  # node name
    chain: GraphModule  # (hidden, *inputs) -> logits
    sources: tuple[Source, ...]  # of hidden, then of the inputs
    views: tuple[ViewOutput, ...]
    autocast: torch.dtype | None  # autocast's dtype where the graph multiplies
    cut: bool  # whether a loss of these logits was rewritten
    rowwise: bool  # each row of hidden gives its row of logits
    classes: int
    dtype: torch.dtype
    top: int | None  # of a `rowwise` one: the graph's output with each row's likeliest class, -1 where not known

    def like(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """A meta tensor of the logits' shape, strides and dtype, where they follow from hidden's."""
        if not self.rowwise:
            return None
        return torch.empty((*hidden.shape[:-1], self.classes), dtype=self.dtype, device="meta")


@dataclass(frozen=True)
class CutOutputs:
    """What to put back after each call, and how many results the caller expects."""

    lazy: tuple[LazyOutput, ...] = ()
    results: int = 0
    outlive_steps: bool = True  # whether the lazy logits are what they were after an optimizer's step


# A head whose logits leave the graph with no loss in it is worth a LazyLogits from this many classes on: below, a tensor
# that a program returns is more likely a feature to compute with than logits to take a loss of.
LARGE_VOCAB = 1000


def cut_outputs(gm: GraphModule, found: Trace, rewritten: set[str], options: Options, undo: Undo) -> CutOutputs:
    """Take the head chains that only the output reads out of the graph, in place.

    Args:
        gm: the graph, its losses rewritten.
        found: what `trace` said of it.
        rewritten: the names of the linear nodes whose loss was rewritten: their logits are lazy always. Others are where
            the head is large, and the program will differentiate them, so a loss outside the graph can be cut too, or
            they are large themselves.
        options: `min_vocab` replaces the rule for what is large.
        undo: is told before the first change.
    """
    output, policy = output_of(gm.graph), options.policy
    results = list(output.args[0]) if isinstance(output.args[0], (tuple, list)) else None
    if results is None:
        return CutOutputs()
    wanted = [
        (i, n)
        for i, n in enumerate(results)
        if isinstance(n, Node) and _is_cuttable(n, output, found, rewritten, policy)
    ]
    if not wanted:
        return CutOutputs()
    undo.remember()
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    made, total = [], len(results)
    for base, members in _families(wanted, found):
        chain, outer = _between(found.views[base].hidden.node, base, found.views[base].path)
        chain.meta["cce_fx_policy"] = policy  # for a loss outside the graph
        for index, _ in members:
            results[index] = None
        first, hidden = members[0][0], found.views[base].hidden.node
        if hidden not in inputs and hidden not in results:
            results[first] = hidden  # in the logits' own place
        sources = _sources((hidden, *outer), inputs, results)
        views = []
        for index, node in members:
            if node is not base:
                run, outer = _between(base, node, found.views[node].path)
                views.append(ViewOutput(index, run, _sources(tuple(outer), inputs, results)))
        places = tuple(index for index, node in members if node is base)
        linear = found.views[base].linear.name
        autocast, layout = autocast_at(found.views[base].linear), _layout(base, found.views[base])
        top = tell_likeliest(gm, found.views[base]) if layout[0] else None
        results += [] if top is None else [top]
        made.append(
            LazyOutput(
                places,
                linear,
                chain,
                sources,
                tuple(views),
                autocast,
                linear in rewritten,
                *layout,
                None if top is None else len(results) - 1,
            )
        )
    output.args = (tuple(results),)
    if "example_value" in output.meta:
        output.meta["example_value"] = tuple(value_of(r) for r in results)
    for _, node in wanted:
        erase_unused(gm.graph, list(reversed(found.views[node].path)))
    gm.graph.lint()
    gm.recompile()
    return CutOutputs(tuple(made), total, options.after_step == "as_before")


def _families(wanted: list[tuple[int, Node]], found: Trace) -> list[tuple[Node, list[tuple[int, Node]]]]:
    """The returned nodes that share memory, with the first node on their way that does: what is written to one shows in all.

    A node that shares it with no other is its own.
    """
    families: dict[Any, list[tuple[int, Node]]] = {}
    for index, node in wanted:
        families.setdefault(storage_of(node) or node, []).append((index, node))
    bases = []
    for memory, members in families.items():
        nodes = {node for _, node in members}
        path = found.views[members[0][1]].path
        alone = len(nodes) == 1
        bases.append((members[0][1] if alone else next(n for n in path if storage_of(n) == memory), members))
    return bases


def _sources(wanted: tuple[Node, ...], inputs: list[Node], results: list[Any]) -> tuple[Source, ...]:
    """Where each of `wanted` is found; put at the end of `results` where nowhere."""
    sources = []
    for node in wanted:
        if node in inputs:
            sources.append(Source("input", inputs.index(node)))
            continue
        if node not in results:
            results.append(node)
        sources.append(Source("output", results.index(node)))
    return tuple(sources)


def _layout(node: Node, view: LogitsView) -> tuple[bool, int, torch.dtype]:
    value = value_of(node)
    fixed = isinstance(view.classes, int)
    rowwise = fixed and not view.hidden.steps and view.class_dim == len(view.shape) - 1 and value.is_contiguous()
    return rowwise, view.classes if fixed else 0, value.dtype


def _is_cuttable(node: Node, output: Node, found: Trace, rewritten: set[str], policy: Policy) -> bool:
    """Whether a returned node is a head's logits that, but for the output, nothing reads."""
    view = found.views.get(node)
    if view is None or view.form is not Form.LOGITS or sharded_nodes(view):
        return False  # a program asks DTensors for more than their values
    if view.linear.name not in rewritten:
        value = value_of(node)
        worth = value.requires_grad or are_large(value)
        if not worth or not _is_large(view, policy) or illegal_head(view) is not None:
            return False
    if len({autocast_at(n) for n in view.path if canonical(n) in _MULTIPLY}) > 1:
        return False
    return all(_only_output(n, output, found) for n in view.path)


# What autocast casts the operands of, in what a head's logits are made by.
_MULTIPLY = {*(name for name in BEGINNERS if isinstance(name, str)), "cat"} - {"getitem"}


def _is_large(view: LogitsView, policy: Policy) -> bool:
    least = max(LARGE_VOCAB, example_size(view.hidden_size) + 1) if policy.min_vocab is None else policy.min_vocab
    return example_size(view.classes) >= least


def _only_output(node: Node, output: Node, found: Trace) -> bool:
    return all(u is output or (u in found.views and _only_output(u, output, found)) for u in node.users)


def _between(start: Node, end: Node, path: tuple[Node, ...]) -> tuple[GraphModule, list[Node]]:
    """The graph from `start` to `end`, and the nodes outside that it takes beside `start`.

    A weight that the graph itself computes from parameters (a cast, a scale) is computed again inside it, so that no second
    weight is kept alive for it.
    """
    graph = Graph()
    copies: dict[Node, Node] = {start: graph.placeholder("start")}
    outer: list[Node] = []

    def copy(n: Node) -> Node:
        if n not in copies:
            if n in path or _is_cheap(n):
                copies[n] = graph.node_copy(n, copy)
            else:
                outer.append(n)
                copies[n] = graph.placeholder(f"arg{len(outer)}")
        return copies[n]

    graph.output(copy(end))
    # Placeholders stand first in a graph.
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for placeholder in [n for n in graph.nodes if n.op == "placeholder"]:
        first.prepend(placeholder)
    return GraphModule(torch.nn.Module(), graph), outer


# A cast or a view of a parameter: computed again by the chain, so that no copy of the weight is kept alive for it.
_CHEAP = {"to", "float", "half", "bfloat16", "t", "transpose", "permute", "view", "reshape", "contiguous", "detach"}


def _is_cheap(node: Node) -> bool:
    while node.op in ("call_function", "call_method") and canonical(node) in _CHEAP:
        tensors = node.all_input_nodes
        if len(tensors) != 1:
            return False
        node = tensors[0]
        if node.op == "placeholder":
            return True
    return False


def restore(compiled: Callable[..., Any], cut: CutOutputs) -> Callable[..., Any]:
    """The compiled graph with `LazyLogits` in the places that were cut; itself where none was."""
    if not cut.lazy:
        return compiled

    def call(*args: Any) -> Any:
        found = compiled(*args)
        results = list(found[: cut.results])

        def given(sources: tuple[Source, ...]) -> list[Any]:
            return [(args if s.kind == "input" else found)[s.index] for s in sources]

        for output in cut.lazy:
            hidden, *inputs = given(output.sources)
            top = None if output.top is None else found[output.top]
            chain = HeadChain(
                hidden, tuple(inputs), output.chain, output.autocast, cut.outlive_steps, output.rowwise, top
            )
            logits = LazyLogits.hand_out(chain, output.like(hidden), at_any_size=output.cut)
            for index in output.places:
                results[index] = logits
            for view in output.views:
                results[view.index] = view.run(logits, *given(view.sources))
        return results

    return call
