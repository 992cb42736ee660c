# SPDX-License-Identifier: Apache-2.0
"""The bounded filter of the tiled kernel: within its bound, near the exact gradient, and exact where it should be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import peak_bytes
from cce_fx.kernels import tiled
from cce_fx.kernels.elementwise import LEVELS, Torch
from cce_fx.kernels.native import build, walks
from cce_fx.kernels.plan import FEWEST_HELD_ROWS
from cce_fx.kernels.spec import Epilogue, Grads, Needs, Problem, RowGrads
from tests.kernels.contract import ALL, WAYS, problems, small

COMPILED = walks.compiled()


@pytest.fixture(params=["compiled", "in torch operations"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with WAYS[request.param]():
        yield request.param


def run(p: Problem, grads: RowGrads, needs: Needs = ALL) -> tuple[Grads, Grads, list]:
    report: list = []
    stats, found = tiled.forward_backward(p, grads, needs, report=report)
    plain, exact = tiled.forward_backward(replace(p, filter_eps=None), grads, needs)
    for a, b in zip(stats, plain, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    return exact, found, report


def zipf(n: int, d: int, v: int, **kwargs) -> Problem:
    """Classes of very unequal frequency, as a trained head has them."""
    p = small(n, d, v, bias=-2 * torch.arange(1, v + 1).log(), **kwargs)
    return replace(p, hidden=p.hidden / 4)


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([0.0, 1e-3, 0.1, 0.5, 0.9]), st.integers(0, 2**31))
def test_the_error_is_within_the_bound(drawn: tuple, eps: float, seed: int) -> None:
    p, generator = drawn[0], torch.Generator().manual_seed(seed)
    p = replace(p, hidden=p.hidden.double(), weight=p.weight.double(), bias=None if p.bias is None else p.bias.double(),
                class_weight=None if p.class_weight is None else p.class_weight.double(), shard=None, filter_eps=eps)  # fmt: skip
    nll = torch.randn(p.hidden.shape[0], generator=generator, dtype=torch.float64)
    grads = RowGrads(nll, nll.abs(), nll if p.smooth else None)
    exact, found, report = run(p, grads)
    if not report or not all(bool(g.isfinite().all()) for g in (exact.hidden, exact.weight)):
        return
    rows, columns = report[0].bound(p)
    slack = 1e-9 * (1 + float(exact.weight.abs().sum()) + float(exact.hidden.abs().sum()))
    assert ((exact.hidden - found.hidden).norm(dim=1) <= rows + slack).all()
    assert ((exact.weight - found.weight).norm(dim=1) <= columns + slack).all()


@pytest.mark.parametrize("workspace", [None, 1_200_000])
def test_no_row_loses_more_than_eps_and_the_mean_stands_for_it(workspace: int | None) -> None:
    p = zipf(300, 8, 1000, workspace=workspace)
    scale = torch.rand(300) + 0.5
    for eps in (0.02, 0.1, 0.3):
        exact, found, report = run(replace(p, filter_eps=eps), RowGrads(scale))
        lost = report[0].rows / scale
        assert 0 < lost.max() <= eps * (1 + 1e-5) and report[0].columns.sum() <= eps / 2 * scale.sum() * (1 + 1e-5)
        for a, b in zip(exact, found, strict=True):
            assert (a - b).norm() < 0.5 * eps * a.norm()
        without = exact.weight[report[0].columns > 0]
        assert len(without) and not torch.equal(without, found.weight[report[0].columns > 0])


# Nothing counts the products of compiled code.
@pytest.mark.parametrize("way", ["in torch operations"], indirect=True)
def test_products_are_of_the_classes_that_matter_only(way: str) -> None:
    p = zipf(256, 16, 4000, workspace=8 << 20)
    flops = []
    for eps in (None, 0.2):
        with FlopCounterMode(display=False) as counter:
            tiled.forward_backward(replace(p, filter_eps=eps), RowGrads(torch.ones(256)), Needs(True, True, False))
        flops.append(counter.get_total_flops())
    assert flops[1] < 0.5 * flops[0]


@pytest.mark.parametrize(
    "needs", [Needs(True, False, False), Needs(False, True, False), Needs(False, False, True), ALL]
)
@pytest.mark.parametrize("options", [{}, {"epilogue": Epilogue(softcap=5.0)}, {"smooth": True}])
def test_each_gradient_alone_and_every_epilogue(needs: Needs, options: dict) -> None:
    p = replace(zipf(130, 8, 500, **options), filter_eps=0.1)
    grads = RowGrads(torch.ones(130), smooth=torch.full((130,), 1e-3) if "smooth" in options else None)
    exact, found, report = run(p, grads, needs)
    assert report and report[0].rows.max() > 0
    for a, b in zip(exact, found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).norm() < 0.05 * a.norm()


# Compiled code stays exact: see test_fused.py.
@pytest.mark.parametrize("way", ["in torch operations"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, way: str) -> None:
    p = zipf(64, 8, 500)
    p = replace(p, hidden=p.hidden.to(dtype), weight=p.weight.to(dtype), bias=p.bias.to(dtype), filter_eps=0.1)
    exact, found, report = run(p, RowGrads(torch.ones(64)))
    assert report and report[0].rows.max() > 0
    for a, b in zip(exact, found, strict=True):
        assert b.dtype == dtype and (a - b).float().norm() < (0.05 + 2 * torch.finfo(dtype).eps) * a.float().norm()


def test_ignored_rows_are_left_out_and_have_no_gradient() -> None:
    p = zipf(300, 8, 500)
    target = p.target.clone()
    target[::3] = -100
    exact, found, _ = run(replace(p, target=target, filter_eps=0.1), RowGrads(torch.ones(300)))
    assert not found.hidden[::3].any()
    assert (exact.hidden - found.hidden).norm() < 0.05 * exact.hidden.norm()


def test_with_few_rows_in_a_block_it_is_exact(way: str) -> None:
    p = replace(zipf(FEWEST_HELD_ROWS * 2, 8, 4000), workspace=400_000, filter_eps=0.5)
    exact, found, report = run(p, RowGrads(torch.ones(FEWEST_HELD_ROWS * 2)), Needs(True, False, False))
    assert all(float(r.rows.sum()) == 0 for r in report)
    # Compiled code has other steps then, since the filter has a part of the workspace.
    off = 1e-4 if way == "compiled" else 0.0
    torch.testing.assert_close(exact.hidden, found.hidden, rtol=off, atol=off)


@pytest.mark.parametrize("workspace", [4 << 20, 8 << 20])
def test_it_keeps_to_the_workspace(workspace: int) -> None:
    p = replace(zipf(400, 16, 4000), workspace=workspace, filter_eps=0.1)
    grads = p.hidden.nbytes + p.weight.nbytes
    rows = 20 * 4 * 400  # statistics and what is reported
    call = lambda: tiled.forward_backward(p, RowGrads(torch.ones(400)), Needs(True, True, False))  # noqa: E731
    assert peak_bytes(call) - grads <= workspace + rows


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(1, 70), st.integers(0, 2**31))
def test_compiled_walks_are_those_of_torch_operations(columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tile = torch.rand(columns, rows, generator=generator).pow(torch.randint(1, 40, (columns, 1), generator=generator))
    factor = torch.rand(rows, generator=generator)
    made = []
    for elementwise in (COMPILED, Torch()):
        levels = (torch.arange(columns) % 7 == 3).to(torch.uint8)
        sums, mass = torch.empty(columns), torch.zeros(LEVELS, rows)
        elementwise.levels(tile, factor, levels, sums, mass)
        index = (levels < 20).nonzero()[:, 0]
        made.append((levels, sums, mass, elementwise.keep(tile.clone(), index, factor)))
    torch.testing.assert_close(made[0][1], made[1][1], rtol=1e-5, atol=1e-30)
    sure = made[0][0] == made[1][0]
    assert sure.float().mean() > 0.9  # a sum near a level's edge may fall to either side
    if bool(sure.all()):
        torch.testing.assert_close(made[0][2], made[1][2], rtol=1e-5, atol=1e-30)
        torch.testing.assert_close(made[0][3], made[1][3], rtol=1e-6, atol=0)


def test_results_do_not_depend_on_the_compiler() -> None:
    p, grads = replace(zipf(200, 8, 1000), filter_eps=0.1), RowGrads(torch.ones(200))
    with mock.patch.object(build, "FEWEST_LOGITS", 0):
        _, compiled, _ = run(p, grads)
    _, plain, _ = run(p, grads)
    for a, b in zip(compiled, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
