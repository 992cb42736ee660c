# SPDX-License-Identifier: Apache-2.0
"""Curves of time and memory against N and against V, with the slopes of straight lines through them on log axes.

    python -m benchmarks scaling --json out/scaling.json --png out/scaling.png

A slope of 1 in time is linear; a slope of 0 in memory beyond the gradients is constant, which the CPU kernel's is from some 340 MB
of logits on: below, its workspace is a part of them.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.candidates import BARE, Bare, Peer, inputs, peers
from benchmarks.curves import AXES, curve, slope
from benchmarks.measure import interleaved
from benchmarks.peers import first, keep
from benchmarks.pictures import draw_scaling
from benchmarks.store import Row, Store, describe
from benchmarks.tables import View


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", default="4096,8192,16384,32768", help="values of N, with the first of --v-fixed")
    parser.add_argument("--v", default="64000,128000,256000,512000", help="values of V, with --n-fixed")
    parser.add_argument("--n-fixed", type=int, default=2048)
    parser.add_argument("--v-fixed", type=int, default=32000)
    parser.add_argument("--d", type=int, default=256)
    parser.add_argument("--mode", default="train", choices=["train", "eval"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--only", default=f"{BARE[0].name},eager,cce_fx", help="exact names, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--png", type=Path)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console, store = Console(), Store("scaling", args.json)
    console.print(describe(store.about))
    chosen = [x for x in (*BARE, *peers("cpu")) if x.name in args.only.split(",")]
    sizes = [("n", n, args.v_fixed) for n in numbers(args.n)] + [("v", args.n_fixed, v) for v in numbers(args.v)]
    for axis, n, v in sizes:
        key = {"axis": axis, "n": n, "d": args.d, "v": v, "dtype": args.dtype, "mode": args.mode}
        with console.status(f"N={n} D={args.d} V={v}"):
            point(store, key, chosen, args.rounds)
    console.print(view(store.rows).rich())
    if args.png:
        draw_scaling(store.rows, describe(store.about), args.png)


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def point(store: Store, key: Row, chosen: list[Peer | Bare], rounds: int) -> None:
    """Measure every candidate at one size, unless the store has it."""
    if {x.name for x in chosen} <= {
        r["implementation"] for r in store.find(**key) if r["note"] or len(r["seconds"]) >= rounds
    }:
        return
    torch.compiler.reset()  # each size is compiled for itself
    values = inputs(key["n"], key["d"], key["v"], getattr(torch, key["dtype"]))
    rows, runs = {}, {}
    for candidate in chosen:
        rows[candidate.name], run = first(candidate, key["mode"], values)
        if run is not None:
            runs[candidate.name] = run
    keep(store, key, rows, {})
    interleaved(runs, rounds, after=lambda times: keep(store, key, rows, times))


def view(rows: list[Row]) -> View:
    """The slopes."""
    lines = []
    for name in dict.fromkeys(r["implementation"] for r in rows):
        cells = [slope(curve(rows, axis, name, what)) for axis in AXES for what in ("time", "memory")]
        lines.append((name, *("-" if math.isnan(x) else f"{x:.3f}" for x in cells)))
    columns = tuple(f"{what} with {axis.upper()}" for axis in AXES for what in ("time", "memory"))
    return View("Slopes on log axes", ("", *columns), tuple(lines))
