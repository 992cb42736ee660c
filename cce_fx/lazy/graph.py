# SPDX-License-Identifier: Apache-2.0
"""Lazy logits as a graph: what is asked of them outside the compiled graph is cut by the very pass that cuts it inside.

The head chains, the lazy operations and the one that is asked for are written into a small fx graph. It is examined once for
each kind of expression, with primes for the sizes of its rows; what the pass declines reads the logits and runs as it was.
"""

from __future__ import annotations

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from .._torch import FakeTensorMode, enter_autocast, exit_autocast, tree_map
from ..held import is_held, note
from ..passes import fakes
from ..passes.autocast import under, written_under
from ..passes.beside import tell_likeliest
from ..passes.faults import Fault, Undo, failed, stage
from ..passes.pipeline import apply
from ..passes.programs.sizes import primes
from ..passes.programs.tier import rows_of
from ..passes.trace import trace
from ..passes.values import Form, behind, output_of, value_of
from .expression import Expression, Input, Ref, Size, Step
from .likeliest import remember

_CACHE_SIZE = 512
_MOST_SIZES = 3  # lengths at which an expression that depends on its length is examined without success
_TELLS = "cce_fx_likeliest"  # of a graph whose last result is the likeliest class of each row of the logits
_EARLY = "cce_fx_early"  # of a graph in which a loss makes gradients in the forward
_FIRST = (1009, 2003)  # sizes of rows are primes from these on


class _Cache(OrderedDict[Any, Any]):
    """The last used of what was found; for one thread at a time, as what is done with lazy tensors is."""

    def get_or_make(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self:
            self[key] = make()
            if len(self) > _CACHE_SIZE:
                self.popitem(last=False)
        self.move_to_end(key)
        return self[key]


@dataclass(frozen=True)
class _How:
    """In which way losses are cut."""

    small: bool  # logits for which what no kernel knows is not worth it
    again: bool  # whether they make gradients in their backward, since others wait for theirs


@dataclass
class _Kind:
    """What expressions become that differ in the sizes of their rows alone: a graph, or False; None where that depends on them."""

    any_size: GraphModule | bool | None
    by_size: _Cache = field(default_factory=_Cache)

    def graph(self, expression: Expression, how: _How) -> GraphModule | bool:
        if self.any_size is not None:
            return self.any_size
        sizes = tuple(expression.sizes)
        if sizes not in self.by_size and len(self.by_size) >= _MOST_SIZES and not any(self.by_size.values()):
            return False
        graph: GraphModule | bool = self.by_size.get_or_make(sizes, lambda: _cut(expression, how, None) or False)
        return graph


_kinds, _waiting = _Cache(), _Cache()


def row_by_row(expression: Expression) -> tuple[torch.dtype, bool] | None:
    """Where the last step treats each row of the logits by itself, so that it may wait: the dtype of what it returns, and whether
    that has the logits' rows in order and one more dimension."""

    def examine(writer: _Writer, node: Node) -> tuple[torch.dtype, bool] | None:
        policy, gm = replace(expression.chains[0].policy, min_vocab=0), writer.gm
        rows = rows_of(gm, trace(gm.graph), policy, node) if policy.tiers == "all" else None
        return None if rows is None else (value_of(node).dtype, rows == "in order")

    try:
        found: tuple[torch.dtype, bool] | None = _waiting.get_or_make(
            expression.key, lambda: _examined(expression, _FIRST[0], examine)
        )
    except TypeError:  # an argument without a hash
        return None
    return found or None


def run_without_logits(expression: Expression, small: bool) -> Any:
    """What the last step of an expression returns, made without the logits, or NotImplemented.

    Tensors are returned in the order of `tree_leaves`. Where the logits are `small`, what no kernel knows is not worth it.
    """
    weights = [t for chain in expression.chains for t in chain.inputs if isinstance(t, Tensor) and t.requires_grad]
    how = _How(small, expression.grad and is_held(weights))
    try:
        kind: _Kind = _kinds.get_or_make((how, expression.key), lambda: _Kind(_cut_for_any_size(expression, how)))
    except TypeError:  # an argument without a hash
        return NotImplemented
    graph = kind.graph(expression, how)
    if not isinstance(graph, GraphModule):
        return NotImplemented
    with torch.set_grad_enabled(expression.grad), torch.autocast(expression.device.type, enabled=False):
        found = graph(*expression.values)
    if _TELLS in graph.meta:
        *found, top = found
        remember(expression, top)
    if _EARLY in graph.meta:
        note(found[0], weights)
    return tuple(found)


def _cut_for_any_size(expression: Expression, how: _How) -> GraphModule | bool | None:
    """The graph without the logits, where two choices of sizes make the same of it; None where they do not, False at a fault."""
    one = _cut(expression, how, _FIRST[0])
    if not isinstance(one, GraphModule):
        return one
    two = _cut(expression, how, _FIRST[1])
    return one if isinstance(two, GraphModule) and one.code == two.code else None


def _cut(expression: Expression, how: _How, first: int | None) -> GraphModule | bool | None:
    """The graph without the logits; None where the pass declines, False where it fails."""
    policy = expression.chains[0].policy
    # A compiled row program would let the program wait for the compiler, for a number that it may ask for once.
    policy = replace(policy, min_vocab=0, tiers="kernel" if how.small else policy.tiers, compiled=False)
    if how.again and policy.strategy == "auto":
        policy = replace(policy, strategy="recompute")

    def examine(writer: _Writer, node: Node) -> GraphModule | None:
        gm = writer.gm
        report, found = apply(gm, policy, Undo(gm))
        if not report.rewritten or behind(output_of(gm.graph)) & found.heads.keys():
            return None
        if any(line.strategy == "grads_in_forward" for line in report.rewritten):
            gm.meta[_EARLY] = True
        logits = None if expression.moves is None else found.views.get(writer.made[expression.moves[1]])
        top = tell_likeliest(gm, logits) if logits is not None and logits.form is Form.LOGITS else None
        if top is not None:
            output = output_of(gm.graph)
            output.args = ((*output.args[0], top),)
            gm.meta[_TELLS] = True
            gm.recompile()
        return gm

    found: GraphModule | bool | None = _examined(expression, first, examine)
    return found


def _examined(expression: Expression, first: int | None, examine: Callable[[_Writer, Node], Any]) -> Any:
    """What `examine` makes of an expression's graph and its last node; None where it cannot be written, False where it fails.

    The sizes of rows are primes from `first` on, and the expression's own where that is None.
    """
    writer = _Writer(expression, first)
    with torch.autocast(expression.device.type, enabled=False), torch.inference_mode(False):
        try:
            with fakes.quiet():
                node = writer.write()
        except Exception:  # of torch's: the operation will raise it again, of the logits
            return None
        try:
            with stage("lazy logits", node):
                found = examine(writer, node)
                writer.finish()
                return found
        except Fault as fault:
            failed(fault)
            return False


class _Writer:
    """Writes an expression as a graph whose nodes carry example values."""

    def __init__(self, expression: Expression, first: int | None) -> None:
        self._expression = expression
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._primes: Iterator[int] | None = None if first is None else primes(first)
        self._sizes: dict[int, int] = {}  # what stands for a size of rows: a prime, or a number made of some
        self._drawn: set[int] = set()  # the primes among them
        self._given: list[Node] = []
        self.made: list[Node] = []  # by the steps
        self.gm: GraphModule = GraphModule(torch.nn.Module(), Graph())

    def write(self) -> Node:
        """The graph, with its last step as its output; the node of that. Raises what torch raises."""
        graph = self.gm.graph
        for number, value in enumerate(self._expression.values):
            self._given.append(graph.placeholder(f"in{number}"))
            if not isinstance(value, Tensor):
                self._given[-1].meta["example_value"] = self._size(value)
        end = graph.output(None)
        for step in self._expression.steps:
            first = end.prev
            with graph.inserting_before(end), written_under(graph, self._expression.device, step.autocast):
                made = self._write(step)
            self._evaluate(first, end, step.autocast)
            self._compare(value_of(made), step)
            self.made.append(made)
        node = self.made[-1]
        results: Any = [node]
        if not isinstance(value_of(node), Tensor):
            first = end.prev
            with graph.inserting_before(end):
                results = [graph.call_function(operator.getitem, (node, i)) for i in range(len(value_of(node)))]
            self._evaluate(first, end, None)
        end.args = (tuple(results),)
        self.gm.recompile()
        return node

    def _write(self, step: Step) -> Node:
        args, kwargs = tree_map(self._argument, (step.args, dict(step.kwargs)))
        if not isinstance(step.func, GraphModule):
            return self.gm.graph.call_function(step.func, args, kwargs)
        inputs = [n for n in step.func.graph.nodes if n.op == "placeholder"]
        copies = dict(zip(inputs, args, strict=True))
        made = self.gm.graph.graph_copy(step.func.graph, copies)
        assert isinstance(made, Node)
        for old, new in copies.items():
            if old.op == "get_attr":
                name = f"chain{len(self.made)}"
                self.gm.add_submodule(name, step.func)
                new.target = f"{name}.{old.target}"
        return made

    def _argument(self, a: Any) -> Any:
        if isinstance(a, Input):
            node, value = self._given[a.index], self._expression.values[a.index]
            if "example_value" not in node.meta:
                with self._mode:
                    fake = torch.empty([*map(self._size, value.shape)], dtype=value.dtype, device=value.device)
                node.meta["example_value"] = fake.requires_grad_(value.requires_grad)
            return node
        if isinstance(a, Ref):
            return self.made[a.step]
        return self._size(a.size) if isinstance(a, Size) else a

    def _size(self, size: Any) -> Any:
        """What stands for a size of rows; anything else for itself."""
        if self._primes is None or type(size) is not int or size not in self._expression.sizes:
            return size
        if size not in self._sizes:
            self._sizes[size] = next(p for p in self._primes if p not in self._expression.fixed)
            self._drawn.add(self._sizes[size])
        return self._sizes[size]

    def _evaluate(self, first: Node, end: Node, autocast: torch.dtype | None) -> None:
        """Example values of what was written after `first`. An entry of autocast would outlast an error of what it is for."""
        at = first.next
        with under(self._expression.device, autocast):
            while at is not end:
                if at.target not in (enter_autocast, exit_autocast):
                    fakes.propagate(self.gm, [at], grad=self._expression.grad)
                at = at.next

    def _compare(self, value: Any, step: Step) -> None:
        """Learn what stands for the sizes of a step's result. Raises ValueError where it has others than the lazy tensor."""
        if step.shape is None:
            return
        if self._primes is not None:
            for have, want in zip(value.shape, step.shape, strict=True):
                if want in self._expression.sizes:
                    self._sizes.setdefault(want, have)
        if tuple(value.shape) != tuple(map(self._size, step.shape)):
            raise ValueError(f"{tuple(value.shape)} stands for {step.shape}")

    def finish(self) -> None:
        """Put the sizes of the graph's inputs in the place of the primes that stand for them, and drop the example values."""
        graph, sizes = self.gm.graph, {}
        body = [n for n in graph.nodes if n.op in ("call_function", "call_method")]
        for node in self._given:
            shape = value_of(node).shape if isinstance(value_of(node), Tensor) else ()
            for dim, size in enumerate(shape):
                if size in self._drawn and size not in sizes:
                    with graph.inserting_before(body[0]):
                        sizes[size] = graph.call_method("size", (node, dim))

        def named(value: Any) -> Any:
            factors: list[Any] = []
            for prime, node in sizes.items() if type(value) is int and value else ():
                while value % prime == 0:
                    value //= prime
                    factors.append(node)
            if not factors:
                return value
            with graph.inserting_before(body[0]):
                factors = factors if value == 1 else [*factors, value]
                return functools.reduce(lambda a, b: graph.call_function(operator.mul, (a, b)), factors)

        for node in body:
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), named)
        for node in graph.nodes:
            node.meta.clear()
        self.gm.recompile()
