# SPDX-License-Identifier: Apache-2.0
"""The second tier of the pass: heads that no kernel took, or that several would have taken, as row programs."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.fx import GraphModule, Node

from ...functional import makes_grads_in_forward
from ..beside import with_readings
from ..canonical import canonical
from ..decide import decide, illegal_head, least_classes, row_count
from ..fakes import WouldGuard
from ..faults import Undo
from ..joined import Joint, alike, alone, grouped, join
from ..memory import N, V, bytes_of_blocks, products_of
from ..policy import Policy
from ..report import Rewritten
from ..rewriter import erase_unused, logits_use
from ..sharded import is_sharded
from ..trace import Trace
from ..values import Decline, LogitsView, LossSite, Reason, Result, behind, example_size, source_line, value_of
from .axes import NotByRows, resolved, rows_in
from .emit import Emitted, emit
from .found import REASONS, Exit, Region
from .heads import is_better_turned, turned
from .linear import make_gradients_in_forward
from .region import followed, region_of
from .scales import unscaled
from .sizes import Numbers
from .value import Turned
from .write import erase, write

_log = logging.getLogger("cce_fx")


@dataclass(frozen=True)
class Cut:
    """A row program that was written."""

    emitted: Emitted
    exits: tuple[Exit, ...]
    heads: dict[Node | Turned, LogitsView]
    grads_in_forward: bool

    def reported(self, policy: Policy) -> Rewritten:
        """For the report; the sizes are those of the first head."""
        head, view = next(iter(self.heads.items()))
        node = head.node if isinstance(head, Turned) else head
        count, classes = row_count(view), view.classes
        given = (classes, view.hidden_size, count) if view.turned else (count, view.hidden_size, classes)
        numbers = [_or(size, None) for size in given]
        anchor = self.exits[-1].first or self.exits[-1].node
        rows = V if view.turned else N
        heads = self.heads.values()
        each = sum((N if v.turned else _or(v.classes, V)) * v.dtype.itemsize for v in heads)
        saved = 3 * each * rows
        return Rewritten(
            loss=anchor.name,
            linear=node.name,
            source=source_line(anchor),
            path=(node.name, anchor.name),
            sources=(source_line(node), source_line(anchor)),
            tier="rows",
            strategy="grads_in_forward" if self.grads_in_forward else "recompute",
            bytes_saved=None if None in (numbers[0], numbers[2]) else int(saved.subs({N: numbers[0], V: numbers[2]})),
            bytes_saved_expr=str(saved),
            bytes_needed_expr=str(bytes_of_blocks(each, rows, policy)),
            rows=numbers[0],
            hidden_size=numbers[1],
            classes=numbers[2],
            logits=logits_use(view),
        )


def _or(size: Any, other: Any) -> Any:
    return size if isinstance(size, int) else other


@dataclass
class RowPrograms:
    """What became of the heads that no kernel took."""

    cuts: list[Cut] = field(default_factory=list)
    within: set[Node] = field(default_factory=set)  # nodes that are gone with what was cut
    refused: list[Decline] = field(default_factory=list)  # for reasons that a user can do something about

    def declines(self, before: list[Decline]) -> list[Decline]:
        """The losses that stay as they are, of those that the first tier declined, each with the better reason of both."""
        left = [d for d in before if d.node not in self.within]
        for decline in self.refused:
            before_it = behind(decline.node)
            same = [d for d in left if d.node in before_it or decline.node in behind(d.node)]
            if all(d.reason in _VAGUE for d in same):
                left = [*(d for d in left if d not in same), decline]
        return left


# Reasons that say no more than that an operation is none of the kernels'.
_VAGUE = (Reason.NO_RULE, Reason.NO_LINEAR, Reason.USED)


def join_rows(gm: GraphModule, found: Trace, policy: Policy, undo: Undo) -> RowPrograms:
    """Write one row program for all that is made of the heads of a graph, in place, where the kernels take more products for it.

    Not one that is not compiled: what is done to its blocks takes longer than products.
    """
    heads = _heads(found, policy)
    needed = found.needed()
    if policy.compiled and policy.filter_eps is None and any(_is_dear(head, found, policy, needed) for head in heads):
        joined = cut_rows(gm, found, policy, undo, at_once=True)
        if joined.cuts:
            return joined
    return RowPrograms()


def _is_dear(head: Node, found: Trace, policy: Policy, needed: Collection[Node]) -> bool:
    """Whether the losses of a head, each by a kernel and the rest as a row program, are more than a product dearer than one program."""
    products, taken = 0.0, set()
    rows = max(example_size(row_count(found.heads[head])), 1)
    few = {Result.LOGIT: 0, Result.MAX: 1}  # the target's row of the weight is all that a gradient takes
    for candidate in found.candidates:
        site = decide(candidate, policy, needed) if candidate.view.linear is head else None
        if isinstance(site, LossSite):
            taken |= {
                n for c in (candidate, *with_readings(site, found, taken).readings) for n in (c.anchor, *c.view.path)
            }
            one = products_of(value_of(candidate.anchor).requires_grad, site.needs is not None)
            products += few.get(candidate.result, one) * example_size(row_count(candidate.view)) / rows
    views = [node for node, view in found.views.items() if view.linear is head]
    rest = {u for node in views for u in node.users if u.op != "output" and u not in taken and u not in found.views}
    if rest:
        differentiable = any(isinstance(v := value_of(u), Tensor) and v.requires_grad for u in rest)
        products += products_of(differentiable, True)
    return products > products_of(True, True) + 1


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage is looked for in here: all that a region is read into stays until its end, and each look goes over it again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@_without_collections()
def cut_rows(gm: GraphModule, found: Trace, policy: Policy, undo: Undo, *, at_once: bool = False) -> RowPrograms:
    """Write row programs for the heads of a graph whose logits are still used, in place; `at_once` one for all of them, or none."""
    heads, through = _heads(found, policy), []
    for node, view in heads.items():
        heads[node], more = unscaled(view, heads)
        through += more
    outcome = _either_way(gm, found, policy, undo, heads, at_once)
    erase_unused(gm.graph, through)
    return outcome


def _either_way(
    gm: GraphModule, found: Trace, policy: Policy, undo: Undo, heads: dict[Node, LogitsView], at_once: bool
) -> RowPrograms:
    other_way = {node: view for node, head in heads.items() if is_better_turned(head) and (view := turned(head))}
    if heads and len(other_way) == len(heads):
        outcome = _cut(gm, found, policy, undo, other_way, at_once)
        if outcome.cuts:
            return outcome
    return _cut(gm, found, policy, undo, heads, at_once)


def _cut(
    gm: GraphModule, found: Trace, policy: Policy, undo: Undo, heads: dict[Node, LogitsView], at_once: bool
) -> RowPrograms:
    numbers = Numbers(reading=0)
    region = region_of(gm.graph, heads, found, numbers)
    for node, why in region.refused.items():
        _log.debug("not in a row program: %s, %s", node.name, why)
    outcome = RowPrograms(refused=[Decline(why, n, region.refused[n]) for n, why in region.reasons.items()])
    if not region.exits or (at_once and not _has_all(region, heads, found)):
        return outcome
    try:
        other = region_of(gm.graph, heads, found, Numbers(reading=1)) if numbers.given else None
        undo.remember()
        groups = write(gm, region, policy, other, at_once)
    except (NotByRows, WouldGuard) as refusal:
        _log.debug("no row program: %s", refusal)
        if type(refusal) in REASONS:
            outcome.refused.append(Decline(REASONS[type(refusal)], region.exits[0].node, str(refusal)))
        return outcome
    erase(gm, region)
    joints = _joined(gm, [call for *_, call in groups], found)
    early = {
        joint: makes_grads_in_forward(policy.strategy, "mean", value_of(joint.hidden[0]).dtype)
        and make_gradients_in_forward(gm, joint)
        for joint in dict.fromkeys(joints.values())
    }
    for emitted, exits, call in groups:
        used = {h: region.heads[h] for h in emitted.heads}
        outcome.cuts.append(Cut(emitted, tuple(exits), used, early[joints[call]]))
    gm.graph.lint()
    gm.recompile()
    outcome.within = {*region.inside, *(e.node for e in region.exits)}
    return outcome


def _joined(gm: GraphModule, calls: list[Node], found: Trace) -> dict[Node, Joint]:
    """What calls of programs became: those that differ in nothing but their rows are joined, where they can be."""
    joints = {}
    for group in grouped(calls, alike):
        joint = join(gm, group, found.transformed)
        joints |= {call: joint or alone(call) for call in group}
    return joints


def _has_all(region: Region, heads: dict[Node, LogitsView], found: Trace) -> bool:
    """Whether all losses of some heads are in a region."""
    within = {*region.inside, *(e.node for e in region.exits)}
    losses = {c.anchor for c in found.candidates if c.view.linear in heads}
    return heads.keys() <= region.heads.keys() and losses <= within


def rows_of(gm: GraphModule, found: Trace, policy: Policy, node: Node) -> Literal["in order", "moved"] | None:
    """Whether a node's value is made of each row of a graph's logits by itself, so that a row program could begin with it.

    "in order" where the dimensions of its rows are those of the logits, and one more, without rows, comes after them.
    """
    heads = _heads(found, policy)
    value = followed(gm.graph, heads, found, Numbers(reading=0), node) if heads else None
    if value is None:
        return None
    try:
        rows = emit([value]).row_dims
    except NotByRows:
        return None
    dims = [resolved(dim) for dim in value.dims]
    return "in order" if dims and tuple(dims[:-1]) == rows and not rows_in(dims[-1]) else "moved"


# Logits below this many bytes are left to the inner backend, which fuses them: blocks of a few rows cost more than they save.
_SMALLEST = 8 << 20
# Operations that mix the numbers of a row with a weight. A layer before one is a model's own, unless it is far wider than it
# is deep, as a vocabulary is.
_LAYERS = (
    "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "conv1d", "conv2d", "conv3d", "scaled_dot_product_attention",
)  # fmt: skip
_WIDER = 16


def _heads(found: Trace, policy: Policy) -> dict[Node, LogitsView]:
    """The heads with which row programs may begin."""
    return {node: view for node, view in found.heads.items() if _is_head(node, view, policy, found)}


def _is_head(node: Node, view: LogitsView, policy: Policy, found: Trace) -> bool:
    if node in found.transformed or node._erased or not any(u.op != "output" for u in node.users):
        return False
    divided = any(is_sharded(value_of(n)) for operand in view.operands for n in (*operand.nodes, node))
    if divided or illegal_head(view) is not None:
        return False
    classes, width = example_size(view.classes), example_size(view.hidden_size)
    if classes < least_classes(view, policy):
        return False
    size = example_size(row_count(view)) * classes * value_of(node).dtype.itemsize
    if policy.min_vocab is None and size < _SMALLEST:
        return False
    return classes > _WIDER * width or not _is_layer(node, found)


def _is_layer(head: Node, found: Trace) -> bool:
    """Whether another layer reads what is made of a layer's result, number by number.

    A cheap look at sizes, so that the layers of a model are not read as programs.
    """
    large = example_size(found.heads[head].classes) * example_size(row_count(found.heads[head])) // 4
    seen, stack = {head}, [head]
    while stack:
        for user in stack.pop().users:
            value = value_of(user)
            if user in seen or not isinstance(value, Tensor):
                continue
            if canonical(user) in _LAYERS:
                return True
            seen.add(user)
            if example_size(value.numel()) >= large:
                stack.append(user)
    return False
