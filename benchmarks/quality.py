# SPDX-License-Identifier: Apache-2.0
"""Whether training goes as it does in eager: `python -m benchmarks quality --picture docs/images/training_quality.png`.

The GPT of `examples/train_lm.py` is trained from one seed on the same batches. Training is chaotic: what a program rounds
in another way grows with the steps, so cce's distance from eager says nothing by itself. It is compared with eager's own
noise: eager with another number of threads, and eager from weights that are moved by one unit in the last place, three
times; and with inductor. In float32 and under bfloat16 autocast, each run in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_lm
from support import corpus
from support.files import default_cache

# Name: backend, threads, seed of the change of the weights (0 is none).
RUNS = {
    "eager": ("eager", 2, 0),
    "eager, one thread": ("eager", 1, 0),
    **{f"eager, moved by an ulp ({seed})": ("eager", 2, seed) for seed in (1, 2, 3)},
    "inductor": ("inductor", 2, 0),
    "cce": ("cce", 2, 0),
}
PRECISIONS = ("float32", "bfloat16")


def train(backend: str, threads: int, moved: int, precision: str, steps: int, vocab: int, cache: str) -> list[float]:
    """The losses of one run."""
    torch.set_num_threads(threads)
    tokens = corpus.load_tokens(vocab, Path(cache))
    torch.manual_seed(train_lm.SEED)
    generator = torch.Generator().manual_seed(train_lm.SEED)
    model = train_lm.GPT(vocab, 128, 2, 128)
    if moved:
        noise = torch.Generator().manual_seed(moved)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 2.0**-23 * torch.randn(p.shape, generator=noise))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: train_lm.learning_rate(s, steps))
    call = model if backend == "eager" else torch.compile(model, backend=backend)
    losses = []
    for _ in range(steps):
        x, y = corpus.random_batch(tokens, 4, 128, generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            _, loss = call(x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses


def distances(found: dict[str, list[float]], name: str) -> list[float]:
    """The distance of a run's loss from eager's at each step."""
    return [abs(a - b) for a, b in zip(found[name], found["eager"], strict=True)]


def smoothed(values: list[float], window: int = 10) -> list[float]:
    """Means over windows of steps."""
    return [statistics.fmean(values[max(0, at - window + 1) : at + 1]) for at in range(len(values))]


def draw(results: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(10, 6), sharex=True, squeeze=False)
    for (precision, found), (above, below) in zip(results.items(), axes.T, strict=True):
        for name, losses in found.items():
            noise = "ulp" in name
            color = {"eager": "0.2", "inductor": "tab:green", "cce": "tab:blue"}.get(name, "tab:orange")
            style = {"color": color, "linewidth": 0.7 if noise else 1.5, "linestyle": "--" if name == "cce" else "-"}
            label = None if noise and not name.endswith("(1)") else name.removesuffix(" (1)")
            above.plot(losses, label=label, **style)
            apart = smoothed(distances(found, name))
            if any(apart):  # one that is eager's to the bit has no place on a log axis
                below.plot(apart, label=label, **style)
        above.set(title=precision, ylabel="loss")
        below.set(xlabel="step", ylabel="distance from eager's loss", yscale="log")
        above.set_ylim(top=above.get_ylim()[1] + 4)  # room for the legend
        above.legend(loc="upper right", ncols=2)
        below.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--cache", type=Path, default=default_cache())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(train(**json.loads(args.child))))
        return
    results: dict[str, dict[str, list[float]]] = {p: {} for p in PRECISIONS}
    table = Table("precision", "run", "loss at the end", "median distance from eager", "largest")
    console = Console()
    for precision, found in results.items():
        for name, (backend, threads, moved) in RUNS.items():
            settings = {"backend": backend, "threads": threads, "moved": moved, "precision": precision}
            child = json.dumps(settings | {"steps": args.steps, "vocab": args.vocab, "cache": str(args.cache)})
            with console.status(f"{precision}: {name}"):
                command = [sys.executable, "-m", "benchmarks", "quality", "--child", child]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
            gaps = distances(found, name)
            end = statistics.fmean(found[name][-20:])
            table.add_row(precision, name, f"{end:.4f}", f"{statistics.median(gaps):.1e}", f"{max(gaps):.1e}")
    console.print(table)
    if args.json:
        args.json.write_text(json.dumps(results))
    if args.picture:
        draw(results, args.picture)
