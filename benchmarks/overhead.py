# SPDX-License-Identifier: Apache-2.0
"""What cce_fx costs whatever the size of the problem: in a call, in a compilation and in an import.

    python -m benchmarks overhead --json out/overhead.json

A call: one training step, or one evaluation, of a model so small that nothing but fixed costs is left, beside inductor's,
with logits that are returned (and lazy) and without. "without the kernel" has empty results in the place of the kernel's, so
that what is left is the wrapper, the operator and the lazy logits. A compilation: the first call of a small model, in a
process and with caches of its own. An import: in a process of its own, beyond `import torch`; and how many modules it loads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks.store import Row, Store, describe
from benchmarks.tables import View, ratio, time_text
from cce_fx import op
from cce_fx.kernels.combine import statistics_dtype
from cce_fx.kernels.spec import Grads, Needs, Problem, RowGrads, Stats

N, D, V = 8, 8, 64
BACKENDS = {"inductor": {}, "cce": {"options": {"min_vocab": 0}}}
# What is imported, and after what: torch.compile imports Dynamo and inductor whatever the backend.
IMPORTS = {
    "cce_fx": "torch",
    "cce_fx.functional": "torch",
    "cce_fx.backend": "torch._inductor.compile_fx",
}


class Tiny(nn.Module):
    """A linear layer, a head and a loss; with the logits, where they are wanted."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.body, self.head, self.logits = nn.Linear(D, D), nn.Linear(D, V, bias=False), logits

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        z = self.head(self.body(x).relu())
        loss = F.cross_entropy(z, y)
        return (loss, z) if self.logits else (loss,)


def calls(backend: str, logits: bool) -> dict[str, Callable[[], object]]:
    """A training step and an evaluation of the compiled model, both compiled already."""
    torch.manual_seed(0)
    model, x, y = Tiny(logits), torch.randn(N, D), torch.randint(V, (N,))
    run = torch.compile(model, backend=backend, **BACKENDS[backend])

    def step() -> None:
        run(x, y)[0].backward()
        for p in model.parameters():
            p.grad = None

    def evaluate() -> None:
        with torch.no_grad():
            run(x, y)

    step()
    evaluate()
    return {"step": step, "evaluation": evaluate}


def _empty_stats(p: Problem) -> Stats:
    rows = (p.hidden.new_empty(p.hidden.shape[0], dtype=statistics_dtype(p.hidden.dtype)) for _ in range(4))
    nll, lse, highest, sumexp = rows
    top = torch.empty_like(p.target) if p.top else None
    return Stats(nll, lse, nll.new_empty(0), highest, sumexp, top)


def _empty_grads(p: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
    return _empty_stats(p), Grads(torch.empty_like(p.hidden), torch.empty_like(p.weight), None)


@contextlib.contextmanager
def no_kernel() -> Iterator[None]:
    """Results that nobody computed in the place of the kernel's."""
    kernel = SimpleNamespace(forward=_empty_stats, forward_backward=_empty_grads)
    with mock.patch.object(op, "choose", lambda problem: kernel):
        yield


def per_call(run: Callable[[], object], repeat: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeat):
        run()
    return (time.perf_counter() - begin) / repeat


def measure_calls(rounds: int, repeat: int) -> list[Row]:
    """Seconds of a call by each backend; cce's with its kernel and without."""
    runs: dict[tuple[str, str, bool], Callable[[], object]] = {}
    for logits in (False, True):
        for backend in BACKENDS:
            runs |= {(what, backend, logits): run for what, run in calls(backend, logits).items()}
    found: dict[tuple[str, str, bool], list[float]] = {}
    for _ in range(rounds):
        for (what, backend, logits), run in runs.items():
            found.setdefault((what, backend, logits), []).append(per_call(run, repeat))
            if backend == "cce":
                with no_kernel():
                    bare = (what, "cce without the kernel", logits)
                    found.setdefault(bare, []).append(per_call(run, repeat))
    return [
        {
            "part": "call",
            "what": f"{what}, logits {'returned' if logits else 'not returned'}",
            "name": name,
            "seconds": times,
        }
        for (what, name, logits), times in found.items()
    ]


COMPILE = """
import json, sys, time
import torch
from benchmarks.overhead import BACKENDS, N, D, V, Tiny
backend = sys.argv[1]
import torch._inductor.compile_fx
model, x, y = Tiny(False), torch.randn(N, D), torch.randint(V, (N,))
begin = time.perf_counter()
torch.compile(model, backend=backend, **BACKENDS[backend])(x, y)[0].backward()
print(json.dumps(time.perf_counter() - begin))
"""

IMPORT = """
import importlib, json, sys, time
name, first = sys.argv[1].split()
import torch
importlib.import_module(first)
before, begin = set(sys.modules), time.perf_counter()
importlib.import_module(name)
print(json.dumps([time.perf_counter() - begin, len(set(sys.modules) - before)]))
"""


def child(code: str, argument: str) -> object:
    """What a program printed, run in a process and with compilation caches of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder, "PYTHONPATH": root}
        command = [sys.executable, "-c", code, argument]
        out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    return json.loads(out.strip().splitlines()[-1])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks overhead", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="call,compile,import")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=300, help="calls in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    console, store = Console(), Store("overhead", args.json)
    console.print(describe(store.about))
    parts = args.parts.split(",")
    if "call" in parts:
        with console.status("calls"):
            store.replace(measure_calls(args.rounds, args.repeat), part="call")
    children = [("compile", COMPILE, name) for name in BACKENDS] + [
        ("import", IMPORT, f"{name} {first}") for name, first in IMPORTS.items()
    ]
    found: dict[tuple[str, str], list[object]] = {}
    for _ in range(args.rounds):
        for part, code, name in children:
            if part in parts:
                with console.status(f"{part} {name}"):
                    found.setdefault((part, name), []).append(child(code, name))
                store.replace([_row(part, name, found[part, name])], part=part, name=name)
    for view in views(store.rows):
        console.print(view.rich())


def _row(part: str, name: str, values: list[object]) -> Row:
    if part == "compile":
        return {"part": part, "name": name, "seconds": values}
    seconds, modules = zip(*values, strict=True)
    return {"part": part, "name": name, "seconds": list(seconds), "modules": modules[-1]}


def views(rows: list[Row]) -> list[View]:
    """A table of each part that there is."""
    found = []
    calls = [r for r in rows if r["part"] == "call"]
    lines = []
    for r in calls:
        base = next(b for b in calls if b["what"] == r["what"] and b["name"] == "inductor")
        over = statistics.median(a - b for a, b in zip(r["seconds"], base["seconds"], strict=True))
        lines.append((f"{r['what']}: {r['name']}", time_text(r["seconds"]), f"{over * 1e6:.0f} us"))
    found.append(View(f"A call at N={N}, D={D}, V={V}", ("", "time", "over inductor"), tuple(lines)))
    compiles = [r for r in rows if r["part"] == "compile"]
    base_times = next((r["seconds"] for r in compiles if r["name"] == "inductor"), [])
    lines = [(r["name"], time_text(r["seconds"]), f"{ratio(r['seconds'], base_times):.2f}") for r in compiles]
    found.append(View("The first step, compilation included", ("", "time", "/ inductor"), tuple(lines)))
    imports = [r for r in rows if r["part"] == "import"]
    lines = [("{}, after {}".format(*r["name"].split()), time_text(r["seconds"]), str(r["modules"])) for r in imports]
    found.append(View("Imports", ("", "time", "modules"), tuple(lines)))
    return [view for view in found if view.rows]
