# SPDX-License-Identifier: Apache-2.0
"""Rewrite: one operator call for the row programs of a region, and what is left of its reductions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, Proxy

from ...functional import run_rows
from ..canonical import mutated_arguments
from ..fakes import propagate
from ..policy import Policy
from ..rewriter import Builder, head_operands, in_its_place, size_of
from ..trace import storage_of, switched_off
from ..values import Operand, behind, value_of
from .axes import Axis, Dim, NotByRows, OwnGradient, others_in, resolved, rows_in
from .emit import Emitted, RowInput, emit, kept
from .found import Exit, Region
from .own_gradient import is_function, is_in_proportion
from .sizes import without_numbers
from .value import Turned


def write(
    gm: GraphModule, region: Region, policy: Policy, other: Region | None = None, at_once: bool = False
) -> list[tuple[Emitted, list[Exit], Node]]:
    """Write a region's programs into a graph, in place; the nodes of the region stay, with fewer users.

    Returns each program, what it returns, and the call of it. `other` is the region with other numbers in the place of sizes
    that are not fixed. `at_once` is for one program, or none.

    Raises NotByRows, with the graph as it was, where a program cannot be written.
    """
    order = _Order(gm.graph)
    groups = _groups(region, order)
    if at_once and len(groups) > 1:
        raise NotByRows("several programs")
    _check_functions(region, groups)
    if other is not None:
        groups = [(_unfixed(emitted, exits, region, other), exits) for emitted, exits in groups]
    done: list[tuple[Builder, list[tuple[Node, Node]], Node]] = []
    try:
        for emitted, exits in groups:
            _check_memory(gm, region, emitted, exits, order)
            done.append(_write_group(gm, region, emitted, exits, order.place_of(exits), policy))
    except BaseException:
        for builder, replaced, _ in reversed(done):
            for old, new in replaced:
                new.replace_all_uses_with(old, delete_user_cb=lambda user, b=builder: user not in b.written)
            builder.undo()
        raise
    return [(emitted, exits, call) for (emitted, exits), (_, _, call) in zip(groups, done, strict=True)]


def _groups(region: Region, order: _Order) -> list[tuple[Emitted, list[Exit]]]:
    """The exits by the program that makes them: those with the same rows whose inputs are there before the first is read."""
    groups: list[tuple[Emitted, list[Exit]]] = []
    for exit in sorted(region.exits, key=lambda e: order[e.first]):  # type: ignore[index]
        for number, (emitted, exits) in enumerate(groups):
            try:
                joined = emit([*(e.value for e in exits), exit.value])
            except NotByRows:
                continue
            together = [*exits, exit]
            if (
                joined.rows == emitted.rows
                and _latest(joined, together, region, order) < order[order.place_of(together)]
            ):
                groups[number] = (joined, together)
                break
        else:
            groups.append((emit([exit.value]), [exit]))
    for emitted, exits in groups:
        if _latest(emitted, exits, region, order) >= order[order.place_of(exits)]:
            raise NotByRows("a value that the program reads is made after what it makes is read")
    return groups


def _check_functions(region: Region, groups: list[tuple[Emitted, list[Exit]]]) -> None:
    """Raise where the backward of an `autograd.Function`, not in proportion to what comes from above, would give something else.

    It may be run for a part of its gradient here and a part there, since a program may read what the graph makes of the function
    all the same; and for the rows that fill up a block, to which no gradient comes: what all rows share would have theirs.
    """
    if all(is_in_proportion(emitted.program) for emitted, _ in groups):
        return
    if any(kind == "shared" for emitted, _ in groups for kind, _ in emitted.flows):
        raise OwnGradient(
            "an `autograd.Function` whose gradient is not in proportion, and a bias or the like that is learnt"
        )
    made_of = {n for emitted, exits in groups for node in _read(emitted, exits, region) for n in behind(node)}
    if len(groups) > 1 or any(is_function(n) for n in made_of & set(region.inside)):
        raise OwnGradient("an `autograd.Function` that would be run several times, for a part of its gradient each")


def _unfixed(emitted: Emitted, exits: list[Exit], region: Region, other: Region) -> Emitted:
    """A program for any size that is not fixed. Raises NotByRows."""
    if [e.node for e in region.exits] != [e.node for e in other.exits]:
        raise NotByRows("what is known of rows depends on a size that is not fixed")
    same = [next(b for a, b in zip(region.exits, other.exits, strict=True) if a is exit) for exit in exits]
    return without_numbers(emitted, emit([exit.value for exit in same]))


class _Order:
    """Where the nodes of a graph stand, before anything is written."""

    def __init__(self, graph: Graph) -> None:
        self._numbers: dict[Node, int] = {node: number for number, node in enumerate(graph.nodes)}
        self._off = switched_off(graph)

    def __getitem__(self, node: Node) -> int:
        return self._numbers[node]

    def get(self, node: Node, default: int) -> int:
        return self._numbers.get(node, default)

    def place_of(self, exits: list[Exit]) -> Node:
        """The node before which the program of some exits stands: the first that reads one, or what switched gradients off for it."""
        first = exits[0].first
        assert first is not None
        return self._off.get(first, first) if any(e.value.grad for e in exits) else first


def _read(emitted: Emitted, exits: list[Exit], region: Region) -> set[Node]:
    """The graph's nodes that a program, and what is left of its reductions, read."""
    found: set[Node] = set()
    for given in (*(r.node for r in emitted.row_inputs), *emitted.shared):
        found |= set(given.nodes) if isinstance(given, Operand) else {given} if given is not None else set()
    for head in emitted.heads:
        view = region.heads[head]
        found |= {n for operand in (view.hidden, view.weight) for n in operand.nodes}
    for split in (e.split for e in exits if e.split is not None):
        found |= {n for n in (split.target, split.weight) if isinstance(n, Node)}
    return found


def _latest(emitted: Emitted, exits: list[Exit], region: Region, order: _Order) -> int:
    return max(order[n] for n in _read(emitted, exits, region))


def _check_memory(gm: GraphModule, region: Region, emitted: Emitted, exits: list[Exit], order: _Order) -> None:
    """Raise where what a program reads is written to after the region first reads it, and before the program or the last does."""
    inside = {*region.inside, *region.pulled, *(e.node for e in exits)}
    heads: dict[Node, int] = {}
    for h in emitted.heads:
        view = region.heads[h]
        for n in (n for operand in view.operands for n in operand.nodes):
            begun = order.get(view.linear, order[h.node if isinstance(h, Turned) else h])
            heads[n] = min(begun, heads.get(n, begun))
    made: dict[int | None, int] = {}
    for n in _read(emitted, exits, region):
        read = [order[u] for u in n.users if u in inside] + ([heads[n]] if n in heads else [])
        first = min(read, default=order[n])
        made[storage_of(n)] = min(first, made.get(storage_of(n), first))
    last = max(order[n] for n in (*region.inside, order.place_of(exits)))
    for node in gm.graph.nodes:
        if node in inside or order.get(node, last) >= last:
            continue
        for memory in {storage_of(n) for n in mutated_arguments(node)} - {None}:
            if made.get(memory, last) < order[node]:
                raise NotByRows(f"`{node.name}` writes to what the program reads")


def _write_group(
    gm: GraphModule, region: Region, emitted: Emitted, exits: list[Exit], place: Node, policy: Policy
) -> tuple[Builder, list[tuple[Node, Node]], Node]:
    builder = Builder(gm.graph, {})
    replaced: list[tuple[Node, Node]] = []
    try:
        with builder.before(place):
            heads = [head_operands(builder, region.heads[h]) for h in emitted.heads]
            shared = [_proxy(builder, s, region) for s in emitted.shared]
            rows = _Rows(emitted, region, builder, heads, shared)
            inputs = [rows.input(given) for given in emitted.row_inputs]
            widths = [
                size_of(region.heads[h].hidden_size, w, 1) for h, (_, w) in zip(emitted.heads, heads, strict=True)
            ]
            flat = [(h.reshape(-1, width), w) for (h, w), width in zip(heads, widths, strict=True)]
            flat = [hw if ("head", n) in emitted.flows else tuple(t.detach() for t in hw) for n, hw in enumerate(flat)]
            inputs = [x if ("row", n) in emitted.flows else x.detach() for n, x in enumerate(inputs)]
            shared = [x if ("shared", n) in emitted.flows else x.detach() for n, x in enumerate(shared)]
            out = run_rows(
                [h for h, _ in flat],
                [w for _, w in flat],
                inputs,
                shared,
                emitted.program,
                policy.workspace,
                policy.compiled,
            )
            new = []
            for number, exit in enumerate(exits):
                value = rows.output(out[number], exit.value.dims)
                node = exit.node
                if exit.split is not None:
                    batch = rows.size(exit.value.dims[0]) if exit.value.dims else 1
                    value = exit.split.tail(value, batch, value_of(node).dtype, builder.proxy)
                new.append((node, value.node))
        propagate(gm, builder.written, grad=True)
        for node, made in new:
            was, now = value_of(node), value_of(made)
            if (was.dtype, len(was.shape), was.requires_grad) != (now.dtype, len(now.shape), now.requires_grad):
                raise NotByRows(f"{tuple(was.shape)} {was.dtype} became {tuple(now.shape)} {now.dtype}")
    except BaseException:
        builder.undo()
        raise
    inside = {*region.inside, *region.pulled}
    for node, made in new:
        in_its_place(node, made)
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user not in inside and user not in builder.written)
        replaced.append((node, made))
    return builder, replaced, out.node


def _proxy(builder: Builder, given: Node | Operand, region: Region) -> Any:
    if isinstance(given, Node):
        return builder.proxy(given) if isinstance(value_of(given), Tensor) else _number(builder, given)
    view = next(v for v in region.heads.values() if given in v.operands)
    return builder.operand(given, view.dtype)


def _number(builder: Builder, given: Node) -> Any:
    """A number that is a symbol as a tensor of no dimensions.

    By a product: torch.compile makes tensors of symbols in arithmetic, and compiles again for each value of any other.
    """
    if isinstance(value_of(given), torch.SymInt):
        return builder.proxy(builder.graph.call_function(torch.scalar_tensor, (given,), {"dtype": torch.int64}))
    one = builder.graph.call_function(torch.ones, ((),), {"dtype": torch.float64})
    return builder.proxy(one) * builder.proxy(given)


class _Rows:
    """Between the shapes of the program, one dimension of rows first, and those of the graph."""

    def __init__(
        self, emitted: Emitted, region: Region, builder: Builder, heads: list[tuple[Any, Any]], shared: list[Any]
    ) -> None:
        self._axes, self._builder, self._region = emitted.rows, builder, region
        view = region.heads[emitted.heads[0]]
        self._device: torch.device = value_of(view.linear).device
        self._sizes: dict[Axis, Any] = {}
        for number, (size, dim) in enumerate(zip(view.row_shape, emitted.row_dims, strict=True)):
            if isinstance(size, int):
                self._sizes |= {axis: axis.size for axis in dim}
            elif len(dim) == 1:
                self._sizes[dim[0]] = heads[0][0].size(number)
            else:
                raise NotByRows("rows of a size that is not known are divided")
        for axis, size in emitted.sizes.items():
            if size.kind == "row":
                x, dim = self._per_row(emitted.row_inputs[size.which], size.dim)
            else:
                x, dim = (heads[size.which][1] if size.kind == "head" else shared[size.which]), size.dim
            self._sizes[axis] = size.of(x.size(dim))

    def _per_row(self, given: RowInput, dim: int) -> tuple[Any, int]:
        """A tensor of the graph, and which of its dimensions a dimension of its row's value is."""
        at = kept(given.dims)[dim]
        if given.node is None or len(resolved(given.dims[at])) > 1:
            raise NotByRows("a size of rows that are divided")
        return self._builder.proxy(given.node), at

    def _size(self, axis: Axis) -> Any:
        return self._sizes.get(axis, axis.size)

    def input(self, given: RowInput) -> Any:
        """A tensor of the graph as the program takes it: (N, *shape)."""
        builder = self._builder
        axes = [axis for dim in given.dims for axis in resolved(dim)]
        if given.node is None:
            size = math.prod(self._size(a) for a in axes)
            args = (size.node if isinstance(size, Proxy) else size,)
            x = builder.proxy(builder.graph.call_function(torch.arange, args, {"device": self._device}))
        else:
            x = _proxy(builder, given.node, self._region)
        if not axes:
            return x
        present = [a for a in self._axes if any(a is b for b in axes)]
        missing = [a for a in self._axes if all(a is not b for b in axes)]
        others = [a for a in axes if not a.row]
        plain = all(len(resolved(dim)) == 1 for dim in given.dims)
        x = x if plain else x.reshape([self._size(a) for a in axes])
        wanted = [*present, *others]
        if [id(a) for a in wanted] != [id(a) for a in axes]:
            x = x.permute([next(n for n, b in enumerate(axes) if b is a) for a in wanted])
        if missing:
            if math.prod(a.size for a in others) > 64:
                raise NotByRows("a tensor of the size of logits would be copied for rows that share it")
            shape = [self._size(a) if any(a is b for b in present) else 1 for a in self._axes]
            x = x.reshape([*shape, *map(self._size, others)])
            x = x.expand([self._size(a) for a in (*self._axes, *others)])
        whole = len(self._axes) == 1 and plain and not missing and len(others) == len(given.shape)
        shape = [self.size(others_in(given.dims[n])) for n in kept(given.dims)]
        return x if whole else x.reshape([-1, *shape])

    def output(self, x: Any, dims: Sequence[Dim]) -> Any:
        """What the program returns, (N, *shape), with the dimensions that it has in the graph."""
        here = [axis for dim in dims for axis in resolved(dim)]
        others = [axis for dim in dims for axis in others_in(dim)]
        if (
            len(self._axes) == 1
            and len(dims) == 1 + len(others)
            and dims[0]
            and rows_in(dims[0])
            and len(resolved(dims[0])) == 1
        ):
            if all(len(resolved(d)) == 1 for d in dims):
                return x
        x = x.reshape([self._size(a) for a in (*self._axes, *others)])
        axes = [*self._axes, *others]
        for axis in [a for a in self._axes if all(a is not b for b in here)]:
            at = next(n for n, b in enumerate(axes) if b is axis)
            x = x.select(at, 0)
            del axes[at]
        order = [next(n for n, b in enumerate(axes) if b is a) for a in here]
        x = x if order == list(range(len(order))) else x.permute(order)
        sizes = [self.size(dim) for dim in dims]
        return x if all(len(resolved(d)) == 1 for d in dims) else x.reshape(sizes)

    def size(self, dim: Dim) -> Any:
        """Of a dimension: a number, or a proxy of one that is there before the program."""
        axes = resolved(dim)
        return math.prod(self._size(a) for a in axes) if axes else 1


def erase(gm: GraphModule, region: Region) -> None:
    """Erase the nodes of a region that nothing reads any more, those that write to what nothing reads among them."""
    order = {node: number for number, node in enumerate(gm.graph.nodes)}
    divided = [e.node for e in region.exits if e.split is not None]
    nodes = {n for n in (*region.inside, *region.pulled, *divided) if n in order}
    for node in sorted(nodes, key=order.__getitem__, reverse=True):
        read = [n for n in mutated_arguments(node) for u in n.users if u is not node]
        if not node.users and not read:
            gm.graph.erase_node(node)
