# SPDX-License-Identifier: Apache-2.0
"""Heads of DTensors: whether their layout is understood, and the nodes that compute their losses.

`torch.distributed.tensor` is loaded where a graph holds a DTensor, and not before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from .canonical import canonical
from .values import Candidate, LogitsView, LossSite, Result, source_line, value_of


def is_sharded(value: Any) -> bool:
    """Whether an example value is a DTensor."""
    return type(value).__name__ == "DTensor" and hasattr(value, "_local_tensor")


def has_sharded_head(view: LogitsView) -> bool:
    return is_sharded(value_of(view.linear))


def refusal(candidate: Candidate) -> str | None:
    """Why a loss on a head of DTensors is left alone, or None."""
    view = candidate.view
    if candidate.result is not Result.LOSS:
        return "a statistic of distributed logits that is not a loss"
    if any(step.name != "t" for step in view.weight.steps):
        return "a weight that is changed on the way to distributed logits"
    placements = getattr(value_of(candidate.anchor), "placements", ())
    if any(p.is_partial() and not p.is_partial("sum") for p in placements):
        return f"a loss placed {placements}: the average of each process's own mean, which is not the mean of all rows"
    from ..distributed.dtensor import spelled

    if spelled(placements) is None:
        return f"a loss placed {placements}"
    layout = _layout(view)
    return layout if isinstance(layout, str) else None


def _layout(view: LogitsView) -> Any:
    """The `Layout` of a head of DTensors, or why it is not understood."""
    from ..distributed.dtensor import layout_of

    return layout_of(value_of(view.hidden.node), value_of(view.weight.node), transposed=bool(view.weight.steps))


def has_divided_classes(view: LogitsView) -> bool:
    """Whether each process holds some of the classes, of a head that is understood."""
    return has_sharded_head(view) and _layout(view).vocab is not None


def division(view: LogitsView) -> tuple[int, int]:
    """Among how many processes the rows and the classes of a head that is understood are divided."""
    if not has_sharded_head(view):
        return 1, 1
    layout = _layout(view)
    rows = math.prod(layout.mesh.size(dim) for dim in layout.rows)
    return rows, 1 if layout.vocab is None else layout.mesh.size(layout.vocab)


def write_loss(site: LossSite, operands: tuple[Any, Any, Any], target: Any, class_weight: Any, workspace: Any) -> Any:
    """The loss in the placement, or as the plain tensor, that the anchor is. All values are proxies."""
    from ..distributed.dtensor import REPLICATED, placed, sharded_loss, spelled

    candidate = site.candidate
    loss, e, was = candidate.loss, candidate.loss.epilogue, value_of(candidate.anchor)
    hidden, weight, bias = operands
    tracer = hidden.tracer
    out = tracer.create_proxy(
        "call_function",
        sharded_loss,
        (hidden, weight, bias, target, class_weight, loss.reduction, loss.ignore_index, loss.label_smoothing),
        {
            "scale": float(e.scale),
            "softcap": e.softcap,
            "post_scale": float(e.post_scale),
            "needs": site.needs,
            "workspace": workspace,
            "reduce_hidden": not _was_placed(candidate.view.hidden.node),
        },
    )
    if is_sharded(was):
        return tracer.create_proxy("call_function", placed, (out, spelled(was.placements)), {})
    mesh = value_of(candidate.view.linear).device_mesh
    return tracer.create_proxy("call_function", placed, (out, (REPLICATED,) * mesh.ndim), {}).to_local()


def _was_placed(node: Node) -> bool:
    """Whether a DTensor comes from a change of placement, whose backward reduces or scatters a `Partial` gradient best."""
    return canonical(node) == "redistribute" or getattr(node.target, "__qualname__", "") == "DTensor.from_local"


def sharded_nodes(view: LogitsView) -> list[Node]:
    """The nodes of a view that are DTensors."""
    return [n for n in (*view.path, *(o.node for o in view.operands)) if is_sharded(value_of(n))]


def agree_on_losses(candidates: Sequence[Candidate], rewritten: set[str], policy: object) -> None:
    """Compare what was decided for each loss on a head of DTensors, over every dimension of its mesh.

    Args:
        candidates: the losses of a graph.
        rewritten: the names of those that were rewritten.
        policy: the options that decided, which have a text.

    Raises:
        RuntimeError: as `cce_fx.distributed.agree.agree`.
    """
    for c in candidates:
        if not has_sharded_head(c.view):
            continue
        from ..distributed.agree import agree

        mesh = value_of(c.view.linear).device_mesh
        mesh = getattr(mesh, "real_obj", mesh)  # inside Dynamo's fake object
        outcome = "cut" if c.anchor.name in rewritten else "not cut"
        choice = f"{outcome}, {c.result.name}, {c.loss}, {policy}"
        what = f"the loss at {source_line(c.anchor) or c.anchor.name} over {c.view.classes} classes"
        for dim in range(mesh.ndim):
            agree(mesh.get_group(dim), what, choice)
