# SPDX-License-Identifier: Apache-2.0
"""The second tier of the pass: heads that no kernel took, as row programs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal

import sympy
from torch import Tensor
from torch.fx import GraphModule, Node

from ...functional import makes_grads_in_forward
from ..canonical import canonical
from ..decide import illegal_head, least_classes, row_count
from ..fakes import WouldGuard
from ..faults import Undo
from ..memory import N
from ..policy import Policy
from ..report import Rewritten
from ..rewriter import logits_use
from ..sharded import is_sharded
from ..trace import Trace
from ..values import LogitsView, source_line, value_of
from .axes import NotByRows, resolved, rows_in
from .emit import Emitted, emit
from .linear import make_gradients_in_forward
from .stretch import Exit, Stretch, followed, numbers, stretch_of
from .write import erase, write

_log = logging.getLogger("cce_fx")
_FIRST = (10_007, 20_011)  # sizes that are symbols are primes from these on, one after the other


@dataclass(frozen=True)
class Cut:
    """A row program that was written."""

    emitted: Emitted
    exits: tuple[Exit, ...]
    heads: dict[Node, LogitsView]
    grads_in_forward: bool

    def reported(self) -> Rewritten:
        """For the report; the sizes are those of the first head."""
        node, view = next(iter(self.heads.items()))
        rows, (width, classes) = row_count(view), (view.hidden_size, view.classes)
        numbers = [size if isinstance(size, int) else None for size in (rows, width, classes)]
        anchor = self.exits[-1].first or self.exits[-1].node
        each = sum(v.classes * v.dtype.itemsize for v in self.heads.values() if isinstance(v.classes, int))
        saved = 3 * each * N
        needed = 4 * each * sympy.Min(128, N)
        return Rewritten(
            loss=anchor.name,
            linear=node.name,
            source=source_line(anchor),
            path=(node.name, anchor.name),
            sources=(source_line(node), source_line(anchor)),
            tier="rows",
            strategy="grads_in_forward" if self.grads_in_forward else "recompute",
            bytes_saved=None if numbers[0] is None else int(saved.subs(N, numbers[0])),
            bytes_saved_expr=str(saved),
            bytes_needed_expr=str(needed),
            rows=numbers[0],
            hidden_size=numbers[1],
            classes=numbers[2],
            logits=logits_use(view),
        )


def cut_rows(gm: GraphModule, found: Trace, policy: Policy, undo: Undo) -> tuple[list[Cut], set[Node]]:
    """Write row programs for the heads of a graph whose logits are still used, in place.

    Returns what was written, and the nodes that are gone with it.
    """
    heads = {node: view for node, view in found.heads.items() if _is_head(node, view, policy, found)}
    stretch = stretch_of(gm.graph, heads, found, numbers(gm.graph, _FIRST[0]))
    for node, why in stretch.refused.items():
        _log.debug("not in a row program: %s, %s", node.name, why)
    if not stretch.exits:
        return [], set()
    try:
        if _has_symbols(stretch):
            _check_sizes(gm, heads, found, stretch)
        undo.remember()
        groups = write(gm, stretch, policy)
    except (NotByRows, WouldGuard) as refusal:
        _log.debug("no row program: %s", refusal)
        return [], set()
    erase(gm, stretch)
    done = []
    for emitted, exits, call in groups:
        dtype = stretch.heads[emitted.heads[0]].dtype
        early = makes_grads_in_forward(policy.strategy, "mean", dtype)
        early = early and make_gradients_in_forward(gm, call)
        used = {h: stretch.heads[h] for h in emitted.heads}
        done.append(Cut(emitted, tuple(exits), used, early))
    gm.graph.lint()
    gm.recompile()
    return done, {*stretch.inside, *(e.node for e in stretch.exits)}


def rows_of(gm: GraphModule, found: Trace, policy: Policy, node: Node) -> Literal["in order", "moved"] | None:
    """Whether a node's value is made of each row of a graph's logits by itself, so that a row program could begin with it.

    "in order" where the dimensions of its rows are those of the logits, and one more, without rows, comes after them.
    """
    heads = {n: view for n, view in found.heads.items() if _is_head(n, view, policy, found)}
    value = followed(gm.graph, heads, found, numbers(gm.graph, _FIRST[0]), node) if heads else None
    if value is None:
        return None
    try:
        rows = emit([value]).row_dims
    except NotByRows:
        return None
    dims = [resolved(dim) for dim in value.dims]
    return "in order" if tuple(dims[:-1]) == rows and not rows_in(dims[-1]) else "moved"


# Logits below this many bytes are left to the inner backend, which fuses them: blocks of a few rows cost more than they save.
_SMALLEST = 8 << 20
# Operations that mix the numbers of a row with a weight. A layer before one is a model's own, unless it is far wider than it
# is deep, as a vocabulary is.
_LAYERS = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "scaled_dot_product_attention")
_WIDER = 16


def _is_head(node: Node, view: LogitsView, policy: Policy, found: Trace) -> bool:
    if node in found.transformed or node._erased or not any(u.op != "output" for u in node.users):
        return False
    divided = any(is_sharded(value_of(n)) for operand in view.operands for n in (*operand.nodes, node))
    if divided or illegal_head(view) is not None:
        return False
    classes, width = view.classes, view.hidden_size
    if not isinstance(classes, int) or not isinstance(width, int) or classes < least_classes(view, policy):
        return False
    size = _hint(row_count(view)) * classes * value_of(node).dtype.itemsize
    if policy.min_vocab is None and size < _SMALLEST:
        return False
    return classes > _WIDER * width or not _is_layer(node, found)


def _is_layer(head: Node, found: Trace) -> bool:
    """Whether another layer reads what is made of a layer's result, number by number.

    A cheap look at sizes, so that the layers of a model are not read as programs.
    """
    large = _hint(found.heads[head].classes) * _hint(row_count(found.heads[head])) // 4
    seen, stack = {head}, [head]
    while stack:
        for user in stack.pop().users:
            value = value_of(user)
            if user in seen or not isinstance(value, Tensor):
                continue
            if canonical(user) in _LAYERS:
                return True
            seen.add(user)
            if _hint(value.numel()) >= large:
                stack.append(user)
    return False


def _hint(size: Any) -> int:
    """A size, or that of the example."""
    return size if isinstance(size, int) else int(size.node.hint or 0)


def _has_symbols(stretch: Stretch) -> bool:
    return any(not isinstance(s, int) for view in stretch.heads.values() for s in view.shape)


def _check_sizes(gm: GraphModule, heads: dict[Node, LogitsView], found: Trace, stretch: Stretch) -> None:
    """Raise NotByRows where the program depends on sizes that are symbols: two choices of them give two programs."""
    other = stretch_of(gm.graph, heads, found, numbers(gm.graph, _FIRST[1]))
    for one, two in zip(stretch.exits, other.exits, strict=True):
        if emit([one.value]).program != emit([two.value]).program:
            raise NotByRows("the program depends on a size that is not fixed")
