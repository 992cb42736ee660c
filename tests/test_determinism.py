# SPDX-License-Identifier: Apache-2.0
"""The same bits in every run with the same threads, and torch's own switch for it honoured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx

N, D, V = 300, 24, 2000
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "capped and smoothed": {"softcap": 5.0, "label_smoothing": 0.1},
    "per token": {"reduction": "none"},
    "small workspace": {"workspace": 1 << 16},
    "class weights": {"class_weight": torch.linspace(0.1, 2, V), "label_smoothing": 0.2},
}


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """With it, torch also fills memory that was not written with NaN: what reads such memory shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=gen).to(device, dtype).requires_grad_() for s in ((N, D), (V, D), (V,)))
    y = torch.randint(V // 40, (N,), generator=gen)  # many rows to a class: sums over rows whose order matters
    y[::7] = -100
    return [h, w, b, y.to(device)]


def run(tensors: list[Tensor], strategy: str, how: dict[str, Any]) -> list[Tensor]:
    h, w, b, y = tensors
    out = cce_fx.linear_cross_entropy(h, w, y, bias=b, strategy=strategy, **how)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out.sum(), (h, w, b))]


def assert_same_bits(first: list[Tensor], again: list[Tensor]) -> None:
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_runs_agree_to_the_bit(way: str, dtype: torch.dtype, strategy: str, threads: int) -> None:
    tensors = inputs(dtype)
    first = run(tensors, strategy, WAYS[way])
    for _ in range(4):
        assert_same_bits(first, run(tensors, strategy, WAYS[way]))


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("way", WAYS)
def test_under_deterministic_algorithms(way: str, strategy: str, deterministic: None, device: torch.device) -> None:
    tensors = inputs(device=device)
    how = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in WAYS[way].items()}
    first = run(tensors, strategy, how)
    assert all(bool(t.isfinite().all()) for t in first)
    assert_same_bits(first, run(tensors, strategy, how))
    torch.use_deterministic_algorithms(False)
    for a, b in zip(first, run(tensors, strategy, how), strict=True):
        torch.testing.assert_close(a, b)


def test_a_compiled_step_agrees_to_the_bit(deterministic: None, device: torch.device) -> None:
    def loss(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.linear(h, w, b)
        return F.cross_entropy(z, y), z

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="cce", options={"min_vocab": 0})
    h, w, b, y = inputs(device=device)

    def step() -> list[Tensor]:
        out, z = compiled(h, w, b, y)
        return [out.detach(), z.argmax(-1), *torch.autograd.grad(out + z[:3].logsumexp(-1).sum(), (h, w, b))]

    first = step()
    for _ in range(3):
        assert_same_bits(first, step())
