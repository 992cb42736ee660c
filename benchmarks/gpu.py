# SPDX-License-Identifier: Apache-2.0
"""The loss of a head on a GPU, beside its peers.

    python -m benchmarks gpu --minutes 8 --out out

For each shape and kind of logits, the most telling first: errors of loss and gradients against float64 on few rows, peak
memory, and time of forward, backward and both in interleaved rounds. Every number is written to `<out>/<card>.json` as soon
as it is there, so that a run that is cut off loses nothing; started again with the same folder it goes on where it was.
Memory is what is allocated beyond inputs; the gradients' own bytes, which nobody can do without, are apart.
`python -m benchmarks report` makes tables and a picture of the file. `--device cpu` with a small `--shapes` tries it out.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from benchmarks.candidates import BARE, Bare, Loss, Peer, inputs, peers
from benchmarks.measure import Budget, OutOfTime, peak_bytes, stamps
from benchmarks.pictures import bars, save, subplots
from benchmarks.store import Row, Store, describe, gpu_machine, slug
from benchmarks.tables import MIB, View, bytes_text, ratio, time_text

SHAPES = {
    "Gemma 2 2B (the paper's)": (8192, 2304, 256000),
    "Llama 3 8B": (8192, 4096, 128256),
    "Qwen 3 8B": (8192, 4096, 151936),
    "GPT-2": (8192, 768, 50257),
}
# By shape and kind of logits: what tells most comes first.
CASES = [
    ("Gemma 2 2B (the paper's)", "peaked"),
    ("Llama 3 8B", "peaked"),
    ("Gemma 2 2B (the paper's)", "random"),
    ("GPT-2", "peaked"),
    ("Qwen 3 8B", "peaked"),
    ("Llama 3 8B", "random"),
]
ORDER = [
    "three products",
    "cce_fx",
    "cut-cross-entropy, exact",
    "liger-kernel",
    "inductor",
    "cut-cross-entropy",
    "cce_fx, filter_eps=auto",
    "eager",
    "F.linear_cross_entropy",
    "auto_chunker",
    "cce_fx, recompute",
]
TIMES = ("forward", "backward")
Mark = Callable[[], None]
Run = Callable[[Mark], object]


def candidates(device: str) -> list[Peer | Bare]:
    """The implementations in the order in which they are measured."""
    known = {x.name: x for x in (*BARE, *peers(device, "auto"))}
    return [known[name] for name in ORDER]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", help="N:D:V, separated by commas; default: four well-known models")
    parser.add_argument("--logits", default="peaked,random", help="kinds of logits: peaked, trained, random")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--only", help="a part of the names of implementations, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--minutes", type=float, help="stop after that time; default: when everything is measured")
    parser.add_argument("--limit", type=float, default=90, help="seconds for an implementation's first calls")
    parser.add_argument("--device", default="auto", choices=["auto", "cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the results")
    args = parser.parse_args(arguments)
    device = chosen_device(args.device)
    about, console, budget = gpu_machine(device), Console(width=180), Budget(args.minutes)
    store = Store("gpu", args.out / f"{slug(about)}.json", about=about)
    console.print(describe(about))
    parts = args.only.split(",") if args.only else [""]
    chosen = [x for x in candidates(device) if any(part in x.name for part in parts)]
    try:
        for name, sizes, kind in cases(args.shapes, args.logits.split(",")):
            key = {"shape": name, **dict(zip("ndv", sizes, strict=True)), "dtype": args.dtype, "logits": kind}
            measure(store, key, chosen, args.rounds, device, budget, args.limit, console)
            console.print(view(store.rows, **key).rich())
    except OutOfTime:
        console.print("the time is up; the same command goes on from here")
    console.print(f"written: {store.path}")


def chosen_device(wanted: str) -> str:
    """ "cuda" or "cpu". Raises SystemExit where there is no GPU and the CPU was not asked for."""
    if wanted == "cpu" or torch.cuda.is_available():
        return "cpu" if wanted == "cpu" else "cuda"
    raise SystemExit("no GPU: torch.cuda.is_available() is False. `--device cpu --shapes 64:32:500` tries the program.")


def cases(shapes: str | None, kinds: list[str]) -> list[tuple[str, tuple[int, ...], str]]:
    """(name, (N, D, V), kind of logits) of everything that is measured."""
    if shapes is None:
        return [(name, SHAPES[name], kind) for name, kind in CASES if kind in kinds]
    return [(text, tuple(int(x) for x in text.split(":")), kind) for text in shapes.split(",") for kind in kinds]


def measure(
    store: Store, key: Row, chosen: list[Peer | Bare], rounds: int, device: str, budget: Budget, limit: float,
    console: Console,
) -> None:  # fmt: skip
    """Fill the store with what is missing of one case. Raises OutOfTime, with what was measured in the store."""
    rows = {r["implementation"]: r for r in store.find(**key)}
    missing = [x for x in chosen if not complete(rows.get(x.name), rounds)]
    if not missing:
        return
    torch.compiler.reset()
    gc.collect()
    values = inputs(key["n"], key["d"], key["v"], getattr(torch, key["dtype"]), device, 0.1, key["logits"])
    runs = {}
    for candidate in missing:
        with console.status(f"{key['shape']}, {key['logits']}: {candidate.name}"):
            row, run = first(candidate, values, key, device, budget, limit)
        store.replace([{**key, **row}], **key, implementation=candidate.name)
        if run is not None:
            runs[candidate.name] = {**key, **row}, run
    for _ in range(rounds):
        for row, run in runs.values():
            budget.check()
            for name, seconds in zip(TIMES, stamps(run, device), strict=True):
                row[name] = [*row[name], round(seconds, 8)]
        for name, (row, _) in runs.items():
            store.replace([row], **key, implementation=name)


def complete(row: Row | None, rounds: int) -> bool:
    return row is not None and bool(row["note"] or len(row["forward"]) >= rounds)


def first(
    candidate: Peer | Bare, values: tuple[Tensor, ...], key: Row, device: str, budget: Budget, limit: float
) -> tuple[Row, Run | None]:
    """The first calls, which compile, and give errors and memory; no run where the candidate cannot run."""
    row: Row = {"implementation": candidate.name, "note": "", "errors": None, "peak": None, "gradients": 0}
    row |= {name: [] for name in TIMES}
    if candidate.missing:
        return {**row, "note": candidate.missing}, None
    try:
        with budget.limited(limit):
            if isinstance(candidate, Peer):
                row["errors"] = errors(candidate.make(), key, device)
                row["gradients"] = sum(x.nbytes for x in values[:2])
                run = peer_run(candidate.make(), values)
            else:
                run = bare_run(values)
            run(lambda: None)
            row["peak"] = peak_bytes(lambda: run(lambda: None), device)
    except OutOfTime:
        raise
    except Exception as problem:  # a peer that fails is a result, not the end of the run
        torch.cuda.empty_cache()
        text = (str(problem).splitlines() or [""])[0]
        return {**row, "note": f"{type(problem).__name__}: {text}"[:200]}, None
    return row, run


def peer_run(loss: Loss, values: tuple[Tensor, ...]) -> Run:
    hidden, weight, target = values

    def run(mark: Mark) -> object:
        out = loss(hidden, weight, target)
        mark()
        return torch.autograd.grad(out, (hidden, weight))

    return run


def bare_run(values: tuple[Tensor, ...]) -> Run:
    """The product of a forward and the two of a backward, into buffers that are there beforehand."""
    h, w = (x.detach() for x in values[:2])
    logits = h.new_empty(h.shape[0], w.shape[0])
    d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)

    def run(mark: Mark) -> object:
        torch.mm(h, w.T, out=logits)
        mark()
        torch.mm(logits, w, out=d_hidden)
        return torch.mm(logits.T, h, out=d_weight)

    return run


def errors(loss: Loss, key: Row, device: str) -> dict[str, float]:
    """The largest error of each result over its largest value, on at most 256 rows."""
    n = min(key["n"], 256)
    values = inputs(n, key["d"], key["v"], getattr(torch, key["dtype"]), device, 0.1, key["logits"])
    found = _step(loss, *values)
    wide = (x.detach().double().requires_grad_() for x in values[:2])
    exact = _step(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), *wide, values[2])
    names = ("loss", "d_hidden", "d_weight")
    return {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, found, exact, strict=True)
    }


def _step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = loss(hidden, weight, target)
    return (out.detach(), *torch.autograd.grad(out, (hidden, weight)))


def both(row: Row) -> list[float]:
    """Seconds of forward and backward together, round by round."""
    return [f + b for f, b in zip(row["forward"], row["backward"], strict=True)]


def view(rows: list[Row], **key: Any) -> View:
    """One case: a line for each implementation."""
    chosen = [r for r in rows if all(r[name] == value for name, value in key.items())]
    chosen.sort(key=lambda r: ORDER.index(r["implementation"]))
    base = next((both(r) for r in chosen if r["implementation"] == BARE[0].name), [])
    lines = []
    for r in chosen:
        if not r["forward"]:
            lines.append((r["implementation"], *["-"] * 8, r["note"]))
            continue
        times = [time_text(x) for x in (r["forward"], r["backward"], both(r))]
        over = f"{ratio(both(r), base):.3f}" if base else "-"
        memory = bytes_text(r["peak"] - r["gradients"])
        found = [f"{r['errors'][k]:.1e}" if r["errors"] else "-" for k in ("loss", "d_hidden", "d_weight")]
        lines.append((r["implementation"], *times, over, memory, *found, r["note"]))
    title = "{shape} (N={n}, D={d}, V={v}), {dtype}, {logits} logits".format(**key)
    columns = ("", "forward", "backward", "both", "/ three products", "extra memory", "error of loss", "d_hidden")
    return View(title, (*columns, "d_weight", ""), tuple(lines))


def views(rows: list[Row]) -> list[View]:
    """A table for each case in the order of the file."""
    names = ("shape", "n", "d", "v", "dtype", "logits")
    keys = dict.fromkeys(tuple(r[name] for name in names) for r in rows)
    return [view(rows, **dict(zip(names, key, strict=True))) for key in keys]


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Time and memory of each implementation, a row of bars for each case."""
    rows = sorted((r for r in rows if r["forward"]), key=lambda r: ORDER.index(r["implementation"]))
    groups = list(dict.fromkeys((r["shape"], r["dtype"], r["logits"]) for r in rows))
    figure, axes = subplots(len(groups))
    for (left, right), group in zip(axes, groups, strict=True):
        chosen = [r for r in rows if (r["shape"], r["dtype"], r["logits"]) == group]
        names = [r["implementation"] for r in chosen]
        times = [statistics.median(both(r)) * 1e3 for r in chosen]
        memory = [(r["peak"] - r["gradients"]) / MIB for r in chosen]
        bars(left, names, times, f"{', '.join(group)}: forward and backward, ms", labels=True)
        bars(right, names, memory, "memory beyond the gradients, MiB", labels=False)
    save(figure, title, path)
