# SPDX-License-Identifier: Apache-2.0
"""Where row programs begin and end in a graph.

From the heads the graph is read forwards. A node that reads a value of the region is run by the recorder; where that refuses
it, the node stays in the graph, and what it reads of the region has to come out: numbers per row may, logits may not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from ..._torch import HigherOrderOperator, tree_leaves, tree_map
from .. import fakes
from ..autocast import autocast_at, under
from ..canonical import CHECKS, canonical, mutated_arguments
from ..decide import row_count
from ..trace import Trace
from ..values import Form, LogitsView, Reason, constant, value_of
from .axes import NotByRows, RowsMixed, fresh, rows_in
from .call import tensors
from .emit import row_axes, row_shape
from .found import REASONS, Exit, Large, Region
from .heads import begun, turned
from .numbers import ARITHMETIC, of_numbers, spelling
from .operations import RULES, is_pointwise
from .own_gradient import call_function, graphs_of, is_function
from .record import Recorder
from .split import Split, reduced, split_of
from .value import Leaf, Turned, Value


def region_of(graph: Graph, heads: dict[Node, LogitsView], found: Trace, sizes: Callable[[Any], Any]) -> Region:
    """The region that begins at some heads. Those whose logits are needed for something else are left out.

    Where heads are turned, it is of all of them, or empty.

    Args:
        graph: with example values.
        heads: linear layers, and what each is.
        found: what else the graph holds: views whose rows were moved, and nodes under transforms.
        sizes: a number for a size that is a symbol.
    """
    with fakes.quiet():
        if any(view.turned for view in heads.values()):
            with contextlib.suppress(Large):
                return _Reader(graph, heads, found, sizes, pulls=True).read()
            return Region()
        best = _region_of(graph, heads, found, sizes, pulls=True)
        if any(node not in best.heads for node in heads):
            # What is made for each row anew may be what does not fit.
            other = _region_of(graph, heads, found, sizes, pulls=False)
            best = max(best, other, key=lambda s: sum(node in s.heads for node in heads))
        return best


def _region_of(graph: Graph, heads: Any, trace: Trace, sizes: Callable[[Any], Any], pulls: bool) -> Region:
    left, refused, reasons = dict(heads), {}, {}
    while left:
        reader = _Reader(graph, left, trace, sizes, pulls)
        try:
            found = reader.read()
        except Large as large:
            refused[large.node] = str(large)
            # Of a layer with fewer classes than hidden dimensions, such as a gate or an adapter, nobody wants to know.
            wide = any(sizes(heads[h].classes) > sizes(heads[h].hidden_size) for h in large.heads if h in heads)
            if large.node in reader.reasons and wide:
                reasons[large.node] = reader.reasons[large.node]
            left = {node: view for node, view in left.items() if node not in large.heads}
            continue
        found.refused, found.reasons = refused | found.refused, reasons
        return found
    return Region(refused=refused, reasons=reasons)


def followed(
    graph: Graph, heads: dict[Node, LogitsView], found: Trace, sizes: Callable[[Any], Any], node: Node
) -> Value | None:
    """A node's value in the region that begins at some heads, whatever reads it; None where it is not in it."""
    return _Reader(graph, heads, found, sizes, pulls=False).reached(node)


class _Reader:
    def __init__(self, graph: Graph, heads: Any, trace: Trace, sizes: Callable[[Any], Any], pulls: bool) -> None:
        self._pulls = pulls
        logits = [torch.Size([sizes(s) for s in view.shape]).numel() for view in heads.values()]
        self._size: int = min(logits) // 2
        self._graph, self._heads, self._sizes = graph, heads, sizes
        self._is_turned: bool = any(view.turned for view in heads.values())  # all of them, and nothing needs other rows
        self._views, self._transformed = trace.views, trace.transformed
        self._unscaled = {n: (trace.heads[n].weight, view) for n, view in heads.items() if view.scales}
        self._values: dict[Node, Any] = {}  # of nodes outside, with fakes of our own
        self._numbers: dict[Node, Tensor] = {}  # that are symbols
        self._inside: dict[Node, Any] = {}
        self._other_way: dict[Node, Any] = {}  # the same, with products turned
        self._writes = False  # whether a node writes to memory
        self._from: dict[Node, set[Node]] = {}  # the heads, as the caller named them, that a node's value is made of
        self._found = Region()
        self.reasons: dict[Node, Reason] = {}  # of nodes that are refused for one that a user can do something about
        self._splits: dict[Node, tuple[Split, Tensor]] = {}
        self._casts = any(getattr(n.target, "__name__", "") == "_enter_autocast" for n in graph.nodes) or (
            torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
        )
        self._recorder = Recorder(RULES, is_pointwise, autocast=self._casts)

    def reached(self, node: Node) -> Value | None:
        self._follow()
        return self._recorder.value(self._inside[node]) if isinstance(self._inside.get(node), Tensor) else None

    def _follow(self) -> None:
        for node in self._graph.nodes:
            if node.op == "output":
                continue
            if node in self._heads:
                self._begin(node, self._heads[node], {node})
            elif any(n in self._inside for n in node.all_input_nodes):
                if canonical(node) in CHECKS:
                    self._inside[node] = None
                else:
                    self._step(node)

    def read(self) -> Region:
        self._follow()
        self._find_exits()
        self._found.inside = list(self._inside)
        return self._found

    # --- heads and values of the graph

    def _begin(self, node: Node, view: LogitsView, heads: set[Node]) -> None:
        """The logits of a view, from the bare product on, as the value of a node of the region."""
        self._inside[node] = self._logits(node, view, node)
        self._from[node] = heads

    def _logits(self, node: Node, view: LogitsView, head: Node | Turned) -> Tensor:
        self._found.heads[head] = view
        return begun(self._recorder, node, view, head, self._sizes)

    def _view(self, node: Node) -> LogitsView | None:
        """What a node is of a head, whose weight is that with which the region begins."""
        view = self._views.get(node)
        if view is None or view.linear not in self._unscaled:
            return view
        scaled, head = self._unscaled[view.linear]
        return replace(view, weight=head.weight, scales=head.scales) if view.weight == scaled else view

    def _turned(self, node: Node) -> Any:
        """The value of a node of the region with the rows of its product as classes, and its classes as rows.

        Raises NotByRows where a product on the way cannot be turned, or what is made of it mixes those rows.
        """
        if self._writes or self._is_turned:
            raise NotByRows("a product that is turned already, or a value that is written to")
        if node not in self._other_way:
            view = self._view(node) if node in self._inside else None
            facing = None if view is None else turned(view)
            if facing is not None:
                self._other_way[node] = self._logits(node, facing, Turned(node))
            elif node in self._heads:
                raise NotByRows("a product that cannot be turned")
            elif node in self._inside and self._is_large(node):
                out = self._record(node, self._turned)
                self._check(out, value_of(node))
                self._other_way[node] = out
            else:
                return self._argument(node)
        return self._other_way[node]

    def _argument(self, node: Node) -> Any:
        if node in self._inside:
            return self._inside[node]
        if node not in self._values:
            if isinstance(value_of(node), torch.SymFloat):
                self._values[node] = self._number(node)
            elif not self._pulled(node):
                self._values[node] = tree_map(lambda v: self._outside(node, v), value_of(node))
        return self._values[node]

    def _number(self, node: Node) -> Any:
        """A number of the program's that is a symbol, as a tensor of no dimensions; one that is fixed as itself."""
        number = constant(node)
        if not isinstance(number, Node):
            return number
        if node not in self._numbers:
            dtype = torch.float64 if isinstance(value_of(node), torch.SymFloat) else torch.int64
            fake = self._recorder.empty(torch.empty(0), dtype, ())
            self._numbers[node] = self._recorder.enter(fake, Value([], dtype, Leaf(node)))
        return self._numbers[node]

    def _pulled(self, node: Node) -> bool:
        """Whether a tensor of the size of logits that the graph makes of less is made within the region, row by row."""
        value = value_of(node)
        places = canonical(node) == "arange"  # whose numbers may be those of the rows
        if (
            not (self._pulls or places)
            or node.op not in ("call_function", "call_method")
            or is_function(node)
            or not isinstance(value, Tensor)
        ):
            return False
        size = torch.Size(map(self._sizes, value.shape)).numel()
        if (size < self._size and not places) or any(mutated_arguments(n) for n in (node, *node.users)):
            return False
        try:
            products = self._recorder.products
            out = self._record(node, self._argument)
        except Exception:  # left to the graph, which computes it whatever it is
            return False
        if self._recorder.products > products or not isinstance(out, Tensor):
            return False
        if value.requires_grad != self._recorder.value(out).grad or out.dtype != value.dtype:
            return False
        self._values[node] = out
        if node not in self._found.pulled:
            self._found.pulled.append(node)
        return True

    def _outside(self, node: Node, value: Any) -> Any:
        if isinstance(value, Tensor):
            if not isinstance(value_of(node), Tensor):
                raise NotByRows("a tensor in a tuple")
            shape, stride = ([self._sizes(s) for s in sizes] for sizes in (value.shape, value.stride()))
            fake = self._recorder.empty(value, value.dtype, shape, stride)
            dims = [fresh(size) for size in shape]
            return self._recorder.enter(fake, Value(dims, value.dtype, Leaf(node), grad=value.requires_grad))
        if isinstance(value, torch.SymBool):
            raise NotByRows("a number that is not known")
        return self._sizes(value)

    # --- nodes

    def _step(self, node: Node) -> None:
        try:
            self._run(node)
        except NotByRows as refusal:
            if (not self._is_turned and self._moved(node)) or self._divided(node):
                return
            self._found.refused[node] = f"`{spelling(node)}`: {refusal}"
            if self._is_turned and any(map(self._is_large, node.all_input_nodes)):
                raise Large(set(self._heads), node, str(refusal)) from refusal
            if type(refusal) in REASONS:
                self.reasons[node] = REASONS[type(refusal)]
        except Exception as error:  # of torch's, for sizes or an operation that it has no fake of
            self._found.refused[node] = f"`{spelling(node)}`: {type(error).__name__}: {error}".splitlines()[0]

    def _run(self, node: Node) -> None:
        products = self._recorder.products
        out = self._either_way(lambda argument: self._record(node, argument))
        if self._recorder.products > products and not any(self._is_large(n) for n in node.all_input_nodes):
            raise NotByRows("a product of what has no classes any more")
        self._check(out, value_of(node))
        self._inside[node] = out
        self._writes = self._writes or bool(mutated_arguments(node))
        self._from[node] = {h for n in node.all_input_nodes for h in self._from.get(n, ())}

    def _either_way(self, run: Callable[[Callable[[Node], Any]], Any]) -> Any:
        """What a function returns, given what the arguments are.

        What mixes rows may be what treats each class by itself, or reads what was taken for rows or for classes before.
        """
        try:
            return run(self._argument)
        except RowsMixed:
            before, self._values = self._values, {}
            for argument in (self._argument, self._turned):
                with contextlib.suppress(NotByRows):
                    return run(argument)
            self._values = before
            raise

    def _record(self, node: Node, argument: Callable[[Node], Any]) -> Any:
        """What a node's function returns, given what the arguments are."""
        if is_function(node) and node not in self._transformed:
            if (
                argument != self._argument
            ):  # once both ways, its backward would be run for a part of the gradient each time
                raise NotByRows("an `autograd.Function` of a product that is turned")
            self._found.pulled += [n for n in graphs_of(node) if n not in self._found.pulled]
            return call_function(node, self._recorder, self._casts, torch.fx.node.map_arg(node.args[2:], argument))
        return self._recorder.run(*self._call(node, argument))

    def _call(self, node: Node, argument: Callable[[Node], Any]) -> tuple[Callable[..., Any], Any, Any]:
        if node.op not in ("call_function", "call_method"):
            raise NotByRows(f"a node of kind {node.op}")
        if node in self._transformed:
            raise NotByRows("a transform of torch.func is active")
        if isinstance(node.target, HigherOrderOperator):
            raise NotByRows("an operation with a graph of its own")
        arithmetic = canonical(node) in ARITHMETIC

        def given(n: Node) -> Any:
            return self._number(n) if arithmetic and isinstance(value_of(n), torch.SymInt) else argument(n)

        args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), given)
        target: Any = node.target
        if node.op == "call_method":
            target = getattr(type(args[0]), str(node.target))
        if any(isinstance(value_of(n), torch.SymFloat) for n in node.all_input_nodes):
            target = of_numbers(node, target)
        if not self._casts:
            return target, args, kwargs
        at = next((n for n in (node, *node.all_input_nodes) if isinstance(value_of(n), Tensor)), None)
        if at is not node:
            raise NotByRows("several results under autocast")

        def cast(*args: Any, **kwargs: Any) -> Any:
            with under(value_of(node).device, autocast_at(node)):
                return target(*args, **kwargs)

        return cast, args, kwargs

    def _check(self, out: Any, example: Any) -> None:
        """Raise NotByRows where results are not those of the example; where no gradient flows there, none does here."""
        made, known = ([x] if isinstance(x, Tensor) else tree_leaves(x) for x in (out, example))
        if len(made) != len(known):
            raise NotByRows("another number of results than in the example")
        for fake, value in zip(made, known, strict=True):
            if not isinstance(fake, Tensor):
                continue
            if not isinstance(value, Tensor) or fake.dtype != value.dtype or fake.dim() != value.dim():
                raise NotByRows("another result than in the example")
            self._check_flow(fake, value)

    def _check_flow(self, fake: Tensor, example: Tensor) -> None:
        flows = self._recorder.value(fake).grad
        if flows and not example.requires_grad:
            self._recorder.detach(fake)
        elif example.requires_grad and not flows:
            raise NotByRows("a gradient that does not come from the operation")

    def _moved(self, node: Node) -> bool:
        """Rows that were moved, which a hidden state of their own makes."""
        view = self._view(node)
        if view is None or view.form is not Form.LOGITS:
            return False
        self._begin(node, view, {h for n in node.all_input_nodes for h in self._from.get(n, ())})
        return True

    def _divided(self, node: Node) -> bool:
        """A reduction over rows and classes at once, whose first half is within the region."""
        if not any(self._is_large(n) for n in node.all_input_nodes):
            return False
        split = split_of(node, value_of)
        if split is None:
            return False
        try:
            given = (split.args, split.kwargs)
            map_arg = torch.fx.node.map_arg
            rows = self._either_way(lambda argument: self._recorder.run(split.by_row, *map_arg(given, argument)))
            dims = self._recorder.value(rows).dims
            over = [n for n, dim in enumerate(dims) if not rows_in(dim)]
            if split.reduction == "batchmean" and (not dims or 0 in over):
                return False
            rows = self._recorder.run(reduced, (rows, over, split.reduction), {})
            self._check_flow(rows, value_of(node))
        except NotByRows as refusal:
            self._found.refused[node] = f"`{spelling(node)}`: {refusal}"
            return True
        self._splits[node] = (split, rows)
        return True

    def _is_large(self, node: Node) -> bool:
        return any(self._too_large(self._recorder.value(t), node) for t in tensors(self._inside.get(node)))

    def _too_large(self, value: Value, node: Node) -> bool:
        """Whether a row's value is of the size of logits."""
        heads = [self._heads[h] for h in self._from.get(node, ()) if h in self._heads]
        # No more than a hidden state, and far less than logits, which lie either way where some are turned.
        sizes = [(v.hidden_size, v.classes, row_count(v) if self._other_way else v.classes) for v in heads]
        limits = [min(d, v // 4, n // 4) for d, v, n in (map(self._sizes, each) for each in sizes)]
        return torch.Size(row_shape(value.dims)).numel() > max(limits, default=0)

    # --- what leaves

    def _find_exits(self) -> None:
        order = {node: number for number, node in enumerate(self._graph.nodes)}
        for node, out in self._inside.items():
            outside = [u for u in node.users if u not in self._inside and u not in self._splits]
            if not outside or not isinstance(out, Tensor):
                if any(u.op != "output" and not isinstance(out, Tensor) for u in outside):
                    raise Large(self._from[node], outside[0], self._found.refused.get(outside[0], "a tuple"))
                continue
            first = min(outside, key=order.__getitem__)
            if any(node in mutated_arguments(u) for u in outside):
                raise Large(self._from[node], first, "a value of the rows is written to")
            if self._is_large(node):
                if all(u.op == "output" for u in outside) and node in self._views:
                    continue  # may become lazy
                raise Large(self._from[node], first, self._found.refused.get(first, "the logits are needed"))
            self._found.exits.append(Exit(node, self._recorder.value(out), None, first))
        for node, (split, rows) in self._splits.items():
            self._found.exits.append(Exit(node, self._recorder.value(rows), split, node))
        self._found.exits = [e for e in self._found.exits if row_axes(e.value.dims)]
