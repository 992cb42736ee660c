# SPDX-License-Identifier: Apache-2.0
"""What is read of logits beside their loss and has no gradient: it comes out of the loss's own kernel, at no further product.

In comes a site and what `trace` has found; out goes the site with its readings, and the place where all of it is written, which
`rewriter.py` does next. A reading of other rows than the loss's, or before what the loss needs is there, is left to row programs.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import replace

from torch import Tensor
from torch.fx import GraphModule, Node

from ..functional import LIKELIEST, tells_likeliest
from ..kernels.spec import Epilogue
from .canonical import mutated_arguments
from .fakes import propagate
from .sharded import has_sharded_head
from .trace import Trace, storage_of, switched_off
from .values import Candidate, LogitsView, LossSite, Operand, Result, value_of

# Steps that leave rows in their order.
_SAME_ROWS = ("reshape", "unsqueeze", "squeeze", "detach")


def with_readings(site: LossSite, found: Trace, taken: Collection[Node]) -> LossSite:
    """The site with what its kernel can tell besides, but for anchors that are `taken`."""
    loss = site.candidate
    if loss.result is not Result.LOSS or has_sharded_head(loss.view):
        return site
    readings = [r for r in found.readings if r.anchor not in taken and _is_of(r, loss)]
    if not readings:
        return site
    graph = loss.anchor.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    off = switched_off(graph)
    place, accepted = loss.anchor, []
    for reading in readings:
        at = _place(reading.anchor, loss, order, off)
        if at is not None:
            accepted.append(reading)
            place = min(place, at, key=order.__getitem__)
    return replace(site, readings=tuple(accepted), place=place)


def _is_of(reading: Candidate, loss: Candidate) -> bool:
    """Whether a reading has no gradient, and is of the rows and the logits of a loss."""
    value = value_of(reading.anchor)
    if not isinstance(value, Tensor) or value.requires_grad or not of_the_same_rows(reading.view, loss.view):
        return False
    mine, its = reading.loss.epilogue, loss.loss.epilogue
    if reading.result is Result.TOP:
        return with_the_same_order(mine, its)
    weighted = loss.class_weight is not None and loss.loss.label_smoothing > 0
    return mine == its and not (reading.result is Result.MEAN and weighted)


def kernels_of_losses(gm: GraphModule) -> list[tuple[Node, Candidate]]:
    """The operators that were written for losses and can tell the likeliest class of each row at no cost, with the losses.

    Those on a CPU, where it takes less than can be measured; on a GPU nobody has measured it.
    """
    found = [(node, node.meta["cce_fx_loss"]) for node in gm.graph.nodes if "cce_fx_loss" in node.meta]
    return [(node, loss) for node, loss in found if value_of(loss.view.linear).device.type == "cpu"]


def tell_likeliest(gm: GraphModule, node: Node) -> Node:
    """The likeliest class of each row, -1 where its target is ignored, of one of these operators."""
    node.args = tells_likeliest(node.args)
    with gm.graph.inserting_after(node):
        top = gm.graph.call_function(operator.getitem, (node, LIKELIEST[node.target]))
    propagate(gm, [node, top], grad=value_of(node.meta["cce_fx_loss"].anchor).requires_grad)
    return top


def of_the_same_rows(one: LogitsView, other: LogitsView) -> bool:
    """Whether two views are of one product, with the same rows in the same order, but for their epilogues."""
    if one.linear is not other.linear or one.dtype != other.dtype or one.classes != other.classes:
        return False
    if any(_plain(a) != _plain(b) for a, b in ((one.weight, other.weight), (one.bias, other.bias))):
        return False
    return _rows(one.hidden) == _rows(other.hidden)


def with_the_same_order(one: Epilogue, other: Epilogue) -> bool:
    """Whether two epilogues of a product put its classes into the same order."""
    return one.scale * one.post_scale * other.scale * other.post_scale > 0


def _plain(operand: Operand | None) -> Operand | None:
    return None if operand is None else replace(operand, steps=tuple(s for s in operand.steps if s.name != "detach"))


def _rows(hidden: Operand) -> Operand:
    """What tells the rows of a hidden state, and their order."""
    steps = hidden.steps
    while steps and steps[-1].name in _SAME_ROWS:
        steps = steps[:-1]
    return replace(hidden, steps=steps)


def _place(reading: Node, loss: Candidate, order: dict[Node, int], off: dict[Node, Node]) -> Node | None:
    """The node before which the loss stands early enough for a reading, with gradients as at its own place; None where it cannot."""
    anchor = loss.anchor
    if order[reading] > order[anchor]:
        return anchor
    place = reading
    if off.get(reading) is not off.get(anchor):
        if anchor in off:
            return None
        place = off[reading]
    inputs = _inputs(loss.view, loss.target, loss.class_weight)
    if any(order.get(n, -1) >= order[place] for n in inputs):
        return None
    memory = {storage_of(n) for n in inputs} - {None}
    node = place
    while node is not anchor:
        if any(storage_of(n) in memory for n in mutated_arguments(node)):
            return None
        node = node.next
    return place


def _inputs(view: LogitsView, *more: Node | None) -> list[Node]:
    return [*(n for operand in view.operands for n in operand.nodes), *(n for n in more if n is not None)]
