# SPDX-License-Identifier: Apache-2.0
"""Train a small language model on several processes, its loss cut in each.

    torchrun --nproc-per-node 2 examples/train_distributed.py            DistributedDataParallel
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp     FSDP2
    torchrun --nproc-per-node 2 examples/train_distributed.py --tp       the vocabulary divided among the processes
    torchrun --nproc-per-node 2 examples/train_distributed.py --check    and compare with eager in one process

With a GPU for each process they talk through NCCL, compute in bfloat16 by autocast, and the model is larger. Everything is
torch's own: this file knows nothing of cce but the string that it hands to torch.compile. `--backend eager` and `--backend
inductor` show what the same step takes without it.
"""

import argparse
import contextlib
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from support import devices, memory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

SEED = 1234
SIZES = {
    "cpu": {"vocab": 16384, "width": 64, "batch": 8, "length": 64},
    "cuda": {"vocab": 131072, "width": 1024, "batch": 16, "length": 1024},
}


class Model(nn.Module):
    def __init__(self, vocab: int, width: int):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.mlp = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        logits = self.head(self.norm(h + self.mlp(h)))
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def batch(arguments: argparse.Namespace, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences in which a token says what the next one is, up to a few that are drawn at random."""
    x = torch.randint(arguments.vocab // 16, (arguments.batch, arguments.length), generator=generator)
    y = (7 * x + 3) % arguments.vocab
    y[torch.rand(y.shape, generator=generator) < 0.05] = 0
    return x, y


def distribute(model: nn.Module, arguments: argparse.Namespace) -> nn.Module:
    if arguments.fsdp:
        return fully_shard(model)
    if arguments.tp:
        divided = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        return parallelize_module(
            model, init_device_mesh(arguments.device.split(":")[0], (dist.get_world_size(),)), {"head": divided}
        )
    return DistributedDataParallel(model)


def train(model: nn.Module, run: nn.Module, arguments: argparse.Namespace, part: slice, tell) -> int:
    """Train on this process's part of each batch; the peak memory of one more step, over what was held before it."""
    generator = torch.Generator().manual_seed(SEED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    autocast = devices.autocast(arguments.device, arguments.dtype)

    def step() -> torch.Tensor:
        x, y = (t[part].to(arguments.device) for t in batch(arguments, generator))
        with loss_parallel() if arguments.tp else contextlib.nullcontext():
            with autocast():
                loss = run(x, y)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    for at in range(arguments.steps):
        tell(at, step())
    return memory.trace_step(step, arguments.device).peak_bytes


def average(loss: torch.Tensor) -> float:
    """Over the processes, which hold as many rows each."""
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def alone(arguments: argparse.Namespace) -> list[float]:
    """The losses of eager training in this process alone, on whole batches."""
    torch.manual_seed(SEED)
    model, losses = Model(arguments.vocab, arguments.width).to(arguments.device), []
    single = argparse.Namespace(**vars(arguments) | {"tp": False})
    train(model, model, single, slice(None), lambda at, loss: losses.append(loss.item()))
    return losses


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--fsdp", action="store_true", help="FSDP2: every process holds a part of each weight")
    how.add_argument("--tp", action="store_true", help="every process holds a part of the vocabulary, and all rows")
    parser.add_argument("--backend", default="cce", choices=("cce", "inductor", "eager"))
    parser.add_argument("--check", action="store_true", help="compare with eager in one process; differing is an error")
    parser.add_argument("--steps", type=int, default=20)
    devices.add_arguments(parser, SIZES)
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node 2")
    enough = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if arguments.device == "auto" and not enough:
        arguments.device = "cpu"
    if arguments.check and arguments.dtype is None:
        arguments.dtype = "float32"
    devices.settle(arguments, SIZES)
    if arguments.device == "cuda":
        if not enough:
            parser.error("--device cuda needs a GPU for each process")
        arguments.device = f"cuda:{os.environ['LOCAL_RANK']}"
    if arguments.batch % int(os.environ["WORLD_SIZE"]):
        parser.error("the processes have to get as many sequences each")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    on_gpu = arguments.device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(arguments.device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    try:
        return work(arguments, dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def work(arguments: argparse.Namespace, rank: int, world: int) -> int:
    torch.manual_seed(SEED)
    model = distribute(Model(arguments.vocab, arguments.width).to(arguments.device), arguments)
    run = model if arguments.backend == "eager" else torch.compile(model, backend=arguments.backend)
    share = arguments.batch // world
    part = slice(None) if arguments.tp else slice(rank * share, (rank + 1) * share)
    losses = []

    def tell(at: int, loss: torch.Tensor) -> None:
        losses.append(average(loss.full_tensor() if hasattr(loss, "full_tensor") else loss))
        if rank == 0:
            print(f"step {at:3}  loss {losses[-1]:.5f}", flush=True)

    peak = train(model, run, arguments, part, tell)
    if rank == 0:
        print(f"peak memory of a step in one of {world} processes: {peak / 2**20:.1f} MiB")
    if not arguments.check:
        return 0
    difference = max(abs(a - b) for a, b in zip(losses, alone(arguments), strict=True))
    if rank == 0:
        print(f"largest difference to one process in eager: {difference:.1e}")
    return int(difference > 1e-3)


if __name__ == "__main__":
    sys.exit(main())
