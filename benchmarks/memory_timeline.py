# SPDX-License-Identifier: Apache-2.0
"""Memory over one training step, by what holds it: `python -m benchmarks memory_timeline`.

torch's profiler (`profile_memory=True`) reports every allocation of the CPU's allocator. Each is put down to the operator
during which it was made, so that the picture shows what the logits and their relatives cost, and what cce_fx's kernels do
(the ranges `cce_fx::*`). Writes a picture with one line for each backend, over its own step because a profiler that writes
down every allocation makes times of its own, and the figures beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACKENDS = ("eager", "inductor", "cce")


class Model(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(width, width), nn.GELU()), nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(self.body(x)), y)


def timeline(step: Callable[[], object]) -> dict[str, Any]:
    """Milliseconds and bytes alive over one step, and the spans of the kernels of cce_fx in it."""
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    begin = changes[0][0]
    ranges = [e for e in events if e.name().startswith("cce_fx::")]
    return {
        "milliseconds": [(t - begin) / 1e6 for t, _ in changes],
        "bytes": list(itertools.accumulate(b for _, b in changes)),
        "kernels": [[e.name(), (e.start_ns() - begin) / 1e6, e.duration_ns() / 1e6] for e in ranges],
    }


def measure(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    found = {}
    for backend in BACKENDS:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = Model(args.width, args.vocab)
        call = model if backend == "eager" else torch.compile(model, backend=backend)
        x, y = torch.randn(args.rows, args.width), torch.randint(args.vocab, (args.rows,))

        def step(call: Any = call, model: Model = model, x: Tensor = x, y: Tensor = y) -> None:
            call(x, y).backward()
            model.zero_grad()

        for _ in range(2):
            step()
        found[backend] = timeline(step)
    return found


def _parts(line: dict[str, Any], milliseconds: list[float]) -> list[float]:
    return [t / line["milliseconds"][-1] for t in milliseconds]


def draw(found: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4))
    for name, line in found.items():
        size = [b / 2**20 for b in line["bytes"]]
        axes.step(_parts(line, line["milliseconds"]), size, where="post", label=f"{name}: at most {max(size):.0f} MiB")
    for name, start, length in found["cce"]["kernels"]:
        axes.axvspan(*_parts(found["cce"], [start, start + length]), alpha=0.12, color="C2", label=name)
    axes.set(xlabel="part of the step", ylabel="MiB beyond what was alive before", title=title)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks memory_timeline",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    title = f"N={args.rows}, D={args.width}, V={args.vocab}, float32, torch {torch.__version__}"
    draw(found, title, args.out / "memory_timeline.png")
    (args.out / "memory_timeline.json").write_text(json.dumps(found))
    for name, line in found.items():
        print(f"{name}: at most {max(line['bytes']) / 2**20:.1f} MiB")
