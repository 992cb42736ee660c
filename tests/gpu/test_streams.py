# SPDX-License-Identifier: Apache-2.0
"""What only a GPU has: streams, graphs, several devices, and a host that must not wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import cce_fx

pytestmark = pytest.mark.gpu
WAYS = ["grads_in_forward", "recompute"]


def tensors(device: torch.device, n: int = 600, d: int = 64, v: int = 3000) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(rows, d, generator=gen).to(device, torch.bfloat16).requires_grad_() for rows in (n, v))
    y = torch.randint(v, (n,), generator=gen)
    y[::5] = -100
    return h, w, y.to(device)


def step(h: Tensor, w: Tensor, y: Tensor, strategy: str) -> tuple[Tensor, ...]:
    loss = cce_fx.linear_cross_entropy(h, w, y, strategy=strategy)  # type: ignore[arg-type]
    return (loss.detach(), *torch.autograd.grad(loss, (h, w)))


def same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("strategy", WAYS)
def test_a_side_stream(cuda: torch.device, strategy: str) -> None:
    args = tensors(cuda)
    wanted = step(*args, strategy)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = [step(*args, strategy) for _ in range(20)]
    torch.cuda.current_stream().wait_stream(stream)
    assert all(same(f, wanted) for f in found)


@pytest.fixture
def no_waiting() -> Iterator[Callable[[], None]]:
    """From its call on, whatever makes the host wait for the device is an error."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("strategy", WAYS)
def test_the_host_waits_for_nothing(cuda: torch.device, no_waiting: Callable[[], None], strategy: str) -> None:
    args = tensors(cuda)
    step(*args, strategy)  # compiles
    torch.cuda.synchronize()
    no_waiting()
    step(*args, strategy)


@pytest.mark.parametrize("strategy", WAYS)
def test_a_graph_is_replayed_with_other_targets(cuda: torch.device, strategy: str) -> None:
    h, w, y = tensors(cuda)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(h, w, y, strategy)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(h, w, y, strategy)
    for shift in (1, 2):
        y.copy_(torch.where(torch.arange(len(y), device=cuda) % (shift + 2) == 0, -100, y.clamp(min=0) // shift))
        graph.replay()
        assert same(found, step(h, w, y, strategy))


def test_tensors_of_two_devices_are_told_apart(device: torch.device) -> None:
    h, w, y = tensors(device)
    other = torch.device("cpu" if device.type == "cuda" else "meta")
    for args, name in (((h, w.to(other), y), "weight"), ((h, w, y.to(other)), "target")):
        with pytest.raises(RuntimeError, match=f"{name} is? ?on|{name} on {other}"):
            cce_fx.linear_cross_entropy(*args)


def test_the_second_of_two_devices(cuda: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    first, second = (step(*tensors(torch.device("cuda", at)), "recompute") for at in (0, 1))
    assert all(b.device.index == 1 and torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))
