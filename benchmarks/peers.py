# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a head's loss beside the bare matrix products and every other way to compute it.

    python -m benchmarks peers --shapes gpt2,tiny --rounds 5 --json out/peers.json

All implementations run in one process, interleaved, each `--rounds` times: forward and backward ("train"), the forward of a
training step, and the loss without gradients ("eval"). Memory is the peak of all allocations, counted exactly; the bytes of
the gradients, which nobody can do without, are apart. The file is rewritten after every round, and a run that is started
again with the same file goes on where it stopped. One that does not fit into the machine's free memory is left out and says so.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from benchmarks.candidates import BARE, MODES, Bare, Call, Peer, inputs, peers
from benchmarks.measure import free_bytes, interleaved, peak_bytes
from benchmarks.pictures import draw_peers
from benchmarks.store import Row, Store, describe
from benchmarks.tables import View, bytes_text, ratio, time_text

# N, D, V.
SHAPES = {
    "tiny": (64, 64, 1000),
    "small": (2048, 512, 32000),
    "gpt2": (8192, 768, 50257),
    "long": (65536, 256, 32000),
    "recommender": (512, 64, 1_000_000),
    "llama3": (1024, 4096, 128256),
    "gemma2": (2048, 2304, 256000),  # the paper's
}
BASE = BARE[0].name


def shapes(text: str) -> dict[str, tuple[int, int, int]]:
    """Names of `SHAPES`, "all", or N:D:V, separated by commas."""
    chosen = list(SHAPES) if text == "all" else text.split(",")
    found = {}
    for name in chosen:
        sizes = SHAPES.get(name) or tuple(int(x) for x in name.split(":"))
        if len(sizes) != 3:
            raise SystemExit(f"a shape is one of {', '.join(SHAPES)} or N:D:V, not {name!r}")
        found[name] = sizes
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", default="tiny,small", help=f"{', '.join(SHAPES)}, N:D:V, or all; default: tiny,small"
    )
    parser.add_argument("--dtypes", default="float32", help="float32,bfloat16; default: float32")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--only", help="a part of the names of implementations, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--filter-eps", type=lambda x: x if x == "auto" else float(x), help="adds cce_fx with this filter"
    )
    parser.add_argument("--json", type=Path, help="where to keep the results")
    parser.add_argument("--png", type=Path, help="a picture of the results")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    console, store = Console(), Store("peers", args.json)
    console.print(describe(store.about))
    everything = [*BARE, *peers("cpu", args.filter_eps)]
    parts = args.only.split(",") if args.only else [""]
    chosen = [x for x in everything if any(part in x.name for part in parts)]
    for name, sizes in shapes(args.shapes).items():
        for dtype in args.dtypes.split(","):
            measure(store, name, sizes, dtype, chosen, args.modes.split(","), args.rounds, console)
            for mode in args.modes.split(","):
                console.print(view(store.rows, name, dtype, mode).rich())
    if args.png:
        draw_peers(store.rows, describe(store.about), args.png)


def measure(
    store: Store, name: str, sizes: tuple[int, int, int], dtype: str, chosen: list[Peer | Bare], modes: list[str],
    rounds: int, console: Console,
) -> None:  # fmt: skip
    """Fill the store with what is missing of one shape in one dtype, mode by mode."""
    torch.compiler.reset()
    values = inputs(*sizes, getattr(torch, dtype))
    for mode in modes:
        key = {"shape": name, "n": sizes[0], "d": sizes[1], "v": sizes[2], "dtype": dtype, "mode": mode}
        names = {x.name for x in chosen}
        done = {r["implementation"] for r in store.find(**key) if r["note"] or len(r["seconds"]) >= rounds}
        if names <= done:
            continue
        bar = Progress(TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True)
        with bar:
            task = bar.add_task(f"{name} {dtype} {mode}")
            rows, runs = {}, {}
            for candidate in chosen:
                bar.update(task, description=f"{name} {dtype} {mode}: {candidate.name}")
                rows[candidate.name], run = first(candidate, mode, values)
                if run is not None:
                    runs[candidate.name] = run
                store.replace([{**key, **row} for row in rows.values()], **key)
            interleaved(runs, rounds, after=lambda times: keep(store, key, rows, times))  # noqa: B023
        gc.collect()


def keep(store: Store, key: Row, rows: dict[str, Row], times: dict[str, list[float]]) -> None:
    for implementation, seconds in times.items():
        rows[implementation]["seconds"] = [round(s, 7) for s in seconds]
    store.replace([{**key, **row} for row in rows.values()], **key)


def first(candidate: Peer | Bare, mode: str, values: tuple[torch.Tensor, ...]) -> tuple[Row, Call | None]:
    """The first two calls, which compile and count memory; no call where the candidate cannot run."""
    hidden, weight, _ = values
    gradients = sum(x.nbytes for x in (hidden, weight)) if mode == "train" and isinstance(candidate, Peer) else 0
    row: dict[str, Any] = {"implementation": candidate.name, "seconds": [], "peak": None, "gradients": gradients}
    need = 4 * candidate.dense * hidden.shape[0] * weight.shape[0] + hidden.nbytes + weight.nbytes
    if candidate.missing or need > free_bytes():
        missing = candidate.missing or f"needs {bytes_text(need)}, {bytes_text(free_bytes())} are free"
        return {**row, "note": missing}, None
    try:
        run = candidate.calls(*values)[mode]
        run()
        return {**row, "peak": peak_bytes(run), "note": ""}, run
    except Exception as problem:  # one that fails is a result, not the end of the run
        return {**row, "note": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"[:200]}, None


def view(rows: list[Row], shape: str, dtype: str, mode: str) -> View:
    """One table: a line for each implementation."""
    chosen = [r for r in rows if (r["shape"], r["dtype"], r["mode"]) == (shape, dtype, mode)]
    base = next((r["seconds"] for r in chosen if r["implementation"] == BASE), [])
    lines = []
    for r in chosen:
        if not r["seconds"]:
            lines.append((r["implementation"], "-", "-", "-", "-", r["note"]))
            continue
        over = f"{ratio(r['seconds'], base):.3f}" if base else "-"
        extra, gradients = bytes_text(r["peak"] - r["gradients"]), bytes_text(r["gradients"])
        lines.append((r["implementation"], time_text(r["seconds"]), over, extra, gradients, r["note"]))
    n, d, v = (chosen[0][k] for k in "ndv") if chosen else (0, 0, 0)
    what = {"train": "forward and backward", "forward": "forward of a training step", "eval": "loss without gradients"}
    return View(
        f"{shape} (N={n}, D={d}, V={v}), {dtype}, {what[mode]}",
        ("", "time", "/ three products" if mode == "train" else "/ one product", "extra memory", "gradients", ""),
        tuple(lines),
    )
