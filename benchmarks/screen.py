# SPDX-License-Identifier: Apache-2.0
"""Block shapes that are worth timing, by what the compiler makes of them: `python -m benchmarks screen --help`.

    python -m benchmarks screen --arch sm_90 --json out/sm_90.json

Needs no GPU. Every shape of a grid is compiled ahead of time for the kernels that use it, at the shape of the paper. Those
that spill nothing, fit into shared memory and have no inner loop without a tensor-core instruction are kept, by the bytes that
a tile loads for each of its flops and by their density. `python -m benchmarks tune --candidates` times them. The file is
written after each shape, and a run that is started again goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.passes import bfloat16_problem
from benchmarks.store import Row, Store, describe
from benchmarks.tables import View
from benchmarks.tune import USES, Shape, shape_of, short, with_tile
from cce_fx.kernels.spec import Epilogue, Needs, Norm, Problem, RowGrads
from cce_fx.kernels.triton import aot, backward, forward
from cce_fx.kernels.triton.device import Launch, record
from cce_fx.kernels.triton.machines import BY_ARCH, Fused, Machine, Tile

PAPER = (8192, 2304, 256000)
KERNELS = {
    "sweep": ("_sweep", "_sweep_tma"),
    "heavy": ("_sweep", "_sweep_tma", "_write_gradient", "_write_gradient_tma", "_hold"),
    "weighted": ("_sweep", "_sweep_tma"),
    "logits": ("_write_gradient", "_write_gradient_tma"),
    "product": ("_into_hidden", "_into_weight"),
    "fused": ("_hidden_gradient", "_weight_gradient"),
    "heavy_fused": ("_hidden_gradient", "_weight_gradient"),
}


def grid(use: str, arch: str) -> list[Shape]:
    """All shapes that are tried."""
    if "fused" in use:
        sizes = itertools.product((64, 128), (64, 128), (32, 64), (128, 256), (4, 8), (2, 3))
        return [Fused(*s) for s in sizes]
    described = (False, True) if arch in ("sm_90", "sm_100") and use != "product" else (False,)
    sizes = itertools.product((64, 128, 256), (64, 128, 256), (32, 64), (4, 8), (2, 3, 4), described)
    return [Tile(*s) for s in sizes if s[0] * s[1] >= 128 * 64]


def problem(use: str) -> Problem:
    """The paper's problem, with what makes its tiles heavy where the use is of such."""
    kind = USES[use][1]
    weights = torch.empty(PAPER[2], dtype=torch.float32, device="meta") if kind == "weighted" else None
    cap = 30.0 if kind == "softcap" else None
    return bfloat16_problem(*PAPER, epilogue=Epilogue(softcap=cap), smooth=weights is not None, class_weight=weights)


def launches(machine: Machine, use: str) -> list[Launch]:
    """One launch of each kernel that a use of a tile is of."""
    p, row = problem(use), torch.empty(PAPER[0], dtype=torch.float32, device="meta")
    with record(machine) as found:
        forward(p)
        how = {"strategy": "recompute"} if "fused" in use else {"strategy": "chunked", "products": "triton"}
        backward(p, Norm(row, row), RowGrads(row), Needs(), **how)  # type: ignore[arg-type]
        if use == "logits":
            backward(p, Norm(row, row), RowGrads(row), Needs(), strategy="chunked", products="auto")
    chosen = {(x.kernel.__name__, x.args.get("BY_ROW")): x for x in found if x.kernel.__name__ in KERNELS[use]}
    return list(chosen.values())


def examined(machine: Machine, use: str, shape: Shape) -> Row:
    """What the compiler makes of a shape: the worst of its kernels."""
    config = with_tile(machine.config(torch.bfloat16), use, shape)
    changed = replace(machine, configs={**machine.configs, "16": config})
    row: Row = {"arch": machine.arch, "use": use, "shape": short(shape), "values": asdict(shape), "good": False}
    found = []
    for launch in launches(changed, use):
        try:
            found.append(aot.compile_for(launch, machine))
        except Exception as failure:  # the compiler says no
            return {**row, "note": type(failure).__name__}
        if found[-1].spills or found[-1].shared > machine.shared or found[-1].bare:
            return {**row, "note": f"{launch.kernel.__name__}: {found[-1].spills} bytes spilled"}
    row["good"] = bool(found) and min(r.programs for r in found) > 0
    row["density"] = min(r.density for r in found)
    row["registers"], row["shared"] = max(r.registers for r in found), max(r.shared for r in found)
    return {**row, "programs": min(r.programs for r in found), "note": ""}


def load(values: dict[str, int]) -> float:
    """Numbers that a tile loads for each product of two."""
    rows, cols = (values["rows"], values["cols"]) if "rows" in values else (values["own"], values["other"])
    return 1 / rows + 1 / cols


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks screen", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", required=True, choices=sorted(BY_ARCH))
    parser.add_argument("--uses", default=",".join(USES), help=f"default: {','.join(USES)}")
    parser.add_argument("--most", type=int, default=12, help="shapes that are shown of each use")
    parser.add_argument("--json", type=Path, required=True, help="where to keep the results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*FP_FUSION.*")
    about = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    store, console = Store("screen", args.json, about=about), Console(width=160)
    console.print(describe(about))
    for use in args.uses.split(","):
        done = {r["shape"] for r in store.find(arch=args.arch, use=use)}
        for shape in track([s for s in grid(use, args.arch) if short(s) not in done], use, console, transient=True):
            row = examined(BY_ARCH[args.arch], use, shape)
            store.replace(ordered([*store.find(arch=args.arch, use=use), row]), arch=args.arch, use=use)
        console.print(view(store.rows, args.arch, use, args.most).rich())


def ordered(rows: list[Row]) -> list[Row]:
    """The best first."""
    return sorted(rows, key=lambda r: (not r["good"], load(r["values"]), -r.get("density", 0)))


def view(rows: list[Row], arch: str, use: str, most: int) -> View:
    names = ("density", "registers", "shared", "programs")
    chosen = [r for r in rows if (r["arch"], r["use"]) == (arch, use) and r["good"]][:most]
    lines = tuple((short(shape_of(r["values"])), *(f"{r[name]:.0f}" for name in names)) for r in chosen)
    return View(f"{use} on {arch}", ("", *names), lines)
