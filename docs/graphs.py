# SPDX-License-Identifier: Apache-2.0
"""Draw one loss's graph before and after the rewrite: python docs/graphs.py [picture.svg]

The graphs are Dynamo's and the backend's own, traced with fake tensors, so that nothing is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, Node

from cce_fx import Options
from cce_fx.backend import cut_graph
from cce_fx.passes.report import human_bytes
from cce_fx.passes.values import value_of

BATCH, LENGTH, HIDDEN, VOCAB = 4, 512, 768, 32_000
LOGITS_BYTES = BATCH * LENGTH * VOCAB * 2  # in half precision: anything from here on is as large as logits
PICTURE = Path(__file__).parent / "images" / "graphs.svg"


def causal_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head and the loss of a causal language model, as most programs write them."""
    logits = F.linear(hidden, weight)
    shifted = logits[:, :-1].float()
    return logits, F.cross_entropy(shifted.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))


def box(node: Node) -> str:
    """What is written into a node's box: the operation, its result's shape and bytes."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}::{target._schema.name.split('::')[1]}"
    else:
        name = target if isinstance(target, str) else target.__name__
    name = name.removeprefix("L_").rstrip("_")
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return name
    return f"{name}\n{' x '.join(map(str, value.shape)) or 'one number'}, {human_bytes(value.nbytes)}"


def is_large(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.nbytes >= LOGITS_BYTES


def places_of(graph: Graph) -> dict[Node, tuple[int, int]]:
    """(column, row) of each node: a row below everything that it reads, in the leftmost free column of what it reads."""
    places: dict[Node, tuple[int, int]] = {}
    for node in graph.nodes:
        row = 1 + max((places[n][1] for n in node.all_input_nodes), default=-1)
        column = min((places[n][0] for n in node.all_input_nodes), default=0)
        while (column, row) in places.values():
            column += 1
        places[node] = (column, row)
    return places


def draw(axes: Axes, graph: Graph, title: str, lazy: str = "") -> None:
    """One graph from top to bottom; what is as large as the logits in red, and what is made only if read dashed."""
    places = places_of(graph)
    for node, (column, row) in places.items():
        for source in node.all_input_nodes:
            x, y = places[source]
            between = any((column, at) in places.values() for at in range(y + 1, row)) and x == column
            bend = f"arc3,rad={0.35 if between else 0}"
            arrow = {"arrowstyle": "->", "color": "0.45", "linewidth": 0.8, "connectionstyle": bend}
            axes.annotate("", (column, -row + 0.28), (x, -y - 0.28), arrowprops=arrow, zorder=0)
        ours = isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "cce"
        color = "#f6b3a9" if is_large(node) else "#b9dfb8" if ours else "#eef1f5"
        put(axes, column, row, "returned" if node.op == "output" else box(node), color, "-")
    if lazy:
        put(axes, 1.25, next(at for node, (_, at) in places.items() if node.op == "output"), lazy, "white", "--")
    columns, rows = zip(*places.values(), strict=True)
    axes.set(xlim=(-0.7, max(columns) + 0.6), ylim=(-max(rows) - 0.6, 0.6))
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def put(axes: Axes, column: float, row: int, text: str, color: str, line: str) -> None:
    frame = {"boxstyle": "round,pad=0.35", "facecolor": color, "edgecolor": "0.4", "linestyle": line}
    axes.text(column, -row, text, ha="center", va="center", fontsize=7.5, bbox=frame)


def picture(path: Path) -> None:
    """Trace, draw before, rewrite, draw after, and write the file."""
    # Text as text, and no dates or random names: the same picture is the same file.
    style = {"svg.fonttype": "none", "svg.hashsalt": "cce_fx"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 8), layout="constrained")
        before, after = figure.subplots(1, 2)

        def look(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            draw(before, gm.graph, "before: what Dynamo hands to a backend")
            forward = torch.fx.GraphModule(gm, gm.graph).forward
            cut = cut_graph(gm, inputs, Options())
            assert len(cut.report.rewritten) == len(cut.outputs.lazy) == 1, cut.report
            draw(
                after,
                gm.graph,
                "after: what the inner backend compiles",
                "logits: a LazyLogits,\nmade of hidden and weight if read",
            )
            return forward

        with FakeTensorMode():
            hidden = torch.empty(BATCH, LENGTH, HIDDEN, requires_grad=True)
            weight = torch.empty(VOCAB, HIDDEN, requires_grad=True)
            torch.compile(causal_loss, backend=look)(hidden, weight, torch.empty(BATCH, LENGTH, dtype=torch.int64))
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    picture(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
