# SPDX-License-Identifier: Apache-2.0
"""The first call of a rewritten graph: where it fails and the graph as it was does not, the failure was the project's.

A first call is also where compiled code is loaded and its assumptions about sizes and strides meet tensors. What it wrote to
and the random numbers that it drew are taken back before the graph as it was runs in its place, compiled anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .passes.faults import Fault, Undo, failed, stage

# What the project raises on purpose, about targets, and what another graph would need more of.
_THE_PROGRAMS = (IndexError, MemoryError, torch.OutOfMemoryError)


def watched(
    compiled: Callable[..., Any],
    gm: GraphModule,
    undo: Undo,
    written: Sequence[int],
    anchors: Sequence[Node],
    inner: Callable[..., Any],
) -> Callable[..., Any]:
    """`compiled`, and from a first call on that fails, what `inner` makes of the graph as it was.

    Args:
        compiled: a rewritten graph, compiled.
        gm: the graph.
        undo: what restores it.
        written: the positions of the inputs that it writes to.
        anchors: the losses that were rewritten, for the warning.
        inner: the backend that compiles the graph as it was, for whatever sizes come.
    """
    run: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal run, compiled, undo, gm
        if run is not None:
            return run(*args)
        before = _Before(args, written)
        try:
            with stage("the first call", *anchors):
                found = compiled(*args)
            run = compiled
        except Fault as fault:
            if isinstance(fault.__cause__, _THE_PROGRAMS) or not before.restored(args):
                raise fault.original() from None
            undo.restore()
            # Compiled by Dynamo once more: outside the frame that captured the graph there are no symbols for its sizes.
            as_it_was = torch.compile(gm, backend=inner)
            found = as_it_was(*args)  # what this raises is not ours
            run = as_it_was
            failed(fault)
        del gm, undo, compiled
        return found

    return call


class _Before:
    """What a call of a graph may change: the inputs that it visibly writes to, versions of all inputs, random numbers."""

    def __init__(self, args: Sequence[Any], written: Sequence[int]) -> None:
        self._copies = {i: args[i].detach().clone() for i in written if isinstance(args[i], Tensor)}
        self._versions = [_version(a) for a in args]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def restored(self, args: Sequence[Any]) -> bool:
        """Put it back; False where an input changed that was not known to be written to."""
        changed = [i for i, (a, version) in enumerate(zip(args, self._versions)) if _version(a) != version]
        if any(i not in self._copies for i in changed):
            return False
        with torch.no_grad():
            for i, copy in self._copies.items():
                args[i].detach().copy_(copy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        return True


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None
