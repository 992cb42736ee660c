# SPDX-License-Identifier: Apache-2.0
"""DTensors: where the pieces of logits lie is no part of what they are."""

from __future__ import annotations

from typing import Any

from ..canonical import arguments, canonical
from ..registry import Call, Outcome, rule
from ..sharded import is_sharded


@rule("redistribute")
def redistribute(call: Call) -> Outcome:
    """DTensor.redistribute(device_mesh, placements): the same values elsewhere."""
    view = call.view()
    _, options = arguments(call.node)
    casts = [options.get(name) for name in ("forward_dtype", "backward_dtype")]
    if view is None or casts != [None, None] or not is_sharded(call.result):
        return None
    return view.at(call.node)


@rule("to_local", "full_tensor")
def to_local(call: Call) -> Outcome:
    """DTensor.to_local() of logits that every process holds as a whole, or full_tensor() of any."""
    view = call.view()
    others, options = arguments(call.node)
    if view is None or options.get("grad_placements") is not None or others:
        return None
    placements: tuple[Any, ...] = getattr(call.value(0, "self"), "placements", ())
    if canonical(call.node) == "to_local" and not all(p.is_replicate() for p in placements):
        return None
    return view.at(call.node) if placements else None
