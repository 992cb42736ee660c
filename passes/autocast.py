# SPDX-License-Identifier: Apache-2.0
"""Autocast in graphs: in which dtype it has a node's products made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch.fx import Graph, Node

from .._torch import enter_autocast, exit_autocast
from .values import value_of


def autocast_of(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts on a device now; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def under(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """The context in which autocast casts to `dtype` on a device, or is off where it is None."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def autocast_at(node: Node, device: torch.device | None = None) -> torch.dtype | None:
    """`autocast_of` a device, by default the node's, at its place: around the graph, or from an entry in it that is not left before."""
    device = value_of(node).device if device is None else device
    entered: list[Node] = []
    for n in node.graph.nodes:
        if n is node:
            break
        name = getattr(n.target, "__name__", "")
        if name == "_enter_autocast" and n.args[0] == device.type:
            entered.append(n)
        elif name == "_exit_autocast" and n.args and n.args[0] in entered:
            entered.remove(n.args[0])  # type: ignore[arg-type]
    if not entered:
        return autocast_of(device)
    given = dict(enumerate(entered[-1].args))  # device, dtype, whether it is on, whether it caches
    if given.get(2) is False:
        return None
    dtype = given.get(1)
    return dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(device.type)


@contextlib.contextmanager
def written_under(graph: Graph, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """What is written into a graph in here runs `under` that dtype; a graph runs without autocast elsewhere."""
    if dtype is None:
        yield
        return
    entry = graph.call_function(enter_autocast, (device.type, dtype, True, None))
    yield
    graph.call_function(exit_autocast, (entry,))
