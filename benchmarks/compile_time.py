# SPDX-License-Identifier: Apache-2.0
"""How long the pass itself takes, against the size of the graph: `python -m benchmarks compile_time`.

Graphs of a chain of elementwise operations with one head and one loss at the end, whose nodes carry example values as
Dynamo's do. A slope of 1 on log axes is linear.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _make_graph_module, _use_lazy_graph_module

from cce_fx.passes import Policy, fakes
from cce_fx.passes.faults import Undo
from cce_fx.passes.pipeline import apply

N, D, V = 64, 16, 1000


def graph(nodes: int) -> GraphModule:
    """About `nodes` operations before a head and its loss."""
    g = Graph()
    x, w, y = (g.placeholder(name) for name in ("x", "w", "y"))
    operations = [(torch.tanh, ()), (torch.mul, (0.5,)), (torch.add, (1.0,)), (torch.Tensor.view, (N, D))]
    for at in range(nodes):
        function, args = operations[at % len(operations)]
        x = g.call_function(function, (x, *args))
    logits = g.call_function(F.linear, (x, w))
    g.output((g.call_function(F.cross_entropy, (logits, y)),))
    with _use_lazy_graph_module(True):  # as Dynamo makes them: source is generated when somebody runs it
        gm = _make_graph_module(torch.nn.Module(), g)
    fakes.ensure(gm, [torch.empty(N, D), torch.empty(V, D), torch.zeros(N, dtype=torch.int64)])
    return gm


def seconds(nodes: int, rounds: int) -> float:
    """The median time of the pass over a graph of that size."""
    found = []
    for _ in range(rounds):
        gm = graph(nodes)
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
    table = Table(title="Time of the pass")
    for name in ("nodes", "median", "us a node", "slope"):
        table.add_column(name, justify="right")
    seconds(100, 1)
    before: tuple[int, float] | None = None
    for nodes in (int(x) for x in args.nodes.split(",")):
        time_of = seconds(nodes, args.rounds)
        slope = "" if before is None else f"{math.log(time_of / before[1]) / math.log(nodes / before[0]):.2f}"
        table.add_row(f"{nodes:,}", f"{time_of * 1e3:.1f} ms", f"{time_of / nodes * 1e6:.1f}", slope)
        before = nodes, time_of
    Console().print(table)
