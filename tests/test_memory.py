# SPDX-License-Identifier: Apache-2.0
"""What a rewritten loss holds, counted from every allocation: as predicted, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cce_fx
from benchmarks import measure
from cce_fx import Options
from cce_fx.passes.memory import N, largest_rows


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def autocast_loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return loss(h, w, y)


def tensors(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(rows, d, generator=gen).to(dtype).requires_grad_() for rows in (n, v))
    return h, w, torch.randint(v, (n,), generator=gen)


def step(run: Callable[..., Tensor], args: tuple[Tensor, ...]) -> None:
    for t in args:
        t.grad = None
    out = run(*args)
    if out.requires_grad:
        out.backward()


def measured(fn: Callable[..., Tensor], args: tuple[Tensor, ...], options: dict[str, Any]) -> int:
    """The peak of all allocations in one compiled step."""
    torch._dynamo.reset()
    run = torch.compile(fn, backend="cce", options=options)
    step(run, args)
    for t in args:
        t.grad = None
    return measure.peak_bytes(lambda: step(run, args))


# N, D, V: little and much of everything, with more of the workspace than of gradients and the other way round.
SHAPES = [(64, 64, 1000), (512, 64, 8192), (2048, 64, 8192), (128, 256, 16000), (1024, 128, 16000)]


@pytest.mark.sample(4)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
def test_prediction_is_within_a_tenth_of_what_is_measured(shape: tuple[int, int, int], strategy: str) -> None:
    args, options = tensors(*shape), {"strategy": strategy}
    predicted = cce_fx.explain(loss, *args, options=Options(**options)).bytes_needed
    assert predicted == pytest.approx(measured(loss, args, options), rel=0.1)


@pytest.mark.sample(4)
@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("fn", [loss, autocast_loss])
@pytest.mark.parametrize("shape", [(512, 64, 8192), (64, 256, 16000)])
def test_prediction_in_half_precision(fn: Callable[..., Tensor], shape: tuple[int, int, int], strategy: str) -> None:
    args = tensors(*shape, torch.bfloat16 if fn is loss else torch.float32)
    options = {"strategy": strategy}
    predicted = cce_fx.explain(fn, *args, options=Options(**options)).bytes_needed
    assert predicted == pytest.approx(measured(fn, args, options), rel=0.1)


@pytest.mark.parametrize("grad", ["none", "hidden", "weight"])
def test_prediction_counts_the_gradients_that_are_made(grad: str) -> None:
    h, w, y = tensors(512, 64, 8192)
    args = h.requires_grad_(grad == "hidden"), w.requires_grad_(grad == "weight"), y
    predicted = cce_fx.explain(loss, *args).bytes_needed
    assert predicted == pytest.approx(measured(loss, args, {}), rel=0.1)


def test_prediction_knows_a_workspace_of_ones_own() -> None:
    args, options = tensors(1024, 32, 8192), {"workspace": 2 << 20}
    predicted = cce_fx.explain(loss, *args, options=Options(**options)).bytes_needed
    assert predicted == pytest.approx(measured(loss, args, options), rel=0.1)


@pytest.mark.parametrize("memory", [3 << 20, 12 << 20])
def test_max_batch_is_the_largest_that_fits(memory: int) -> None:
    report = cce_fx.explain(loss, *tensors(16, 32, 8192))
    rows = report.max_batch(memory)
    (site,) = report.rewritten
    assert site.needed_by_rows.subs(N, rows) <= memory < site.needed_by_rows.subs(N, rows + 1)
    assert measured(loss, tensors(rows, 32, 8192), {}) <= 1.1 * memory


def test_max_batch_without_room_or_without_a_loss() -> None:
    assert cce_fx.explain(loss, *tensors(16, 32, 8192)).max_batch(1000) == 0
    with pytest.raises(ValueError, match="no loss"):
        cce_fx.explain(torch.tanh, torch.zeros(3)).max_batch(1 << 30)


def test_two_losses_need_the_memory_of_both() -> None:
    def twice(h: Tensor, w: Tensor, u: Tensor, y: Tensor) -> Tensor:
        return loss(h, w, y) + loss(h, u, y)

    h, w, y = tensors(64, 32, 4096)
    one = cce_fx.explain(loss, h, w, y)
    both = cce_fx.explain(twice, h, w, w.detach().clone().requires_grad_(), y)
    assert both.bytes_needed == 2 * one.bytes_needed
    assert both.max_batch(2 * one.bytes_needed) == one.max_batch(one.bytes_needed)


def test_a_report_of_symbolic_rows_still_says_the_largest_batch() -> None:
    h, w, y = tensors(64, 32, 4096)
    fixed = cce_fx.explain(loss, h, w, y)
    for t in (h, y):
        torch._dynamo.mark_dynamic(t, 0)
    report = cce_fx.explain(loss, h, w, y)
    assert report.rewritten[0].bytes_needed is None and "bytes" in str(report)
    assert report.max_batch(8 << 20) == fixed.max_batch(8 << 20)


@pytest.mark.parametrize("memory", [0, 10, 999, 1000, 10**9])
def test_largest_rows_by_hand(memory: int) -> None:
    assert largest_rows(sympy.Integer(10) + 3 * N, memory) == max((memory - 10) // 3, 0)


# --- nothing is held twice ---------------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.trunk = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(self.trunk(self.embed(x)))
        return F.cross_entropy(z.view(-1, VOCAB), y.view(-1)), z


ROWS, WIDTH, VOCAB = 64, 64, 8192


def changes_of_a_step(model: nn.Module, run: Callable[..., Any]) -> list[int]:
    gen = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCAB, (4, ROWS // 4), generator=gen) for _ in range(2))

    def once() -> None:
        value, _ = run(x, y)
        value.backward()

    once()
    model.zero_grad()
    return measure.allocations(once)[1]


def test_the_gradient_of_the_weight_is_made_where_grad_takes_it() -> None:
    model = Model(tied=False).requires_grad_(False)
    model.head.requires_grad_()
    changes = changes_of_a_step(model, torch.compile(model, backend="cce"))
    size = VOCAB * WIDTH * 4
    assert [c for c in changes if abs(c) >= size] == [size], "more than one tensor of the weight's size"
    grad = model.head.weight.grad
    assert grad.dtype == torch.float32 and grad.is_contiguous() and grad.untyped_storage().nbytes() == size


def test_lazy_logits_cost_no_more_than_a_hidden_state() -> None:
    model = Model(tied=False).requires_grad_(False)
    model.head.requires_grad_()

    def peak(run: Callable[..., Any]) -> int:
        torch._dynamo.reset()
        return max(accumulate(changes_of_a_step(model, run)))

    lazy = peak(torch.compile(model, backend="cce"))
    alone = peak(torch.compile(lambda x, y: (model(x, y)[0], None), backend="cce"))
    assert lazy - alone <= 2 * ROWS * WIDTH * 4
