"""Time and memory of the tiled kernel beside the bare matrix products: `python -m benchmarks.kernel --help`.

Everything is measured in one process, interleaved, so that what else the machine does hits all alike. `floor` is the
three products (logits, d_hidden, d_weight) into preallocated buffers, `gemm` the first of them alone. Extra memory is
the peak of all allocations beyond the inputs and the gradients, counted exactly by torch's profiler.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import interleaved, peak_bytes
from cce_fx.kernels import tiled
from cce_fx.kernels.spec import Needs, Problem, RowGrads


def candidates(problem: Problem, names: list[str]) -> dict[str, tuple[Callable[[], object], int]]:
    """Each candidate by name, with the bytes of gradients that it leaves."""
    h, w, t = problem.hidden, problem.weight, problem.target
    n, rows = h.shape[0], torch.full((h.shape[0],), 1 / h.shape[0])
    grads = (h.numel() + w.numel()) * h.element_size()
    made: dict[str, tuple[Callable[[], object], int]] = {}
    if "floor" in names or "gemm" in names:
        z, dh, dw = h.new_empty(n, w.shape[0]), torch.empty_like(h), torch.empty_like(w)

        def floor() -> None:
            torch.mm(h, w.T, out=z)
            torch.mm(z, w, out=dh)
            torch.mm(z.T, h, out=dw)

        made["floor"] = floor, 0
        made["gemm"] = lambda: torch.mm(h, w.T, out=z), 0

    def dense(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        def run() -> object:
            a, b = h.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(loss(a, b), (a, b))

        return run

    made["tiled"] = lambda: tiled.forward_backward(problem, RowGrads(rows), Needs()), grads
    half = replace(problem, target=t.where(torch.arange(n) % 2 == 0, -100))
    made["ignored"] = lambda: tiled.forward_backward(half, RowGrads(rows), Needs()), grads
    made["forward"] = lambda: tiled.forward(problem), 0
    made["recompute"] = lambda: tiled.backward(problem, tiled.forward(problem).norm, RowGrads(rows), Needs()), grads
    made["eager"] = dense(lambda a, b: F.cross_entropy(F.linear(a, b), t)), grads
    if hasattr(F, "linear_cross_entropy"):
        made["torch"] = dense(lambda a, b: F.linear_cross_entropy(a, b, t)), grads
    return {name: made[name] for name in names if name in made}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", action="append", help="N,D,V (repeatable)")
    parser.add_argument("--runs", default="floor,gemm,tiled,forward,ignored,recompute,eager,torch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workspace", type=float, help="MiB; default: the kernel's")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for shape in args.shape or ["2048,512,32000", "4096,1024,50257"]:
        n, d, v = (int(x) for x in shape.split(","))
        generator = torch.Generator().manual_seed(0)
        dtype = getattr(torch, args.dtype)
        hidden = torch.randn(n, d, generator=generator).to(dtype)
        weight = (torch.randn(v, d, generator=generator) * d**-0.5).to(dtype)
        target = torch.randint(v, (n,), generator=generator)
        workspace = None if args.workspace is None else int(args.workspace * 2**20)
        report(shape, Problem(hidden, weight, None, target, workspace=workspace), args.runs.split(","), args.rounds)


def report(shape: str, problem: Problem, names: list[str], rounds: int) -> None:
    runs = candidates(problem, names)
    extra = {name: (peak_bytes(run) - grads) / 2**20 for name, (run, grads) in runs.items()}  # also warms up
    times = interleaved({name: run for name, (run, _) in runs.items()}, rounds)
    base = "floor" if "floor" in runs else next(iter(runs))
    print(f"N,D,V = {shape}  {problem.hidden.dtype}  {torch.get_num_threads()} threads, {rounds} rounds", flush=True)
    for name, seconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, times[base], strict=True))
        best = min(seconds) / min(times[base])
        print(
            f"  {name:10s} median {statistics.median(seconds):8.3f} s   /{base} {ratio:6.3f}   best/best {best:6.3f}   "
            f"extra {extra[name]:9.2f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
