# SPDX-License-Identifier: Apache-2.0
"""The gradient filter: its error is within the bound it reports, and it leaves out what is negligible only."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cce_fx.kernels import triton
from cce_fx.kernels.spec import Grads, Problem, RowGrads
from tests.kernels.contract import ALL, small

from .support import Kernels

pytestmark = pytest.mark.gpu
STRATEGIES = ("recompute", "chunked")


def peaked(dtype: torch.dtype = torch.float32) -> Problem:
    """Ten classes of 400, scattered over the vocabulary, carry nearly all of the softmax; some rows are ignored."""
    bias = torch.full((400,), -15.0, dtype=dtype)
    bias[::40] = 0
    p = small(24, 20, 400, dtype, bias=bias)
    target = p.target // 40 * 40
    target[::3] = -100
    return replace(p, hidden=p.hidden / 8, target=target)


def run(kernels: Kernels, p: Problem, strategy: str) -> tuple[Grads, Grads, triton.Filter]:
    norm, grads = kernels.forward(p).norm, RowGrads(torch.linspace(0.5, 1, p.hidden.shape[0]))
    exact = kernels.backward(replace(p, filter_eps=None), norm, grads, ALL, strategy=strategy)
    report: list[triton.Filter] = []
    found = kernels.backward(p, norm, grads, ALL, strategy=strategy, report=report)
    assert len(report) == 1
    return exact, found, report[0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("eps", [1e-6, 2.0**-12, 1e-1, 1000.0])
def test_the_error_is_within_the_bound(kernels: Kernels, strategy: str, eps: float) -> None:
    p = replace(peaked(), filter_eps=eps)
    exact, found, report = run(kernels, p, strategy)
    assert exact.hidden is not None and found.hidden is not None
    assert exact.weight is not None and found.weight is not None
    assert exact.bias is not None and found.bias is not None
    rows, columns = report.bound(p)
    slack = 1e-5 * float(exact.weight.abs().max())
    assert ((exact.hidden - found.hidden).norm(dim=1) <= rows + slack).all()
    assert ((exact.weight - found.weight).norm(dim=1) <= columns + slack).all()
    assert ((exact.bias - found.bias).abs() <= report.columns + slack).all()
    if eps == 1000.0:
        assert not found.weight.any(), "everything is below a thousand times its coefficient"


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_negligible_tiles_are_left_out(kernels: Kernels, strategy: str) -> None:
    p = replace(peaked(), filter_eps=2.0**-12)
    exact, found, report = run(kernels, p, strategy)
    assert found.weight is not None and exact.weight is not None
    gone = ~found.weight.any(1)
    # Ordered by likelihood the ten share a tile, and all classes of other tiles are left out.
    assert gone.sum() >= 400 - 64 and not gone[::40].any()
    assert report.columns[gone].sum() > 0
    torch.testing.assert_close(found.weight[::40], exact.weight[::40])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_is_never_negligible(kernels: Kernels, strategy: str) -> None:
    p = replace(peaked(), filter_eps=1000.0)
    p.hidden[1, 1] = torch.nan
    p.target[1] = 0
    _, found, _ = run(kernels, p, strategy)
    assert found.weight is not None and found.weight.isnan().any()


def test_half_precision_and_small_workspaces(kernels: Kernels) -> None:
    for dtype, workspace in ((torch.bfloat16, None), (torch.float16, 4000), (torch.float16, 0)):
        p = replace(peaked(dtype), filter_eps=2.0**-12, workspace=workspace)
        exact, found, report = run(kernels, p, "chunked")
        assert exact.weight is not None and found.weight is not None
        _, columns = report.bound(p)
        slack = 2 * torch.finfo(dtype).eps * float(exact.weight.abs().max())
        assert ((exact.weight - found.weight).float().norm(dim=1) <= columns + slack).all()
