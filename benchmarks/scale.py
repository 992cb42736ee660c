"""The head and its loss in a large training run, by arithmetic: memory on one device, and the share of the flops.

    python -m benchmarks cluster

Nothing here is measured. Bytes are those that `cce_fx.explain` predicts, in bfloat16 with the loss in float32, and the scratch
memory of the GPU kernels. Defaults are Llama 3 405B with 8,192 tokens in a micro-batch, and the FSDP, tensor (TP) and sequence
(SP) parallelism that such a model is trained with. A device is taken to reach `--utilisation` of its vendor's peak.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import sympy
import torch
import torch.nn.functional as F
from rich.console import Console

import cce_fx
from benchmarks.tables import View
from cce_fx.functional import default_workspace
from cce_fx.kernels.triton.machines import MACHINES

GIB = 2**30


@dataclass(frozen=True)
class Run:
    """A model and how its last layer lies on the devices."""

    tokens: int  # N of a micro-batch, in all devices of a tensor-parallel group together
    width: int  # D
    classes: int  # V
    parameters: float
    shards: int  # of the vocabulary

    @property
    def local(self) -> int:
        return -(-self.classes // self.shards)


def predicted(run: Run) -> tuple[int, int]:
    """Bytes on one device for the loss beyond its gradients: as written, and rewritten with the GPU kernels."""

    def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.linear(h, w).float(), y)

    h, w = (torch.zeros(rows, 8, dtype=torch.bfloat16, requires_grad=True) for rows in (4, 64))
    n, d, v = run.tokens, run.width, run.local
    scratch = default_workspace(n, d, v, torch.bfloat16, torch.device("cuda"), max, min)
    report = cce_fx.explain(loss, h, w, torch.zeros(4, dtype=torch.int64), options=cce_fx.Options(workspace=scratch))
    (site,) = report.rewritten
    sizes = dict(zip(sympy.symbols("N D V", positive=True, integer=True), (n, d, v), strict=True))
    names = {str(symbol): symbol for symbol in sizes}
    saved, needed = (
        int(sympy.sympify(text, locals=names).subs(sizes)) for text in (site.bytes_saved_expr, site.bytes_needed_expr)
    )
    return saved, needed - gradient_bytes(run)


def gradient_bytes(run: Run) -> int:
    """Of hidden and weight, in bfloat16."""
    return 2 * run.width * (run.tokens + run.local)


def memory_view(runs: dict[str, Run]) -> View:
    lines = []
    for name, run in runs.items():
        dense, ours = predicted(run)
        hidden, weight = (2 * run.width * rows for rows in (run.tokens, run.local))
        cells = (weight, hidden, gradient_bytes(run), dense, ours)
        lines.append(
            (name, f"{run.tokens:,} x {run.local:,}", *(f"{x / GIB:.2f} GiB" for x in cells), f"{dense / ours:.1f}")
        )
    columns = (
        "",
        "logits of one device",
        "weight",
        "hidden, gathered",
        "their gradients",
        "loss as written",
        "loss cut",
        "ratio",
    )
    return View("Memory of the head's loss on one device, bfloat16", columns, tuple(lines))


def flops_view(run: Run, card: str, devices: int, utilisation: float) -> View:
    """Flops for one token, and tokens in a second."""
    model = 6 * run.parameters
    head = 2.0 * run.width * run.classes
    rate = devices * utilisation * MACHINES[card].flops(torch.bfloat16)
    lines = []
    for name, products in (("three products (gradients in the forward)", 3), ("four (logits made again)", 4)):
        total = model + (products - 3) * head
        share, speed = products * head / total, rate / total
        lines.append((name, f"{products * head / 1e9:.1f} GFLOP", f"{100 * share:.2f} %", f"{speed / 1e6:.2f} million"))
    title = f"{devices:,} {card} at {100 * utilisation:.0f} % of the peak"
    return View(title, ("head and loss", "of one token", "of all flops", "tokens in a second"), tuple(lines))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--classes", type=int, default=128256)
    parser.add_argument("--parameters", type=float, default=405e9)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--devices", type=int, default=16384)
    parser.add_argument("--card", default="H100", choices=sorted(MACHINES))
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(arguments)
    sizes = (args.tokens, args.width, args.classes, args.parameters)
    runs = {
        "FSDP, the head's weight gathered": Run(*sizes, 1),
        f"TP={args.tp} and SP, the vocabulary cut": Run(*sizes, args.tp),
    }
    for view in (memory_view(runs), flops_view(runs[next(iter(runs))], args.card, args.devices, args.utilisation)):
        if args.markdown:
            print(view.markdown())
        else:
            Console().print(view.rich())
