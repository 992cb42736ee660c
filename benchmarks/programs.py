# SPDX-License-Identifier: Apache-2.0
"""Losses of the rows that no kernel knows, eager, inductor and cce in one process: `python -m benchmarks programs`.

Each is a student's head of hidden size D with its loss, forward and backward, in float32. Time is the median of interleaved
rounds. Memory is what a step holds at its peak beyond the inputs and the gradients, exact.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import interleaved, peak_bytes

BACKENDS = ("eager", "inductor", "cce")
Loss = Callable[[nn.Module, nn.Module, Tensor, Tensor, Tensor], Tensor]
T = 2.0


def kl(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Distillation by the Kullback-Leibler divergence, the teacher's head without gradient."""
    target = F.softmax(teacher(e) / T, -1)
    return F.kl_div(F.log_softmax(student(x) / T, -1), target, reduction="batchmean") * T * T


def jsd(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Distillation by the Jensen-Shannon divergence."""
    a, b = F.log_softmax(student(x) / T, -1), F.log_softmax(teacher(e) / T, -1)
    m = torch.logaddexp(a, b) - math.log(2)
    both = F.kl_div(m, a, log_target=True, reduction="none") + F.kl_div(m, b, log_target=True, reduction="none")
    return both.sum(-1).mean() / 2


def entropy(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with a bonus for entropy."""
    z = student(x)
    return F.cross_entropy(z, y) + 0.01 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def smoothed(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Label smoothing through a scattered target."""
    z = student(x)
    target = torch.full_like(z, 0.1 / (z.size(-1) - 1)).scatter_(1, y[:, None], 0.9)
    return F.kl_div(F.log_softmax(z, -1), target, reduction="batchmean")


def labels(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Many labels, each by itself."""
    z = student(x)
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.size(-1)).to(z.dtype))


def arcface(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """A margin on the angle of the right class."""
    cosine = F.linear(F.normalize(x), F.normalize(student.weight)).clamp(-1 + 1e-6, 1 - 1e-6)  # type: ignore[arg-type]
    right = F.one_hot(y, cosine.size(-1)).bool()
    return F.cross_entropy(torch.where(right, torch.cos(torch.acos(cosine) + 0.5), cosine) * 32, y)


LOSSES: dict[str, tuple[Loss, tuple[int, int, int, int]]] = {  # N, D of the student and of the teacher, V
    "kl": (kl, (2048, 512, 1024, 32000)),
    "jsd": (jsd, (2048, 512, 1024, 32000)),
    "entropy": (entropy, (2048, 512, 8, 32000)),
    "smoothed": (smoothed, (2048, 512, 8, 32000)),
    "labels": (labels, (512, 512, 8, 100000)),
    "arcface": (arcface, (512, 512, 8, 100000)),
}


def measure(name: str, scale: int, rounds: int, backends: list[str]) -> dict[str, Any]:
    """Seconds of each round, peak bytes and the loss, by backend."""
    loss, sizes = LOSSES[name]
    n, d, e, v = (max(8, size // scale) for size in sizes)
    torch.manual_seed(0)
    student, teacher = nn.Linear(d, v, bias=False), nn.Linear(e, v, bias=False).requires_grad_(False)
    x, given, y = torch.randn(n, d, requires_grad=True), torch.randn(n, e), torch.randint(0, v, (n,))
    steps, peaks, losses = {}, {}, {}
    for backend in backends:
        options = {"min_vocab": 0} if backend == "cce" else None
        run = loss if backend == "eager" else torch.compile(loss, backend=backend, options=options)

        def step(run: Loss = run) -> float:
            x.grad = student.weight.grad = None
            value = run(student, teacher, x, given, y)
            value.backward()
            return float(value.detach())

        losses[backend] = step()
        x.grad = student.weight.grad = None
        gradients = x.numel() * 4 + student.weight.numel() * 4
        peaks[backend] = peak_bytes(step) - gradients
        steps[backend] = step
    times = interleaved(steps, rounds)
    return {"shape": [n, d, e, v], "seconds": times, "peaks": peaks, "losses": losses}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(LOSSES), help="losses, by name")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides every size, for a try")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    names = args.backends.split(",")
    columns = [f"{b} {what}" for what in ("time", "memory") for b in names]
    table = Table(
        "loss", "shape", *columns, title=f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    )
    found = {}
    for name in args.only.split(","):
        torch._dynamo.reset()
        found[name] = measure(name, args.scale, args.rounds, names)
        seconds = [f"{statistics.median(found[name]['seconds'][b]):.2f} s" for b in names]
        memory = [f"{found[name]['peaks'][b] / 2**20:.0f} MiB" for b in names]
        table.add_row(name, "x".join(map(str, found[name]["shape"])), *seconds, *memory)
    Console(width=160).print(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
