# SPDX-License-Identifier: Apache-2.0
"""What it costs that logits which nobody has read outlive an optimizer's step: `python -m benchmarks after_step`.

The training step of `examples/train_lm.py` at its sizes, with a fused AdamW: with its logits let go before the optimizer's step,
and alive through it, with a copy of the weights that the step changes (`after_step="as_before"`) and without (`"error"`). Steps are
interleaved; ratios are medians of those within each round. The peak is what a step holds beyond the weights and the optimizer's
state, its gradients included, counted exactly.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import interleaved, peak_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_lm
from support import devices

WAYS = {  # whether the logits are alive at the optimizer's step, and the option
    "let go": (False, "as_before"),
    "alive, error": (True, "error"),
    "alive, as_before": (True, "as_before"),
}


def stepper(alive: bool, after_step: str, args: argparse.Namespace) -> Callable[[], float]:
    """One step, which returns its loss."""
    torch.compiler.reset()
    torch.manual_seed(train_lm.SEED)
    model = train_lm.GPT(args.vocab, args.width, args.layers, args.length).to(args.device)
    compiled = torch.compile(model, backend="cce", options={"after_step": after_step})
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.rate, betas=(0.9, 0.95), fused=True)
    x = torch.randint(args.vocab, (args.batch, args.length), device=args.device)
    autocast = devices.autocast(args.device, args.dtype)

    def step() -> float:
        with autocast():
            logits, loss = compiled(x, x)
        if not alive:
            del logits
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks after_step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices.add_arguments(parser, train_lm.SIZES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    devices.settle(args, train_lm.SIZES)
    steps = {name: stepper(*way, args) for name, way in WAYS.items()}
    for step in steps.values():
        step()  # compiles, and makes the optimizer's state
    peaks = {name: peak_bytes(step, args.device) for name, step in steps.items()}
    times = interleaved(steps, args.rounds, args.device)
    table = Table(
        "logits", "median step", "of that without a copy", "peak",
        title=f"V={args.vocab}, D={args.width}, N={args.batch * args.length}, "
        f"{devices.describe(args.device, args.dtype)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )  # fmt: skip
    for name in steps:
        ratio = statistics.median(a / b for a, b in zip(times[name], times["alive, error"], strict=True))
        table.add_row(
            name, f"{statistics.median(times[name]) * 1e3:.0f} ms", f"{ratio:.3f}", f"{peaks[name] / 2**20:.1f} MiB"
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"peaks": peaks, "seconds": times}))
