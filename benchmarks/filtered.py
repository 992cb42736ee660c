# SPDX-License-Identifier: Apache-2.0
"""What the bounded filter saves on a trained model, and what it costs, on a GPU: `python -m benchmarks filtered`.

The GPT of `examples/train_lm.py` is trained for some steps. On the hidden states of its next batch the Triton kernels run with
several values of `filter_eps`, beside the bare matrix products; errors are Euclidean, of whole gradients, relative to the
exact kernel's. On a CPU there is no filter; with TRITON_INTERPRET=1 and `--device cpu` the errors can be had there, slowly.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.candidates import BARE
from benchmarks.measure import interleaved, peak_bytes
from benchmarks.tables import View, bytes_text, ratio, time_text
from cce_fx.kernels.choose import on_gpu
from cce_fx.kernels.spec import Grads, Needs, Problem, RowGrads

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import train_lm
from support import corpus
from support.files import default_cache

_NEEDS = Needs(True, True, False)


def trained(steps: int, vocab: int, width: int, batch: int, length: int, cache: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (N, D) of a batch that comes after the training, the head's weight (V, D), and the targets (N,)."""
    tokens = corpus.load_tokens(vocab, cache)
    torch.manual_seed(train_lm.SEED)
    generator = torch.Generator().manual_seed(train_lm.SEED)
    model = train_lm.GPT(vocab, width, 3, length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(train_lm.learning_rate, steps=steps))
    call = torch.compile(model, backend="cce")
    for _ in track(range(steps), "training"):
        train_lm.train_step(call, optimizer, *corpus.random_batch(tokens, batch, length, generator))
        schedule.step()
    x, y = corpus.random_batch(tokens, batch, length, generator)
    seen: list[Tensor] = []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    with torch.no_grad():
        model(x, y)
    return seen[0].reshape(-1, width), model.head.weight.detach(), y.reshape(-1)


def error(found: Tensor, exact: Tensor) -> str:
    return f"{float((found - exact).norm() / exact.norm()):.1e}"


def measure(problem: Problem, bounds: list[float], rounds: int) -> View:
    from cce_fx.kernels import triton

    n, device = problem.hidden.shape[0], problem.hidden.device
    rows = RowGrads(torch.full((n,), 1 / n, device=device))

    def call(eps: float | None, report: list[triton.Filter] | None = None) -> tuple[float, Grads]:
        stats, grads = triton.forward_backward(replace(problem, filter_eps=eps), rows, _NEEDS, report=report)
        return float(stats.nll.mean()), grads

    loss, exact = call(None)
    lines: dict[str, tuple[str, ...]] = {"exact": ("0", "0", "0", "0")}
    for eps in bounds:
        report: list[triton.Filter] = []
        _, found = call(eps, report)
        lost = report[0].rows * n
        lines[f"filter_eps={eps}"] = (
            error(found.hidden, exact.hidden), error(found.weight, exact.weight), f"{float(lost.max()):.3f}",
            f"{float(lost.mean()):.3f}",
        )  # fmt: skip
        del found
    bare = BARE[0]
    runs = {
        bare.name: bare.calls(problem.hidden, problem.weight, problem.target)["train"],
        "exact": partial(call, None),
    }
    runs |= {f"filter_eps={eps}": partial(call, eps) for eps in bounds}
    grads = problem.hidden.nbytes + problem.weight.nbytes
    extra = {name: bytes_text(peak_bytes(runs[name], device.type) - grads) for name in lines}
    times = interleaved(runs, rounds, device.type)
    table = [
        (name, time_text(found), ratio(found, times[bare.name]), extra.get(name, ""), *lines.get(name, ("",) * 4))
        for name, found in times.items()
    ]
    (_, d), v = problem.hidden.shape, problem.weight.shape[0]
    title = f"N={n}, D={d}, V={v}, float32, loss {loss:.2f}, {device}"
    columns = ("", "time", f"/ {bare.name}", "extra memory", "error of d_hidden", "error of d_weight",
               "most that a row lost", "mean")  # fmt: skip
    return View(title, columns, tuple((*line[:2], f"{line[2]:.3f}", *line[3:]) for line in table))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks filtered", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[300], help="of training; one table for each")
    parser.add_argument("--bounds", type=float, nargs="+", default=[0.05, 0.1, 0.15, 0.2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--workspace", type=float, help="MiB; default: the kernel's")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder for the tokenizer and the tokens")
    parser.add_argument(
        "--states", type=Path, help="folder where trained states are kept, so that a run can be repeated"
    )
    args = parser.parse_args(arguments)
    if not on_gpu(torch.device(args.device)):
        raise SystemExit(f"the filter is one of the Triton kernels, which do not run on {args.device}")
    workspace = None if args.workspace is None else int(args.workspace * 2**20)
    for steps in args.steps:
        kept = args.states and args.states / f"{steps}-{args.vocab}-{args.width}.pt"
        if kept and kept.exists():
            hidden, weight, target = torch.load(kept)
        else:
            hidden, weight, target = trained(steps, args.vocab, args.width, args.batch, args.length, args.cache)
            if kept:
                kept.parent.mkdir(parents=True, exist_ok=True)
                torch.save((hidden, weight, target), kept)
        view = measure(
            Problem(*(t.to(args.device) for t in (hidden, weight)), None, target.to(args.device), workspace=workspace),
            args.bounds,
            args.rounds,
        )
        Console(width=180).print(f"after {steps} steps", view.rich())
        print(view.markdown())
