# SPDX-License-Identifier: Apache-2.0
"""Block shapes of the GPU's kernels by time, for the card at hand.

    python -m benchmarks tune --minutes 8 --out out

For each use of a tile (see `kernels/triton/machines.py`) and each shape of problem, candidates are timed in interleaved
rounds, the machine's own first. Candidates are those that `python -m benchmarks screen` found on paper to spill nothing and
to fit, in order of their density; without such a file, a few variations of the machine's own. Every number is written to
`<out>/<card>_tune.json` at once; a run that is started again goes on where it was. At the end the winners are printed
as a row of `machines.py`. `--device cpu` tries the program in Triton's interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.candidates import inputs
from benchmarks.gpu import chosen_device
from benchmarks.measure import Budget, OutOfTime, interleaved
from benchmarks.store import Row, Store, describe, gpu_machine, slug
from benchmarks.tables import View, time_text
from cce_fx.kernels.spec import Epilogue, Needs, Norm, Partials, Problem, RowGrads
from cce_fx.kernels.triton import chunked, recompute, rows, sweep, tiles, tma
from cce_fx.kernels.triton.cost import make_plan
from cce_fx.kernels.triton.head import Head, make_head
from cce_fx.kernels.triton.machines import Config, Fused, Tile

SHAPES = "8192:2304:256000,8192:4096:128256"  # the paper's and Llama 3's
Shape = Tile | Fused


def _sweep(head: Head) -> Callable[[], object]:
    return lambda: sweep.run(head, Partials)


def _logits(head: Head) -> Callable[[], object]:
    """One span of the gradient of logits, as wide as the plan has it, in the layout that BLAS takes."""
    found, width = _rows(head), make_plan(head, Needs(), "chunked").width
    if head.config.logits.tma:
        found = tma.pack(head, found)
    by_row = head.machine.backend == "cuda"
    workspace = tiles.make_scratch(head, head.n, width, by_row, False, None)
    return lambda: tiles.write_gradient(head, found, workspace, None, 0, 0, min(width, head.v))


def _product(head: Head) -> Callable[[], object]:
    found, plan = _rows(head), make_plan(head, Needs(), "chunked", products="triton")
    small = replace(head.problem, weight=head.problem.weight[: plan.width])
    return lambda: chunked.chunked(replace(head, problem=small), found, Needs(), plan)


def _fused(head: Head) -> Callable[[], object]:
    found = _rows(head)
    return lambda: recompute.recompute(head, found, Needs())


def _rows(head: Head) -> rows.Rows:
    ones = torch.ones(head.n, dtype=head.dtype, device=head.problem.hidden.device)
    return rows.select(head.problem, Norm(30 * ones, ones), RowGrads(ones / head.n))


# By the names of `machines.Config`: what runs it, whether the tiles of logits are heavy, and rows of the problem.
USES: dict[str, tuple[Callable[[Head], Callable[[], object]], str, int]] = {
    "sweep": (_sweep, "", 8192),
    "logits": (_logits, "", 8192),
    "heavy": (_sweep, "softcap", 8192),
    "product": (_product, "", 8192),
    "weighted": (_sweep, "weighted", 8192),
    "fused": (_fused, "", 1024),
    "heavy_fused": (_fused, "softcap", 1024),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", default=SHAPES, help=f"N:D:V, separated by commas; default: {SHAPES}")
    parser.add_argument("--uses", default=",".join(USES), help=f"default: {','.join(USES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--candidates", type=Path, help="a file of `python -m benchmarks screen`")
    parser.add_argument("--most", type=int, default=12, help="candidates for each use; default: 12")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, help="stop after that time; default: when everything is measured")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a candidate's first call")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    args = parser.parse_args(arguments)
    device = chosen_device(args.device)
    about, console, budget = gpu_machine(device), Console(width=160), Budget(args.minutes)
    store = Store("tune", args.out / f"{slug(about)}_tune.json", about=about)
    console.print(describe(about))
    known = {} if args.candidates is None else json.loads(args.candidates.read_text())["rows"]
    try:
        for text in args.shapes.split(","):
            for use in args.uses.split(","):
                key = {"shape": text, "dtype": args.dtype, "use": use}
                with console.status(f"{text}, {use}"):
                    measure(store, key, known, args, device, budget)
                console.print(view(store.rows, **key).rich())
    except OutOfTime:
        console.print("the time is up; the same command goes on from here")
    if store.rows:
        console.print(config_text(store.rows, args.dtype, device), markup=False)
    console.print(f"written: {store.path}")


def measure(store: Store, key: Row, known: Any, args: argparse.Namespace, device: str, budget: Budget) -> None:
    """Time the candidates of one use and shape of problem that the store lacks."""
    head = make_head(problem(key, device))
    own = head.machine.config(head.problem.hidden.dtype)
    candidates = list(dict.fromkeys([getattr(own, key["use"]), *proposed(own, key["use"], head, known)]))[: args.most]
    done = {r["tile"] for r in store.find(**key) if r["note"] or len(r["seconds"]) >= args.rounds}
    runs = {}
    for tile in (t for t in candidates if repr(t) not in done):
        row: Row = {**key, "tile": repr(tile), "values": asdict(tile), "note": "", "seconds": []}
        try:
            with budget.limited(args.limit):
                run = USES[key["use"]][0](head.using(with_tile(own, key["use"], tile)))
                run()
        except OutOfTime:
            raise
        except Exception as failure:  # a shape that does not fit, or that the compiler cannot make
            row["note"] = type(failure).__name__
            store.replace([row], **key, tile=repr(tile))
            continue
        runs[repr(tile)] = row, run

    def keep(times: dict[str, list[float]]) -> None:
        for tile, seconds in times.items():
            store.replace([{**runs[tile][0], "seconds": [round(s, 8) for s in seconds]}], **key, tile=tile)
        budget.check()

    interleaved({tile: run for tile, (_, run) in runs.items()}, args.rounds, device, after=keep)


def problem(key: Row, device: str) -> Problem:
    """A problem of the shape, with what makes the tiles of logits heavy where the use is of such."""
    n, d, v = (int(x) for x in key["shape"].split(":"))
    _, kind, most = USES[key["use"]]
    hidden, weight, target = inputs(min(n, most), d, v, getattr(torch, key["dtype"]), device, logits="random")
    weights = torch.ones(v, device=device) if kind == "weighted" else None
    cap = 30.0 if kind == "softcap" else None
    return Problem(
        hidden.detach(), weight.detach(), None, target, Epilogue(softcap=cap), smooth=weights is not None,
        class_weight=weights,
    )  # fmt: skip


def with_tile(config: Config, use: str, tile: Shape) -> Config:
    """The configuration in which the kernels of a use run with `tile`."""
    place = {"heavy": "sweep", "weighted": "sweep", "heavy_fused": "fused"}.get(use, use)
    return replace(config, **{place: tile, use: tile})


def proposed(config: Config, use: str, head: Head, known: Any) -> list[Shape]:
    """Candidates from a file, or variations of the machine's own: other warps, stages, depth, and tensor descriptors."""
    listed = [
        shape_of(r["values"])
        for r in known
        if r["good"] and (r["arch"], r["use"]) == (head.machine.arch, use) and head.problem.hidden.element_size() == 2
    ]
    if listed:
        return listed
    own = getattr(config, use)
    found = [replace(own, stages=s) for s in (own.stages - 1, own.stages + 1) if s > 0]
    found += [replace(own, warps=w) for w in (4, 8) if w != own.warps]
    if isinstance(own, Tile) and use in ("sweep", "logits", "heavy", "weighted"):
        found.insert(0, replace(own, tma=True))
    return found


def shape_of(values: dict[str, Any]) -> Shape:
    return (Tile if "rows" in values else Fused)(**values)


def view(rows: list[Row], **key: Any) -> View:
    """The candidates of one use at one shape, the fastest first."""
    chosen = [r for r in rows if all(r[name] == value for name, value in key.items())]
    chosen.sort(key=lambda r: statistics.median(r["seconds"]) if r["seconds"] else float("inf"))
    lines = [(r["tile"], time_text(r["seconds"]) if r["seconds"] else "-", r["note"]) for r in chosen]
    return View("{use}, N:D:V = {shape}, {dtype}".format(**key), ("", "time", ""), tuple(lines))


def views(rows: list[Row]) -> list[View]:
    keys = dict.fromkeys((r["use"], r["shape"], r["dtype"]) for r in rows)
    return [view(rows, use=use, shape=shape, dtype=dtype) for use, shape, dtype in keys]


def winners(rows: list[Row], dtype: str) -> dict[str, Shape]:
    """For each use the shape whose times, over those of the fastest at each problem, are the least in the mean."""
    found: dict[str, dict[str, list[float]]] = {}
    for key in dict.fromkeys((r["use"], r["shape"]) for r in rows if r["dtype"] == dtype):
        timed = [r for r in rows if (r["use"], r["shape"], r["dtype"]) == (*key, dtype) and r["seconds"]]
        best = min((statistics.median(r["seconds"]) for r in timed), default=0.0)
        for r in timed:
            found.setdefault(r["use"], {}).setdefault(r["tile"], []).append(statistics.median(r["seconds"]) / best)
    values = {r["tile"]: shape_of(r["values"]) for r in rows}
    out = {}
    for use, ratios in found.items():
        most = max(map(len, ratios.values()))  # those timed at every problem
        complete = {tile: statistics.mean(x) for tile, x in ratios.items() if len(x) == most}
        out[use] = values[min(complete, key=lambda tile: complete[tile])]
    return out


def config_text(rows: list[Row], dtype: str, device: str) -> str:
    """The winners as a row of `machines.py`; a use that was not timed keeps the machine's own."""
    from cce_fx.kernels.triton.device import machine_of

    own, found = machine_of(torch.device(device)).config(getattr(torch, dtype)), winners(rows, dtype)
    shapes = {f.name: found.get(f.name, getattr(own, f.name)) for f in fields(Config)}
    lines = [f"    {name}={short(shape)}," for name, shape in shapes.items() if shape is not None]
    return "\n".join(["Config(", *lines, ")"])


def short(shape: Shape) -> str:
    """As `machines.py` writes it: `Tile(128, 256, 64, 8, 3, tma=True)`."""
    named = {f.name: getattr(shape, f.name) for f in fields(shape) if f.default is not MISSING}
    sizes = [str(v) for name, v in asdict(shape).items() if name not in named]
    others = [f"{f.name}={named[f.name]}" for f in fields(shape) if f.name in named and named[f.name] != f.default]
    return f"{type(shape).__name__}({', '.join([*sizes, *others])})"
