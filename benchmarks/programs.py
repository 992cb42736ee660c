# SPDX-License-Identifier: Apache-2.0
"""Losses of the rows, and several losses on one weight, eager, inductor, cce and Liger's: `python -m benchmarks programs`.

Each is a student's head of hidden size D with its loss, forward and backward, in float32. Time is the median of interleaved
rounds, memory what a step holds at its peak beyond the inputs and the gradients, exact; the first call is the compiler's work and
a step. Liger's loss is its chunked one, of torch alone, where it has one and `liger-kernel` is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.measure import interleaved, peak_bytes
from benchmarks.pictures import draw_programs
from benchmarks.store import describe, machine

BACKENDS = ("eager", "inductor", "cce", "liger")
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


def metrics(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Cross entropy with accuracy and the mean logit beside it, which nobody differentiates."""
    z = student(x)
    with torch.no_grad():
        _seen[:] = [(z.argmax(-1) == y).float().mean(), z.mean()]
    return F.cross_entropy(z, y)


_seen: list[Tensor] = []  # what a trainer would log


def clip(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Texts against images, in both directions: the student's weight are the images."""
    z = x @ student.weight.T / 0.07  # type: ignore[operator,union-attr]
    pairs = torch.arange(z.size(0))
    return (F.cross_entropy(z, pairs) + F.cross_entropy(z.T, pairs)) / 2


def liger_jsd() -> Loss:
    """Liger's distillation, which mixes it with a cross entropy of no weight."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    made = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, temperature=T)

    def loss(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
        out = made(x, student.weight, e, teacher.weight, y)
        return out[0] if isinstance(out, tuple) else out

    return loss


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


def chunks(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Cross entropy of eight chunks of the batch, each with its own logits, as programs save memory by hand."""
    loss: Any = 0.0
    for some, targets in zip(x.chunk(8), y.chunk(8), strict=True):
        loss += F.cross_entropy(student(some), targets, reduction="sum")
    return loss / y.numel()


def exits(student: nn.Module, teacher: nn.Module, x: Tensor, e: Tensor, y: Tensor) -> Tensor:
    """Cross entropies of four layers' states, as models have them that may end at any layer."""
    losses = []
    for _ in range(4):
        x = torch.tanh(x * 1.1)
        losses.append(F.cross_entropy(student(x), y))
    return torch.stack(losses).mean()


LOSSES: dict[str, tuple[Loss, tuple[int, int, int, int]]] = {  # N, D of the student and of the teacher, V
    "kl": (kl, (2048, 512, 1024, 32000)),
    "jsd": (jsd, (2048, 512, 1024, 32000)),
    "entropy": (entropy, (2048, 512, 8, 32000)),
    "metrics": (metrics, (2048, 512, 8, 32000)),
    "smoothed": (smoothed, (2048, 512, 8, 32000)),
    "labels": (labels, (512, 512, 8, 100000)),
    "arcface": (arcface, (512, 512, 8, 100000)),
    "clip": (clip, (8192, 512, 8, 8192)),
    "chunks": (chunks, (2048, 512, 8, 32000)),
    "exits": (exits, (512, 512, 8, 32000)),
}
TITLES = {
    "kl": "distillation, KL",
    "jsd": "distillation, JSD",
    "entropy": "cross entropy and an entropy bonus",
    "metrics": "cross entropy, accuracy and the mean logit",
    "smoothed": "smoothing by KLDivLoss, scattered target",
    "labels": "multi-label BCE",
    "arcface": "ArcFace",
    "clip": "CLIP, both directions",
    "chunks": "cross entropy in eight chunks",
    "exits": "cross entropies of four layers",
}
LIGER: dict[str, Callable[[], Loss]] = {"jsd": liger_jsd}


def runs(name: str, backends: list[str]) -> dict[str, Loss]:
    """A loss by backend, where there is one."""
    loss, found = LOSSES[name][0], {}
    for backend in backends:
        if backend == "eager":
            found[backend] = loss
        elif backend == "liger":
            if name in LIGER and importlib.util.find_spec("liger_kernel"):
                found[backend] = LIGER[name]()
        else:
            found[backend] = torch.compile(
                loss, backend=backend, options={"min_vocab": 0} if backend == "cce" else None
            )
    return found


def measure(name: str, scale: int, rounds: int, backends: list[str]) -> dict[str, Any]:
    """Seconds of each round and of the first call, peak bytes and the loss, by backend."""
    n, d, e, v = (max(8, size // scale) for size in LOSSES[name][1])
    torch.manual_seed(0)
    student, teacher = nn.Linear(d, v, bias=False), nn.Linear(e, v, bias=False).requires_grad_(False)
    x, given, y = torch.randn(n, d, requires_grad=True), torch.randn(n, e), torch.randint(0, v, (n,))
    steps, peaks, losses, first = {}, {}, {}, {}
    for backend, run in runs(name, backends).items():

        def step(run: Loss = run) -> float:
            x.grad = student.weight.grad = None
            value = run(student, teacher, x, given, y)
            value.backward()
            return float(value.detach())

        begin = time.perf_counter()
        losses[backend] = step()
        first[backend] = time.perf_counter() - begin
        x.grad = student.weight.grad = None
        gradients = x.numel() * 4 + student.weight.numel() * 4
        peaks[backend] = peak_bytes(step) - gradients
        steps[backend] = step
    times = interleaved(steps, rounds)
    return {"shape": [n, d, e, v], "seconds": times, "peaks": peaks, "losses": losses, "first": first}


def row(name: str, found: dict[str, Any], backends: list[str]) -> list[str]:
    """A line of the table: times, peaks and first calls, and those of cce as parts of inductor's."""
    seconds = {b: statistics.median(t) for b, t in found["seconds"].items()}
    cells = [f"{seconds[b]:.2f} s" if b in seconds else "" for b in backends]
    cells += [f"{found['peaks'][b] / 2**20:.0f} MiB" if b in seconds else "" for b in backends]
    for values in (seconds, found["peaks"], found["first"]):
        both = "cce" in values and "inductor" in values
        cells.append(f"{values['cce'] / values['inductor']:.2f}" if both else "")
    return [name, "x".join(map(str, found["shape"])), *cells]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(LOSSES), help="losses, by name")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="divides every size, for a try")
    parser.add_argument("--json", type=Path, help="a run goes on with the losses that are not in it")
    parser.add_argument("--picture", type=Path)
    args = parser.parse_args(arguments)
    names = args.backends.split(",")
    columns = [f"{b} {what}" for what in ("time", "memory") for b in names]
    columns += [f"cce/inductor {what}" for what in ("time", "memory", "first call")]
    title = f"{torch.get_num_threads()} threads, torch {torch.__version__}, float32"
    table = Table("loss", "shape", *columns, title=title)
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    for name in args.only.split(","):
        if name not in found:
            torch._dynamo.reset()
            found[name] = measure(name, args.scale, args.rounds, names)
            if args.json:
                args.json.write_text(json.dumps(found, indent=1))
        table.add_row(*row(name, found[name], names))
    Console(width=200).print(table)
    if args.picture:
        draw_programs(
            {TITLES[name]: found[name] for name in LOSSES if name in found}, describe(machine()), args.picture
        )
