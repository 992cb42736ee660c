# SPDX-License-Identifier: Apache-2.0
"""A head and its loss on one GPU of a large training run, by arithmetic: memory and time, however they are divided.

    python -m benchmarks scale

Nothing here is measured; tests hold small cases of the memory against measured runs. Bytes are those that `cce_fx.explain` predicts
for DTensors so placed, in bfloat16 with the loss in float32 and the scratch memory of the GPU kernels. A layout "8x4x2+fsdp" has 8
data-parallel replicas, whose weights FSDP divides, vocabularies divided among 4 (TP) and sequences among 2 (SP). *Eager* holds all
logits of its rows, which it gathers where the vocabulary is divided; *loss_parallel* is torch's loss on divided logits.

Time is what a device needs at `--utilisation` of its vendor's peak for the products, plus, for what is not cut, writing and reading
what it holds once, plus what the TP group sends. The gathering of FSDP is the same for all, and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import sympy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console

import cce_fx
from benchmarks.tables import View
from cce_fx.functional import Sizes, workspace
from cce_fx.kernels.triton.machines import MACHINES, Machine
from cce_fx.passes.memory import NAMES

GIB = 2**30
_MESHES = itertools.count()
NUMBERS = 3  # that a process of a divided vocabulary sends for a row, in float32


@dataclass(frozen=True)
class Head:
    """The last layer of a model, and the rows of one data-parallel replica's micro-batch."""

    tokens: int  # N
    width: int  # D
    classes: int  # V


@dataclass(frozen=True)
class Layout:
    """Among how many processes what is divided."""

    data: int = 1  # replicas
    tensor: int = 1  # the vocabulary
    sequence: int = 1  # rows of a replica
    fsdp: bool = False  # weights, among the replicas and the rows' processes, gathered for their work

    @classmethod
    def parse(cls, text: str) -> Layout:
        """From "8x4x2" or "8x4x2+fsdp". Raises ValueError on anything else."""
        sizes, _, more = text.partition("+")
        if more not in ("", "fsdp") or sizes.count("x") != 2:
            raise ValueError(f"a layout is like 8x4x2 or 8x4x2+fsdp (DP x TP x SP), not {text!r}")
        return cls(*(int(size) for size in sizes.split("x")), fsdp=bool(more))

    def __str__(self) -> str:
        return f"DP {self.data}, TP {self.tensor}, SP {self.sequence}" + ", FSDP" * self.fsdp


@dataclass(frozen=True)
class Held:
    """Bytes on one device; the last three at their peak beyond the operands, the gradients of both included."""

    resting: int  # the weight between its uses
    operands: int  # hidden and the weight at work
    eager: int
    loss_parallel: int
    cut: int


def loss(h: torch.Tensor, w: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # A sum, since torch's own loss on divided logits has no mean on a mesh of two dimensions.
    return F.cross_entropy(F.linear(h, w).float(), y, reduction="sum")


@contextlib.contextmanager
def pretended(world: int) -> Iterator[None]:
    """A process group of which this process alone exists: what is sent goes nowhere, and shapes are as they would be."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@functools.cache
def expressions(tensor: int, sequence: int, dtype: torch.dtype) -> tuple[sympy.Expr, sympy.Expr]:
    """Bytes that the loss holds on one device as it is written, and cut with its gradients, in N, D and V of all devices."""
    h, w = (torch.zeros(rows, 8, dtype=dtype, requires_grad=True) for rows in (4, 64))
    values = (h, w, torch.zeros(4, dtype=torch.int64))
    if tensor * sequence == 1:
        report = cce_fx.explain(loss, *values)
    else:
        report = _of_processes(values, tensor, sequence)
    (site,) = report.rewritten
    saved, needed = (sympy.sympify(text, locals=NAMES) for text in (site.bytes_saved_expr, site.bytes_needed_expr))
    return saved, needed


def _of_processes(values: tuple[torch.Tensor, ...], tensor: int, sequence: int) -> cce_fx.Report:
    """`explain` of the loss on DTensors whose local parts are `values`."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.distributed.tensor.parallel import loss_parallel

    divided = {what: size for what, size in (("rows", sequence), ("classes", tensor)) if size > 1}
    placements = {
        what: tuple(Shard(0) if dim == what else Replicate() for dim in divided) for what in ("rows", "classes")
    }
    with pretended(tensor * sequence), loss_parallel() if tensor > 1 else contextlib.nullcontext():
        # DTensor's caches know meshes by their shape and names, and hand out those of groups that are gone.
        names = tuple(f"{what}{next(_MESHES)}" for what in divided)
        mesh = init_device_mesh("cpu", tuple(divided.values()), mesh_dim_names=names)
        placed = [
            DTensor.from_local(t, mesh, placements[what], run_check=False)
            for t, what in zip(values, ("rows", "classes", "rows"), strict=True)
        ]
        return cce_fx.explain(loss, *placed)


def held(head: Head, layout: Layout, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Held:
    """What one device holds for the head and its loss."""
    n, v = -(-head.tokens // layout.sequence), -(-head.classes // layout.tensor)

    def bytes_of(tensor: int, sequence: int, rows: int) -> tuple[int, int]:
        sizes = {"N": rows, "D": head.width, "V": v * layout.tensor}
        saved, needed = expressions(tensor, sequence, dtype)
        if device != "cpu":  # which the tensors of the expressions were on
            scratch = workspace(Sizes(dtype, n, v, head.width), torch.device(device), again=False)
            needed = needed.replace(NAMES["Workspace"], lambda *_: sympy.Integer(scratch))
        saved, needed = (int(e.subs({s: sizes[s.name] for s in e.free_symbols})) for e in (saved, needed))
        return saved, needed

    weight, hidden = (dtype.itemsize * head.width * rows for rows in (v, n))
    saved, needed = bytes_of(layout.tensor, layout.sequence, n * layout.sequence)
    # The gradients of weight and hidden are made when of the loss nothing but the gradient of the logits is left.
    later = weight + hidden + dtype.itemsize * n * v
    return Held(
        resting=weight // (layout.data * layout.sequence if layout.fsdp else 1),
        operands=weight + hidden,
        eager=max(bytes_of(1, 1, n)[0], later),
        loss_parallel=max(saved, later),
        cut=needed,
    )


def seconds(head: Head, layout: Layout, machine: Machine, utilisation: float, link: float) -> dict[str, float]:
    """How long one device works on the head and its loss, eager, under loss_parallel and cut."""
    n, v, ranks = head.tokens / layout.sequence, head.classes / layout.tensor, layout.tensor
    product = 2 * n * head.width * v / (utilisation * machine.flops(torch.bfloat16))
    bytes = held(head, layout)
    others = (ranks - 1) / ranks
    d_hidden = 2 * others * 2 * n * head.width / link  # an all-reduce, as a ring does it
    gathered = 2 * n * head.classes * others / link  # the logits
    numbers = 4 * NUMBERS * n * (ranks - 1) / link
    return {
        "eager": 3 * product + 2 * bytes.eager / machine.memory_rate + d_hidden + gathered,
        "loss_parallel": 3 * product + 2 * bytes.loss_parallel / machine.memory_rate + d_hidden + numbers,
        "cut": (4 if ranks > 1 else 3) * product + d_hidden + numbers,
    }


@dataclass(frozen=True)
class Model:
    width: int
    parameters: float


CLASSES = 128256
MODELS = {"8B": Model(4096, 8.03e9), "70B": Model(8192, 70.6e9), "405B": Model(16384, 405.9e9)}
LAYOUTS = "64x1x1,64x1x1+fsdp,8x8x1+fsdp,4x8x2+fsdp"


def layouts_view(args: argparse.Namespace) -> View:
    lines = []
    for name in args.models.split(","):
        head = Head(args.tokens, MODELS[name].width, args.classes)
        for layout in map(Layout.parse, args.layouts.split(",")):
            found = held(head, layout)
            times = seconds(head, layout, MACHINES[args.card], args.utilisation, args.link * 1e9)
            amounts = (found.resting, found.operands, found.eager, found.loss_parallel, found.cut)
            cells = [f"{amount / GIB:.2f}" for amount in amounts] + [f"{1e3 * t:.1f}" for t in times.values()]
            lines.append((f"{name}, {layout}", *cells))
    columns = (
        f"Llama 3, {args.tokens:,} tokens in a replica",
        "weight at rest",
        "weight and hidden",
        "eager",
        "loss_parallel",
        "cut",
        "eager, ms",
        "loss_parallel, ms",
        "cut, ms",
    )
    title = (
        f"The head and its loss on one {args.card} at {100 * args.utilisation:.0f} % of the peak: GiB and milliseconds"
    )
    return View(title, columns, tuple(lines))


def flops_view(args: argparse.Namespace) -> View:
    """Flops for one token, and tokens in a second."""
    rate = args.devices * args.utilisation * MACHINES[args.card].flops(torch.bfloat16)
    lines = []
    for name in args.models.split(","):
        model, head = MODELS[name], 2.0 * MODELS[name].width * args.classes
        for what, products in (("gradients in the forward", 3), ("logits made again", 4)):
            total = 6 * model.parameters + (products - 3) * head
            share, speed = products * head / total, rate / total
            cells = (f"{products * head / 1e9:.1f} GFLOP", f"{100 * share:.2f} %", f"{speed / 1e6:.2f} million")
            lines.append((f"{name}, {products} products ({what})", *cells))
    title = f"{args.devices:,} {args.card} at {100 * args.utilisation:.0f} % of the peak"
    return View(title, ("head and loss", "of one token", "of all flops", "tokens in a second"), tuple(lines))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(MODELS)}")
    parser.add_argument("--layouts", default=LAYOUTS, help=f"DP x TP x SP, with or without FSDP ({LAYOUTS})")
    parser.add_argument("--tokens", type=int, default=8192, help="of one replica's micro-batch")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--devices", type=int, default=16384, help="of the table of flops")
    parser.add_argument("--card", default="H100", choices=sorted(MACHINES))
    parser.add_argument("--utilisation", type=float, default=0.4)
    parser.add_argument("--link", type=float, default=450.0, help="GB/s that a device sends within a TP group")
    parser.add_argument("--markdown", action="store_true")
    args = parser.parse_args(arguments)
    for view in (layouts_view(args), flops_view(args)):
        if args.markdown:
            print(view.markdown())
        else:
            Console().print(view.rich())
