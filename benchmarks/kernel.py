# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the CPU kernel alone beside the bare matrix products.

    python -m benchmarks kernel --shapes small,8192:1024:50257 --workspace 16
    python -m benchmarks kernel --shapes small --peak

No compiler and no autograd stand between: this is for work on the kernel. Interleaved in one process; extra memory is the
peak of all allocations beyond the inputs and the gradients, counted exactly. `--peak` shows in its place which part of the
processor's rate of multiply-adds the kernel reaches, and where the rest goes; a time stamp for each phase costs a percent or two.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch._inductor.config
from rich.console import Console

from benchmarks import peak
from benchmarks.candidates import BARE, inputs
from benchmarks.measure import interleaved, peak_bytes
from benchmarks.peers import shapes
from benchmarks.tables import View, bytes_text, ratio, time_text
from cce_fx.kernels import portable
from cce_fx.kernels.choose import choose, prepare
from cce_fx.kernels.native import build
from cce_fx.kernels.native.plan import default_workspace
from cce_fx.kernels.spec import Needs, Problem, RowGrads, Sizes

FLOOR, GEMM = (bare.name for bare in BARE)


def runs_of(problem: Problem, names: list[str]) -> dict[str, tuple[Callable[[], object], int]]:
    """Each run by name, with the bytes of gradients that it leaves."""
    h, w, t = problem.hidden, problem.weight, problem.target
    n, needs = h.shape[0], Needs()
    rows = RowGrads(torch.full((n,), 1 / n, dtype=torch.float64 if h.dtype == torch.float64 else torch.float32))
    grads, kernel = h.nbytes + w.nbytes, choose(problem)
    half = replace(problem, target=t.where(torch.arange(n) % 2 == 0, -100))
    made: dict[str, tuple[Callable[[], object], int]] = {
        "kernel": (lambda: kernel.forward_backward(problem, rows, needs), grads),
        "ignored": (lambda: kernel.forward_backward(half, rows, needs), grads),  # every other row
        "forward": (lambda: kernel.forward(problem), 0),
        "portable": (lambda: portable.forward_backward(problem, rows, needs), grads),
        "recompute": (lambda: kernel.backward(problem, kernel.forward(problem).norm, rows, needs), grads),
    }
    for bare in BARE:
        if bare.name in names:
            made[bare.name] = bare.calls(h, w, t)["train"], 0
    return {name: made[name] for name in names}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks kernel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default="small,4096:1024:50257", help="as of peers")
    parser.add_argument("--runs", default=f"{FLOOR},{GEMM},kernel,forward,ignored,recompute,portable")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workspace", type=float, help="MiB; default: the kernel's")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--avx2", action="store_true", help="compile the kernel as on a processor without AVX-512")
    parser.add_argument("--peak", action="store_true", help="phases of the kernel beside the processor's rate")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    if args.avx2:
        torch._inductor.config.cpp.simdlen = 256  # of inductor's own flags, which would bring it back
        build.FLAGS = (*build.FLAGS, "-mno-avx512f")
    if args.peak:
        build.FLAGS = (*build.FLAGS, "-DPHASES")
    workspace = None if args.workspace is None else int(args.workspace * 2**20)
    prepare(getattr(torch, args.dtype), torch.device("cpu"))
    for name, sizes in shapes(args.shapes).items():
        hidden, weight, target = inputs(*sizes, getattr(torch, args.dtype))
        problem = Problem(hidden.detach(), weight.detach(), None, target, workspace=workspace)
        if args.peak:
            run, _ = runs_of(problem, ["kernel"])["kernel"]
            run()
            Console().print(peak.phases(run, sizes_of(problem), args.rounds).rich())
            continue
        Console().print(measure(name, problem, args.runs.split(","), args.rounds).rich())


def sizes_of(problem: Problem) -> Sizes:
    """What the kernel plans a mean loss by, with the gradients of hidden and weight."""
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    workspace = problem.workspace or default_workspace(n, v, torch.get_num_threads())
    return Sizes(problem.hidden.dtype, n, v, d, hidden=True, weight=True, workspace=workspace)


def measure(name: str, problem: Problem, names: list[str], rounds: int) -> View:
    """The table of one shape; ratios are over the first run."""
    runs = runs_of(problem, names)
    extra = {name: peak_bytes(run) - grads for name, (run, grads) in runs.items()}  # also warms up
    times = interleaved({name: run for name, (run, _) in runs.items()}, rounds)
    lines = [
        (name, time_text(found), f"{ratio(found, times[names[0]]):.3f}", f"{min(found) / min(times[names[0]]):.3f}",
         bytes_text(extra[name]))
        for name, found in times.items()
    ]  # fmt: skip
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    title = f"{name} (N={n}, D={d}, V={v}), {problem.hidden.dtype}, {torch.get_num_threads()} threads, {rounds} rounds"
    return View(title, ("", "time", f"/ {names[0]}", "best / best", "extra memory"), tuple(lines))
