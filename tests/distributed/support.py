# SPDX-License-Identifier: Apache-2.0
"""Groups of processes that run checks over gloo on the loopback device, and what a compiled graph communicates."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.fx import GraphModule

TIMEOUT = 60  # seconds that a collective or an answer of the store may take


class RemoteError(AssertionError):
    """A check that failed in a process of the group, with that process's traceback."""


class Workers:
    """Processes of one group that live for many checks: importing torch costs more than most of them."""

    def __init__(self, world: int, timeout: float = TIMEOUT) -> None:
        self.world, self.timeout = world, timeout
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, self.timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, check: Callable[..., Any], *args: Any) -> list[Any]:
        """`check(*args)` in every process; what each returned, by rank. Raises RemoteError where one raised."""
        answers = self.outcomes(check, *args)
        failed = [f"rank {rank}:\n{a}" for rank, (good, a) in enumerate(answers) if not good]
        if failed:
            self.stop()  # the others may wait in a collective that will not come
            raise RemoteError("\n".join(failed))
        return [a for _, a in answers]

    def outcomes(self, check: Callable[..., Any], *args: Any) -> list[tuple[bool, Any]]:
        """(True, result) or (False, traceback or why there is none) of every process."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((check, args))
        return [_answer(pipe, 3 * self.timeout) for pipe in self._pipes]

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
            process.join(10)
        self._processes, self._pipes = [], []


def _answer(pipe: Connection, seconds: float) -> tuple[bool, Any]:
    try:
        return pipe.recv() if pipe.poll(seconds) else (False, f"no answer within {seconds:.0f} seconds")
    except EOFError:
        return False, "the process ended"


def _serve(rank: int, world: int, port: int, timeout: float, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout))
    with contextlib.suppress(EOFError):
        while True:
            check, args = pipe.recv()
            torch._dynamo.reset()
            try:
                pipe.send((True, check(*args)))
            except BaseException:
                pipe.send((False, traceback.format_exc()))


# --- what a compiled program does ---------------------------------------------------------------------------------------

_QUIET = {"wait_tensor"}


@dataclass
class Graphs:
    """The graphs of a compiled program after AOTAutograd, which the inner backend `inner` keeps."""

    forward: list[GraphModule] = field(default_factory=list)
    backward: list[GraphModule] = field(default_factory=list)

    def inner(self, gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def keep(where: list[GraphModule]) -> Callable[..., Any]:
            def compile_graph(graph: GraphModule, _: Any) -> Any:
                where.append(graph)
                return make_boxed_func(graph.forward)

            return compile_graph

        made = aot_autograd(
            fw_compiler=keep(self.forward), bw_compiler=keep(self.backward), keep_inference_input_mutations=True
        )
        return made(gm, inputs)

    @property
    def options(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def largest(self) -> int:
        """Elements of the largest tensor of any graph."""
        return max(t.numel() for gm in (*self.forward, *self.backward) for n in gm.graph.nodes for t in _tensors(n))

    def operators(self) -> set[str]:
        return {
            n.target._schema.name
            for gm in (*self.forward, *self.backward)
            for n in gm.graph.nodes
            if isinstance(n.target, torch._ops.OpOverload)
        }


def collectives(graphs: list[GraphModule]) -> list[tuple[str, int]]:
    """The collectives of graphs in order, each with the bytes that this process hands over."""
    found = []
    for gm in graphs:
        for n in gm.graph.nodes:
            if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "_c10d_functional":
                name = n.target._schema.name.split("::")[1]
                if name not in _QUIET:
                    found.append((name, sum(t.numel() * t.itemsize for a in n.all_input_nodes for t in _tensors(a))))
    return found


def _tensors(node: Any) -> Iterator[Tensor]:
    value = node.meta.get("val")
    for v in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(v, Tensor):
            yield v


def whole(t: Tensor) -> Tensor:
    """A tensor, or all of a DTensor."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float = 1e-5) -> None:
    """Each pair of tensors agrees to `rtol` of its largest entry."""
    assert ours.keys() == theirs.keys(), (sorted(ours), sorted(theirs))
    for name, wanted in theirs.items():
        error, size = (ours[name] - wanted).abs().max(), wanted.abs().max()
        assert error <= rtol * size, f"{name}: off by {error:.3g} of {size:.3g}"
