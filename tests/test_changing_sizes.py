# SPDX-License-Identifier: Apache-2.0
"""Every size, and every number, may change from call to call: the loss stays cut, in the graph that was compiled for symbols."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from tests.helpers import assert_no_worse

OPTIONS = {"inner": "aot_eager", "min_vocab": 0, "logits": "keep"}
Loss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
LOSSES: dict[str, Loss] = {}


def loss(function: Loss) -> Loss:
    LOSSES[function.__name__] = function
    return function


@loss
def smoothed(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y, label_smoothing=0.1)


@loss
def smoothed_by_a_number_that_changes(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y, label_smoothing=t)


@loss
def reshaped(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h.unsqueeze(0), w)
    return F.cross_entropy(z.view(-1, z.size(-1)), y)


@loss
def biased_and_weighted(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return F.cross_entropy(F.linear(h, w) + c, y, weight=c.abs())


@loss
def by_hand(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    log_probs = (h @ w.T).log_softmax(-1)
    return -((1 - t) * log_probs.gather(-1, y[:, None]).mean() + t * log_probs.mean(-1).mean())


@loss
def temperature(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return F.cross_entropy(F.linear(h, w, c) / t, y)


@loss
def soft_cap(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return F.cross_entropy(t * torch.tanh(F.linear(h, w) / t), y)


@loss
def scaled_and_squashed(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return (F.linear(h, w) / t * (1 - t)).tanh().pow(2).sum(-1).mean()


@loss
def entropy(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h, w)
    return -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


@loss
def binary(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h, w)
    return F.binary_cross_entropy_with_logits(z, F.one_hot(y, z.size(-1)).to(z.dtype))


@loss
def filled(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h, w)
    return F.kl_div(z.log_softmax(-1), torch.full_like(z, 1 / (z.size(-1) - 1)), reduction="batchmean")


@loss
def soft_embedding(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return (F.linear(h, w).softmax(-1) @ w - h).pow(2).mean()


@loss
def by_class(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h, w)
    places = torch.arange(z.size(-1)) * z.softmax(-1)
    return ((z.sigmoid() * c).sum(-1) / z.size(-1)).mean() + places.sum(-1).mean() / z.size(-1)


@loss
def cut_and_joined(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    z = F.linear(h, w)
    return (z.tanh()[:, 1:] * c[1:]).logsumexp(-1).mean() + torch.cat([z.sin(), z.cos()], -1).pow(2).mean(-1).mean()


@loss
def times_the_number_of_rows(h: Tensor, w: Tensor, y: Tensor, c: Tensor, t: float) -> Tensor:
    return (F.linear(h, w) * h.size(0)).tanh().sum(-1).mean() / h.size(0)


def given(step: int, dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """Other rows, classes and hidden size, and another number, at each step."""
    n, v, d = [(24, 50, 4), (17, 60, 5), (9, 81, 6)][step]
    g = torch.Generator().manual_seed(step)
    h, w, c = (torch.randn(*size, generator=g).to(dtype) for size in ((n, d), (v, d), (v,)))
    return [h.requires_grad_(), w.requires_grad_(), torch.randint(0, v, (n,), generator=g), c], (0.5, 0.7, 0.9)[step]


def outcome(run: Loss, tensors: list[Tensor], number: float) -> list[Tensor]:
    out = run(*tensors, number)  # type: ignore[arg-type]
    return [out.detach(), *torch.autograd.grad(out, tensors[:2])]


@pytest.mark.sample(6)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_stays_cut_whatever_changes(name: str, dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(LOSSES[name], backend="cce", options=OPTIONS)
    for step in range(3):
        tensors, number = given(step, dtype)
        exact = [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in tensors]
        ours = outcome(compiled, tensors, number)
        want, eager = outcome(LOSSES[name], exact, number), outcome(LOSSES[name], tensors, number)
        for n, values in enumerate(zip(want, eager, ours, strict=True)):
            assert_no_worse(f"{name}, result {n} at step {step}", *values, ulps=64)
    declined = {k: n for k, n in counters["cce_fx"].items() if k.startswith("declined") and n}
    assert not declined and counters["cce_fx"]["rewritten"] >= 2
    # Where torch itself fixes a number, every value is compiled for; nothing of ours does.
    plain = graphs(LOSSES[name])
    assert counters["stats"]["unique_graphs"] == plain


def graphs(function: Loss) -> int:
    """How many graphs torch makes of a function for the same calls."""
    before = counters["stats"]["unique_graphs"]
    compiled = torch.compile(lambda *args: function(*args), backend="aot_eager")
    for step in range(3):
        tensors, number = given(step, torch.float32)
        compiled(*tensors, number)
    made = counters["stats"]["unique_graphs"] - before
    counters["stats"]["unique_graphs"] = before
    return made


def test_rows_that_an_index_chooses_may_be_fewer() -> None:
    """`gather` takes an index of fewer rows, and a graph for symbols does not know whether it has."""

    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return -F.linear(h, w).log_softmax(-1).gather(-1, y[:, None]).mean()

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(loss, backend="cce", options=OPTIONS)
    for n, rows in ((24, 24), (17, 17), (19, 11)):
        h, w, y = torch.randn(n, 4), torch.randn(50, 4), torch.randint(0, 50, (rows,))
        torch.testing.assert_close(compiled(h, w, y), loss(h, w, y))
    assert counters["cce_fx"]["rewritten"] == 2
