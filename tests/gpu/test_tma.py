# SPDX-License-Identifier: Apache-2.0
"""Tiles that are loaded through tensor descriptors, by a fixed number of programs: the same contract."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cce_fx.kernels import triton
from cce_fx.kernels.spec import Epilogue, Problem, RowGrads
from cce_fx.kernels.triton import device as machine
from cce_fx.kernels.triton.head import make_head
from cce_fx.kernels.triton.machines import MACHINES
from tests.kernels.contract import ALL, check, problems, small

from .support import Kernels
from .test_contract import few

pytestmark = pytest.mark.gpu
HOW = [{"strategy": "chunked", "products": "triton"}, {"strategy": "chunked", "products": "blas"}]


@pytest.fixture(autouse=True)
def _through_tma(device: torch.device) -> Iterator[None]:
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("this GPU has no tensor descriptors")
    with machine.through_tma():
        yield


def described(p: Problem) -> bool:
    return make_head(p).config.sweep.tma


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": torch.randn(137)},
    "softcap": {"epilogue": Epilogue(0.5, 2.0, 3.0), "top": True},
    "smooth": {"smooth": True},
    "class weights": {"smooth": True, "class_weight": torch.rand(137)},
    "ignored rows": {"ignore_index": 3, "top": True},
    "all rows": {"ignore_index": None},
    "computed though ignored": {"ignore_index": 3, "skip_ignored": False},
    "a small workspace": {"workspace": 1 << 14},
}


@pytest.mark.parametrize("how", HOW, ids=lambda how: how["products"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_as_good_as_dense_arithmetic(
    kernels: Kernels, option: str, dtype: torch.dtype, how: dict[str, str]
) -> None:
    fields = {k: v.to(dtype) if k == "bias" else v for k, v in OPTIONS[option].items()}
    p = small(70, 32, 137, dtype, **fields)
    assert described(kernels.moved(p))
    generator = torch.Generator().manual_seed(1)
    row = lambda: torch.rand(70, generator=generator)  # noqa: E731
    check(p, RowGrads(row(), row(), row() / 137 if p.smooth else None), ALL, kernels, **how)  # type: ignore[arg-type]


@few
@given(drawn=problems(), how=st.sampled_from(HOW))
def test_what_no_descriptor_can_load_is_loaded_otherwise(kernels: Kernels, drawn: Any, how: dict[str, str]) -> None:
    check(*drawn, kernels, **how)


def test_more_tiles_than_programs(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    real = machine.machine_of
    monkeypatch.setattr("cce_fx.kernels.triton.head.machine_of", lambda d: replace(real(d), processors=2))
    check(small(100, 16, 700, torch.bfloat16), RowGrads(torch.ones(100)), ALL, kernels, **HOW[0])  # type: ignore[arg-type]


def test_which_problems_have_descriptors(kernels: Kernels) -> None:
    p = kernels.moved(small(20, 32, 200, torch.bfloat16))
    assert described(p)
    for other in (
        replace(p, weight=p.weight.T.contiguous().T),
        replace(p, weight=p.weight[:, :20], hidden=p.hidden[:, :20]),  # 40 bytes a row are no multiple of 16
        replace(p, weight=p.weight.flatten()[4:-28].view(-1, 32)),  # nor is its address
        replace(p, filter_eps=0.1),
        replace(p, workspace=100),
    ):
        assert not described(other)
    head = make_head(p)
    assert head.packed_bytes == 20 * 32 * 2 and make_head(replace(p, ignore_index=None)).packed_bytes == 0
    assert not make_head(replace(p, hidden=p.hidden.float(), weight=p.weight.float())).config.sweep.tma


def test_the_workspace_holds_the_packed_rows_too(kernels: Kernels) -> None:
    p = kernels.moved(small(40, 32, 2000, torch.bfloat16, workspace=60_000))
    plan = triton.cost.make_plan(make_head(p), ALL, "chunked")
    assert 40 * 32 * 2 < plan.scratch <= 60_000


def test_results_repeat_bit_by_bit(kernels: Kernels) -> None:
    p = small(70, 48, 300, torch.bfloat16, workspace=1 << 14, ignore_index=5)
    first, second = (kernels.forward_backward(p, RowGrads(torch.ones(70)), ALL) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_only_hopper_and_blackwell_have_them() -> None:
    having = {m.arch for m in MACHINES.values() if m.through_tma() is not m}
    assert having == {"sm_90", "sm_100"}
    for m in MACHINES.values():
        assert not any(t.tma for c in m.configs.values() for t in (c.sweep, c.logits, c.heavy, c.weighted))


def test_the_allocator_of_the_program_is_left_alone(kernels: Kernels) -> None:
    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    kernels.forward(small(20, 32, 200, torch.bfloat16))
    assert _allocation._allocator.get() is before
