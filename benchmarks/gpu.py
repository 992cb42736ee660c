# SPDX-License-Identifier: Apache-2.0
"""The loss of a head on a real GPU, beside its peers: `python -m benchmarks gpu --help`.

For each shape: first the error of loss and gradients against float64, on few rows; then time and peak memory of forward,
backward and both, medians of interleaved rounds. Writes `<out>/<device>.json` and a picture beside it. Memory is what is
allocated beyond inputs; the gradients' own bytes, which nobody can do without, are given apart. `--device cpu` with a small
`--shape` tries the program out where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.candidates import Loss, Peer, inputs, peers
from benchmarks.measure import interleaved, peak_bytes

SHAPES = {
    "Gemma 2 2B (the paper's)": (8192, 2304, 256000),
    "Llama 3 8B": (8192, 4096, 128256),
    "Qwen 3 8B": (8192, 4096, 151936),
    "GPT-2": (8192, 768, 50257),
}


@dataclass(frozen=True)
class Result:
    """One implementation at one shape; what it could not do is None, and `note` says why."""

    shape: str
    implementation: str
    forward: float | None = None  # seconds
    backward: float | None = None
    both: float | None = None
    extra_bytes: int | None = None  # peak of both, beyond the gradients
    error: dict[str, float] | None = None  # relative to float64, by result
    note: str = ""


def step(loss: Loss, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    out = loss(hidden, weight, target)
    return (out.detach(), *torch.autograd.grad(out, (hidden, weight)))


def errors(loss: Loss, shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> dict[str, float]:
    """The largest error of each result over its largest value, on at most 256 rows."""
    n, d, v = shape
    hidden, weight, target = inputs(min(n, 256), d, v, dtype, device, ignored=0.1)
    found = step(loss, hidden, weight, target)
    wide = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = step(lambda h, w, t: F.cross_entropy(F.linear(h, w), t), *wide, target)
    names = ("loss", "d_hidden", "d_weight")
    return {
        name: float((a.double() - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, found, exact, strict=True)
    }


def measure(name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str, rounds: int) -> list[Result]:
    """Every implementation at one shape. Those that fail are told apart and left out of the timing."""
    results: dict[str, Result] = {}
    runs: dict[str, dict[str, Callable[[], object]]] = {"forward": {}, "both": {}, "backward": {}}
    torch.compiler.reset()
    values = inputs(*shape, dtype, device, ignored=0.1)
    for peer in peers(device):
        results[peer.name] = _try(peer, name, shape, dtype, device, values, runs)
    for what, calls in runs.items():
        for key, times in interleaved(calls, rounds, device).items():
            results[key] = Result(**{**asdict(results[key]), what: statistics.median(times)})
    return list(results.values())


def _try(
    peer: Peer, name: str, shape: tuple[int, int, int], dtype: torch.dtype, device: str,
    values: tuple[Tensor, Tensor, Tensor], runs: dict[str, dict[str, Callable[[], object]]],
) -> Result:  # fmt: skip
    if peer.missing:
        return Result(name, peer.name, note=peer.missing)
    hidden, weight, _ = values
    try:
        loss = peer.make()
        error = errors(loss, shape, dtype, device)
        step(loss, *values)  # compiles, and tunes
        extra = peak_bytes(lambda: step(loss, *values), device) - sum(x.nbytes for x in (hidden, weight))
        graph = loss(*values)
    except Exception as problem:  # a peer that fails is a result, not the end of the run
        return Result(name, peer.name, note=f"{type(problem).__name__}: {str(problem).splitlines()[0]}"[:200])
    runs["forward"][peer.name] = lambda: loss(*values)
    runs["both"][peer.name] = lambda: step(loss, *values)
    if device == "cuda":
        runs["backward"][peer.name] = lambda: torch.autograd.grad(graph, (hidden, weight), retain_graph=True)
    return Result(name, peer.name, extra_bytes=extra, error=error)


def show(console: Console, name: str, shape: tuple[int, int, int], results: list[Result]) -> None:
    table = Table(title=f"{name}: N={shape[0]} D={shape[1]} V={shape[2]}", title_justify="left")
    for column in ("", "forward", "backward", "both", "memory", "error of loss", "d_hidden", "d_weight", ""):
        table.add_column(column, justify="left" if column == "" else "right")
    for r in results:
        times = [f"{t * 1e3:.2f} ms" if t else "-" for t in (r.forward, r.backward, r.both)]
        memory = "-" if r.extra_bytes is None else f"{r.extra_bytes / 2**20:.1f} MiB"
        table.add_row(r.implementation, *times, memory, *_errors(r), r.note)
    console.print(table)


def _errors(r: Result) -> list[str]:
    return [f"{r.error[k]:.1e}" if r.error else "-" for k in ("loss", "d_hidden", "d_weight")]


def draw(results: list[Result], title: str, path: Path) -> None:
    """Time and memory of each implementation, a row of bars for each shape."""
    from benchmarks.pictures import bars, save, subplots

    shapes = list(dict.fromkeys(r.shape for r in results))
    figure, axes = subplots(len(shapes))
    for (left, right), shape in zip(axes, shapes, strict=True):
        rows = [r for r in results if r.shape == shape and r.both is not None]
        names = [r.implementation for r in rows]
        bars(left, names, [r.both * 1e3 for r in rows], f"{shape}: forward and backward, ms", labels=True)
        bars(right, names, [r.extra_bytes / 2**20 for r in rows], "memory beyond the gradients, MiB", labels=False)
    save(figure, title, path)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", help="N,D,V (repeatable); default: four well-known models")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "no GPU: torch.cuda.is_available() is False. `--device cpu --shape 64,32,500` tries the program."
        )
    shapes = {s: tuple(int(x) for x in s.split(",")) for s in args.shape} if args.shape else SHAPES
    console, results, dtype = Console(width=180), [], getattr(torch, args.dtype)
    title = f"{device_name(args.device)}, torch {torch.__version__}, {args.dtype}"
    console.print(title)
    for name, shape in shapes.items():
        with console.status(name):
            found = measure(name, shape, dtype, args.device, args.rounds)
        show(console, name, shape, found)
        results += found
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{device_name(args.device).replace(' ', '_')}.json"
    about = {"device": device_name(args.device), "torch": torch.__version__, "dtype": args.dtype}
    path.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    draw(results, title, path.with_suffix(".png"))
    console.print(f"written: {path} and {path.with_suffix('.png')}")
