# SPDX-License-Identifier: Apache-2.0
"""Infinite logits over whole tiles, NaN, 64-bit addresses, gradients near fp16's smallest numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cce_fx.kernels import reference
from cce_fx.kernels.spec import RowGrads
from tests.kernels.contract import ALL, check, small

from .support import Kernels

pytestmark = pytest.mark.gpu
STRATEGIES = ("recompute", "chunked")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masked_classes(kernels: Kernels, strategy: str) -> None:
    # A whole first tile is masked, and some classes after it: the running maximum starts at -inf.
    bias = torch.zeros(150)
    bias[:70] = bias[100:110] = -torch.inf
    p, grads = small(20, 30, 150, bias=bias), RowGrads(torch.ones(20))
    check(replace(p, target=p.target % 30 + 70), grads, ALL, kernels, strategy=strategy)
    check(replace(p, target=p.target % 30), grads, ALL, kernels, strategy=strategy)


def test_every_class_masked_is_nan_as_in_eager(kernels: Kernels) -> None:
    stats = kernels.forward(small(5, 8, 70, bias=torch.full((70,), -torch.inf)))
    assert stats.nll.isnan().all() and (stats.lse == -torch.inf).all()


def test_nan_reaches_its_row_only(kernels: Kernels) -> None:
    p = small(20, 30, 70)
    p.hidden[3, 4] = torch.nan
    stats = kernels.forward(p)
    assert stats.nll.isnan().nonzero().tolist() == [[3]]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_ignored_row_that_has_diverged_makes_gradients_nan(kernels: Kernels, strategy: str) -> None:
    p = small(20, 30, 70, bias=torch.randn(70))
    p.target[5] = -100
    p.hidden[5, 2] = torch.inf
    stats, found = kernels.forward_backward(p, RowGrads(torch.ones(20)), ALL, strategy=strategy)
    assert stats.nll.isfinite().all() and stats.nll[5] == 0
    assert found.weight is not None and found.weight.isnan().all()
    assert found.hidden is not None and found.hidden[5].isnan().all() and found.hidden[:5].isfinite().all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_of_a_mean_survive_fp16(kernels: Kernels, strategy: str) -> None:
    p, grads = small(30, 32, 100, torch.float16), RowGrads(torch.full((30,), 1e-6))
    exact = reference.forward_backward(p, grads, ALL)[1]
    found = kernels.backward(p, kernels.forward(p).norm, grads, ALL, strategy=strategy)
    for a, b in ((found.hidden, exact.hidden), (found.weight, exact.weight)):
        assert a is not None and b is not None
        # Each result is rounded once, to the grid of fp16's subnormals.
        assert (a.double() - b).abs().max() <= 2.0**-24


def test_rows_beyond_two_to_the_31_entries_are_addressed(kernels: Kernels) -> None:
    """An address computed in 32 bits would read elsewhere, and crash."""
    n, d, v = 3, 16, 5
    step = 2**31 + 16
    # On the CPU it is virtual memory only: no page but those written is ever touched. On a GPU it takes 8 GiB.
    far = torch.empty(2 * step + d, dtype=torch.float16)
    hidden = far.as_strided((n, d), (step, 1))
    near = small(n, d, v, torch.float16)
    hidden.copy_(near.hidden)
    a, b = kernels.forward(replace(near, hidden=hidden)), kernels.forward(near)
    assert torch.equal(a.nll, b.nll)
    grads = RowGrads(torch.ones(n))
    for strategy in STRATEGIES:
        x, y = (
            kernels.backward(q, b.norm, grads, ALL, strategy=strategy) for q in (replace(near, hidden=hidden), near)
        )
        assert torch.equal(x.weight, y.weight)  # type: ignore[arg-type]
        assert torch.equal(x.hidden, y.hidden)  # type: ignore[arg-type]
