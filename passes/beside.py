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
from .fakes import propagate
from .sharded import has_sharded_head
from .trace import Trace, switched_off, written_between
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
    if not isinstance(value, Tensor) or value.requires_grad or not _of_the_same_rows(reading.view, loss.view):
        return False
    mine, its = reading.loss.epilogue, loss.loss.epilogue
    if reading.result is Result.TOP:
        return _in_the_same_order(mine, its)
    weighted = loss.class_weight is not None and loss.loss.label_smoothing > 0
    return mine == its and not (reading.result is Result.MEAN and weighted)


def tell_likeliest(gm: GraphModule, view: LogitsView) -> Node | None:
    """The likeliest class of each row of some logits, -1 where its target is ignored, by the kernel that was written for a loss
    of theirs; None where there is none.

    On a CPU, where it takes less than can be measured; on a GPU nobody has measured it.
    """
    if value_of(view.linear).device.type != "cpu":
        return None
    for node in gm.graph.nodes:
        loss = node.meta.get("cce_fx_loss")
        if (
            loss is None
            or not _of_the_same_rows(view, loss.view)
            or not _in_the_same_order(view.epilogue, loss.loss.epilogue)
        ):
            continue
        node.args = tells_likeliest(node.args)
        with gm.graph.inserting_after(node):
            top = gm.graph.call_function(operator.getitem, (node, LIKELIEST[node.target]))
        propagate(gm, [node, top], grad=value_of(loss.anchor).requires_grad)
        return top
    return None


def _of_the_same_rows(one: LogitsView, other: LogitsView) -> bool:
    """Whether two views are of one product, with the same rows in the same order, but for their epilogues."""
    if one.linear is not other.linear or one.dtype != other.dtype or one.classes != other.classes:
        return False
    if any(_plain(a) != _plain(b) for a, b in ((one.weight, other.weight), (one.bias, other.bias))):
        return False
    return _rows(one.hidden) == _rows(other.hidden)


def _in_the_same_order(one: Epilogue, other: Epilogue) -> bool:
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
    inputs = [n for operand in loss.view.operands for n in operand.nodes]
    inputs += [n for n in (loss.target, loss.class_weight) if n is not None]
    if any(order.get(n, -1) >= order[place] for n in inputs):
        return None
    return None if written_between(inputs, place, anchor) else place
