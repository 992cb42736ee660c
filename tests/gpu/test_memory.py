# SPDX-License-Identifier: Apache-2.0
"""What a rewritten loss holds on a GPU, by its allocator: as predicted, within the workspace, and nothing afterwards."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx
from benchmarks import measure
from cce_fx import Options

pytestmark = pytest.mark.gpu
MIB = 1 << 20


def shape(device: torch.device) -> tuple[int, int, int]:
    """N, D, V, with logits that are larger than all else. The interpreter is slow."""
    return (8192, 512, 50257) if device.type == "cuda" else (96, 16, 1000)


def tensors(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    n, d, v = shape(device)
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(rows, d, generator=gen).to(device, dtype).requires_grad_() for rows in (n, v))
    return h, w, torch.randint(v, (n,), generator=gen).to(device)


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def step(run: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Tensor:
    for t in args:
        t.grad = None
    out = run(*args)
    out.backward()
    return out.detach()


def compiled(**options: Any) -> Callable[..., Tensor]:
    torch._dynamo.reset()
    return torch.compile(loss, backend="cce", options={"inner": "aot_eager", "min_vocab": 0, **options})


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prediction_is_within_a_tenth_of_what_is_measured(
    dtype: torch.dtype, strategy: str, device: torch.device
) -> None:
    args = tensors(device, dtype)
    predicted = cce_fx.explain(loss, *args, options=Options(strategy=strategy, min_vocab=0)).bytes_needed
    run = compiled(strategy=strategy)
    step(run, args)
    for t in args:
        t.grad = None
    measured = measure.peak_bytes(lambda: step(run, args), device.type)
    # Numbers for each row and tile are not part of the prediction, and what an allocator adds to each of a dozen.
    slack = 16 * shape(device)[0] * 4 + (16 << 10)
    assert predicted == pytest.approx(measured, rel=0.1, abs=slack)


@pytest.mark.parametrize("part", [8, 32])
def test_a_workspace_is_kept_to(part: int, device: torch.device) -> None:
    args = tensors(device)
    n, d, v = shape(device)
    workspace = 2 * n * v // part
    run = compiled(workspace=workspace)
    step(run, args)
    gradients = sum(t.grad.nbytes for t in args if t.grad is not None)
    for t in args:
        t.grad = None
    # A second gradient of each tensor is there for a moment, when the loss's gradient is multiplied in.
    peak = measure.peak_bytes(lambda: step(run, args), device.type)
    assert peak <= workspace + 2 * gradients + 32 * n * 4


@contextlib.contextmanager
def out_of_memory(left: int) -> Iterator[None]:
    """Lets so many allocations be, and fails the next as the allocator would."""

    def counted(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def new(*args: Any, **kwargs: Any) -> Tensor:
            nonlocal left
            left -= 1
            if left < 0:
                raise torch.OutOfMemoryError("out of memory, as the test wants it")
            return make(*args, **kwargs)

        return new

    names = ("empty", "zeros", "full", "empty_like", "zeros_like")
    with mock.patch.multiple(torch, **{name: counted(getattr(torch, name)) for name in names}):
        yield


def alive() -> int:
    """Bytes of all tensors that are left."""
    gc.collect()
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is Tensor
    }
    return sum(found.values())


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
def test_a_step_after_one_that_ran_out_of_memory(strategy: str, device: torch.device) -> None:
    """Whichever allocation fails, the error is torch's, nothing is left behind, and the next step is as the first."""
    h, w, y = (t[:40] for t in tensors(device))
    args = h.detach().requires_grad_(), w.detach().requires_grad_(), y % 40
    run = lambda h, w, y: cce_fx.linear_cross_entropy(h, w, y, strategy=strategy)  # noqa: E731
    wanted = step(run, args), args[0].grad.clone(), args[1].grad.clone()  # type: ignore[union-attr]
    for t in args:
        t.grad = None
    before, failed = alive(), 0
    for count in range(100):
        try:
            with out_of_memory(count):
                step(run, args)
            break
        except torch.OutOfMemoryError:
            failed += 1
        for t in args:
            t.grad = None
        assert alive() == before, count
    assert failed > 3, "no allocation was made to fail"
    found = step(run, args), args[0].grad, args[1].grad
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_card_without_room_is_an_error_and_no_more(cuda: torch.device) -> None:
    args, run = tensors(cuda), compiled(workspace=512 * MIB)
    wanted = step(run, args)
    for t in args:
        t.grad = None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(cuda).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 128 * MIB) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
            step(run, args)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for t in args:
        t.grad = None
    gc.collect()
    assert torch.cuda.memory_allocated() <= before
    assert torch.equal(step(run, args), wanted)
