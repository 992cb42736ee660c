# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the GPU kernels, and what a roofline says of them: `python -m benchmarks static_gpu --help`.

Needs no GPU: every kernel of one training pass is compiled ahead of time for each architecture, with the arguments of the
given shape, beside the kernels of cut-cross-entropy and liger-kernel where those are installed. Nothing here is a
measurement of time. `registers` are per thread, `spills` and `shared` in bytes, `programs` how many fit on one
multiprocessor, `tensor` the tensor-core instructions in the whole kernel, `density` the flops that these do for each
instruction that a warp issues in the innermost loops with any, `bare` how many innermost loops have none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.passes import Pass, apple, bfloat16_problem, liger, ours
from benchmarks.roofline import work_of
from benchmarks.store import Row, Store, describe
from benchmarks.tables import View
from cce_fx.kernels.spec import Epilogue, Problem
from cce_fx.kernels.triton import aot
from cce_fx.kernels.triton.device import Launch
from cce_fx.kernels.triton.machines import BY_ARCH, MACHINES, Machine

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
CARDS = ("A100", "H100", "H200", "B200", "MI300X")


@dataclass(frozen=True)
class Kernel:
    """One kernel on one architecture. Flops and bytes are of one launch, per logit (N V of them)."""

    arch: str
    implementation: str
    kernel: str
    launches: int
    registers: int
    spills: int
    shared: int
    programs: int
    tensor: str
    density: float
    loops: int
    bare: int
    flops: float
    memory: float
    cache: float


def kernels(made: Pass) -> dict[str, tuple[Launch, int]]:
    """The largest launch of each kernel, and how many there are of it."""
    found: dict[str, tuple[Launch, int]] = {}
    for launch in made.launches:
        name = launch.kernel.__name__
        best, count = found.get(name, (launch, 0))
        found[name] = (max(best, launch, key=lambda x: x.grid[0]), count + 1)
    return found


def rows(made: Pass, machine: Machine, logits: float) -> list[Kernel]:
    out = []
    for name, (launch, count) in kernels(made).items():
        r, work = aot.compile_for(launch, machine), work_of(launch)
        tensor = ", ".join(f"{n} {kind}" for kind, n in r.tensor_core.items())
        out.append(
            Kernel(machine.arch, made.name, name, count, r.registers, r.spills, r.shared, r.programs, tensor, r.density,
                r.loops, r.bare, work.flops / logits, work.memory / logits, work.cache / logits)
        )  # fmt: skip
    return out


def implementations(problem: Problem, machine: Machine) -> list[Pass]:
    """This project's default, its pass without scratch memory, and the peers that are installed."""
    found = [ours(problem, machine), ours(problem, machine, "recompute"), apple(problem), liger(problem)]
    if machine.through_tma() is not machine:
        found.insert(1, ours(problem, machine, tma=True))
    return [x for x in found if x is not None]


def kernel_view(table: list[Row], shape: str) -> View:
    """Every kernel of the rows, which are of one shape."""
    names = ("kernel", "launches", "registers", "spills", "shared", "programs", "tensor", "loops", "bare")
    lines = []
    for r in table:
        values = [f"{r['arch']}, {r['implementation']}", *(str(r[name]) for name in names), f"{r['density']:.0f}"]
        lines.append((*values, *(f"{r[name]:.3g}" for name in ("flops", "memory", "cache"))))
    columns = ("", *names, "density", "flop/logit", "memory B/logit", "cache B/logit")
    return View(f"Kernels at N,D,V = {shape}, bfloat16", columns, tuple(lines))


def roofline(problem: Problem) -> list[Row]:
    """Seconds, products of 2 N D V flops and scratch bytes of a whole pass, on each card."""
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    out = []
    for card in CARDS:
        machine = MACHINES[card]
        for made in implementations(problem, machine):
            works = made.works(problem.hidden.element_size())
            out.append(
                {
                    "card": card,
                    "implementation": made.name,
                    "seconds": made.seconds(machine, problem.hidden.dtype),
                    "products": sum(w.flops for w in works) / (2 * n * d * v),
                    "memory": sum(w.memory for w in works),
                    "scratch": made.scratch,
                }
            )
    return out


def roofline_view(found: list[Row], shape: str) -> View:
    lines = tuple(
        (
            f"{r['card']}, {r['implementation']}", f"{r['seconds'] * 1e3:.1f} ms", f"{r['products']:.2f}",
            f"{r['memory'] / 1e9:.1f} GB", f"{r['scratch'] / 2**20:.0f} MiB",
        )
        for r in found
    )  # fmt: skip
    columns = ("", "time", "products", "memory traffic", "scratch")
    return View(f"Forward and backward by the roofline, N,D,V = {shape}, bfloat16", columns, lines)


def page_views(rows: list[Row]) -> list[View]:
    """For a page: the kernels that multiply, with what tells most of them, and the roofline."""
    lines = []
    for r in (r for r in rows if r["table"] == "kernels" and r["tensor"]):
        shared, bare = f"{r['shared'] // 1024}", f"{r['bare']} of {r['loops']}"
        values = (r["registers"], r["spills"], shared, r["tensor"], f"{r['density']:.0f}", bare)
        lines.append((f"{r['arch']}, {r['implementation']}", f"`{r['kernel']}`", *map(str, values)))
    shape = rows[0]["shape"]
    names = ("kernel", "registers", "spilled bytes", "shared KiB", "tensor-core instructions", "density", "bare loops")
    view = View(f"N,D,V = {shape}, bfloat16", ("", *names), tuple(lines))
    return [view, roofline_view([r for r in rows if r["table"] == "roofline"], shape)]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks static_gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="8192,2304,256000", help="N,D,V; default: the paper's, Gemma 2 2B")
    parser.add_argument("--softcap", type=float, help="with a softcap of that size")
    parser.add_argument("--arch", action="append", choices=sorted(BY_ARCH), help=f"default: {', '.join(ARCHS)}")
    parser.add_argument("--json", type=Path, help="write both tables there")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    n, d, v = (int(x) for x in args.shape.split(","))
    problem = bfloat16_problem(n, d, v, epilogue=Epilogue(softcap=args.softcap))
    about = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    store, console = Store("static_gpu", args.json, about=about), Console(width=200)
    console.print(describe(about))
    if apple(problem) is None or liger(problem) is None:
        console.print("cut-cross-entropy or liger-kernel is not installed: pip install -e '.[benchmarks]'")
    table = []
    for arch in args.arch or ARCHS:
        machine = BY_ARCH[arch]
        with console.status(f"compiling for {arch}"):
            for made in implementations(problem, machine):
                table += [asdict(r) for r in rows(made, machine, float(n) * v)]
        console.print(kernel_view([r for r in table if r["arch"] == arch], args.shape).rich())
    times = roofline(problem)
    console.print(roofline_view(times, args.shape).rich())
    kinds = {"kernels": table, "roofline": times}
    store.replace([{"table": name, "shape": args.shape, **r} for name, found in kinds.items() for r in found])
