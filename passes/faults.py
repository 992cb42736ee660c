# SPDX-License-Identifier: Apache-2.0
"""What happens when the project itself fails: the graph is put back as it was, and the failure is told and reported.

A failure of the pass is never the program's: what can be compiled without the pass is compiled.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import os
from collections.abc import Iterable, Iterator
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from .report import Declined, Report
from .values import Decline, Reason

# Set by the tests, which want to see failures and not what becomes of them.
RAISED = bool(os.environ.get("CCE_FX_DEBUG"))
_log = logging.getLogger("cce_fx")


class Fault(Exception):
    """A failure of the project's own at a stage of its work, with the nodes that it was at; its cause is what was raised."""

    __cause__: BaseException | None

    def __init__(self, stage: str, nodes: Iterable[Node]) -> None:
        super().__init__(stage)
        self.stage: str = stage
        self.nodes: tuple[Node, ...] = tuple(nodes)

    def original(self) -> BaseException:
        """What was raised, to be raised again: the two are parted, or each would be the other's origin for ever."""
        error = self.__cause__
        assert error is not None
        self.__cause__ = None
        return error


@contextlib.contextmanager
def stage(name: str, *nodes: Node) -> Iterator[None]:
    """Whatever is raised in here is a `Fault` of this stage at these nodes, unless it is one already."""
    try:
        yield
    except Fault:
        raise
    except Exception as error:
        raise Fault(name, nodes) from error


class Undo:
    """The graphs of a module, and of the bodies inside it, as they were before the first change."""

    def __init__(self, gm: GraphModule) -> None:
        self._gm: GraphModule = gm
        self._graphs: list[tuple[GraphModule, _Written]] = []

    def remember(self) -> None:
        """To be called before a change; all but the first call do nothing."""
        if not self._graphs:
            modules = (m for m in self._gm.modules() if isinstance(m, GraphModule))
            self._graphs = [(m, _Written(m.graph)) for m in modules]

    @property
    def changed(self) -> bool:
        """Whether there was a change to undo."""
        return bool(self._graphs)

    def restore(self) -> None:
        """Put them back; nothing where nothing was changed."""
        for module, written in self._graphs:
            module.graph = written.graph()
        self._graphs = []


class _Written:
    """A graph written down, from which it can be made again: that takes ten times as long, and is hardly ever asked for."""

    def __init__(self, graph: Graph) -> None:
        self._empty: Graph = Graph(tracer_cls=graph._tracer_cls)
        self._empty.set_codegen(copy.deepcopy(graph._codegen))
        # Arguments are never changed in place, and other notes are few: Dynamo's of where an input comes from.
        self._nodes: list[tuple[Any, ...]] = [
            (n, n.op, n.target, n.args, n.kwargs, n.name, n.type, copy.copy(n.meta), dict(vars(n))) for n in graph.nodes
        ]

    def graph(self) -> Graph:
        """The graph, with everything that was noted at its nodes."""
        made: dict[Node, Node] = {}
        for old, op, target, args, kwargs, name, kind, meta, noted in self._nodes:
            args, kwargs = map_arg((args, kwargs), made.__getitem__)
            new = made[old] = self._empty.create_node(op, target, args, kwargs, name, kind)
            new.meta = meta
            for key, value in noted.items():
                if key not in vars(new):
                    setattr(new, key, value)
        return self._empty


def failed(fault: Fault, graphs: int = 1) -> Report:
    """Warn of a fault, once, and report it as a decline of each loss that it is about."""
    error = fault.__cause__
    if RAISED:
        raise fault.original()
    what = f"{fault.stage}: {type(error).__name__}: {error}".splitlines()[0]
    declined = [Declined.of(Decline(Reason.INTERNAL, node, what)) for node in fault.nodes]
    places = ", ".join(f"{d.loss} ({d.source})" if d.source else d.loss for d in declined)
    _log.warning(
        "cce_fx failed at %s, and the program runs as it was: %s. See INTERNAL in docs/troubleshooting.md", places, what
    )
    _log.debug("the failure", exc_info=error)
    return Report(declined=declined, graphs=graphs)
