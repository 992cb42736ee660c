# SPDX-License-Identifier: Apache-2.0
"""How long the pass itself takes, against the size of the graph: `python -m benchmarks compile_time`.

Graphs of a chain of operations with one head and one loss, whose nodes carry example values as Dynamo's do. The chain is
before the head, where the pass has nothing to do with it, or between head and loss, where it becomes a row program. A slope
of 1 on log axes is linear.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, symbolic_trace
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from cce_fx.passes import Policy, fakes
from cce_fx.passes.faults import Undo
from cce_fx.passes.pipeline import apply

N, D, V = 64, 16, 1000
ROWS, CLASSES = 2048, 32000  # of a head with a chain of operations behind it
MOST_BEHIND = 5000


def before(nodes: int) -> GraphModule:
    """About `nodes` operations before a head and its loss."""
    g = Graph()
    x, w, y = (g.placeholder(name) for name in ("x", "w", "y"))
    operations = [(torch.tanh, ()), (torch.mul, (0.5,)), (torch.add, (1.0,)), (torch.Tensor.view, (N, D))]
    for at in range(nodes):
        function, args = operations[at % len(operations)]
        x = g.call_function(function, (x, *args))
    logits = g.call_function(F.linear, (x, w))
    g.output((g.call_function(F.cross_entropy, (logits, y)),))
    return _module(g, [torch.empty(N, D), torch.empty(V, D), torch.zeros(N, dtype=torch.int64)])


# What is done to logits z, each one to three operations, with targets y and weights m of the rows, (N, 1) each.
CHAIN: tuple[Callable[[Tensor, Tensor, Tensor], Tensor], ...] = (
    lambda z, y, m: z * 0.5,
    lambda z, y, m: z.tanh(),
    lambda z, y, m: z - z.amax(-1, keepdim=True),
    lambda z, y, m: z + 1.0,
    lambda z, y, m: z.view(ROWS // 8, 8, CLASSES),
    lambda z, y, m: torch.log_softmax(z, -1),
    lambda z, y, m: z.view(ROWS, CLASSES),
    lambda z, y, m: z * m,
    lambda z, y, m: F.softplus(z),
    lambda z, y, m: z / z.sum(-1, keepdim=True),
    lambda z, y, m: torch.where(z > 0.1, z, 0.0),
    lambda z, y, m: z.softmax(-1),
    lambda z, y, m: z - z.gather(-1, y),
    lambda z, y, m: z.clamp(-5, 5),
    lambda z, y, m: z * z.mean(-1, keepdim=True),
    lambda z, y, m: z.float(),
)


def behind(nodes: int) -> GraphModule:
    """About `nodes` operations of many kinds between a head and its loss."""

    def loss(x: Tensor, w: Tensor, y: Tensor, m: Tensor) -> Tensor:
        z, y, m, at = F.linear(x, w), y[:, None], m[:, None], 0
        while len(z.node.graph.nodes) < nodes:  # type: ignore[attr-defined]
            z, at = CHAIN[at % len(CHAIN)](z, y, m), at + 1
        return z.reshape(ROWS, CLASSES).square().sum(-1).mean()

    with FakeTensorMode():
        head = [torch.empty(size, D, requires_grad=True) for size in (ROWS, CLASSES)]
        inputs = [*head, torch.empty(ROWS, dtype=torch.int64), torch.empty(ROWS)]
    return _module(symbolic_trace(loss).graph, inputs)


def _module(g: Graph, inputs: list[Tensor]) -> GraphModule:
    with _use_lazy_graph_module(True):  # as Dynamo makes them: source is generated when somebody runs it
        gm = _make_graph_module(torch.nn.Module(), g)
    fakes.ensure(gm, inputs)
    return gm


def seconds(make: Callable[[int], GraphModule], nodes: int, rounds: int) -> float:
    """The median time of the pass over a graph of that size."""
    found = []
    for _ in range(rounds):
        gm = make(nodes)
        begin = time.perf_counter()
        report, _ = apply(gm, Policy(), Undo(gm))
        found.append(time.perf_counter() - begin)
        assert len(report.rewritten) == 1
    return statistics.median(found)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks compile_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", default="1000,2000,5000,10000,20000,50000")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args(arguments)
    sizes = [int(x) for x in args.nodes.split(",")]
    for make in (before, behind):
        seconds(make, 100, 1)
        table = Table(title=f"Time of the pass, operations {make.__name__} the head")
        for name in ("nodes", "median", "us a node", "slope"):
            table.add_column(name, justify="right")
        last: tuple[int, float] | None = None
        for nodes in sizes if make is before else [size for size in sizes if size <= MOST_BEHIND]:
            time_of = seconds(make, nodes, args.rounds)
            slope = "" if last is None else f"{math.log(time_of / last[1]) / math.log(nodes / last[0]):.2f}"
            table.add_row(f"{nodes:,}", f"{time_of * 1e3:.1f} ms", f"{time_of / nodes * 1e6:.1f}", slope)
            last = nodes, time_of
        Console().print(table)
