# SPDX-License-Identifier: Apache-2.0
"""Products of bfloat16 matrices in float32, and bfloat16 problems on processors without them."""

from __future__ import annotations

import ctypes
import platform
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_fx.kernels import halves, reference, tiled
from cce_fx.kernels.spec import Epilogue, Needs, RowGrads
from tests.kernels.contract import check, small, tensor

here = pytest.mark.skipif(halves._routine() is None, reason="this processor has no products of bfloat16 numbers")


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the name is of Linux's library for x86"
)
def test_this_torch_has_the_routine() -> None:
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so"))
    assert getattr(library, halves.NAME), "torch lost at::native::cpublas::brgemm for bfloat16"


@here
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(*[st.integers(1, 70)] * 3),
    st.sampled_from(["rows", "columns", "strided"]),
    st.booleans(),
    st.integers(0, 99),
)
def test_a_product_is_summed_up_in_float32(sizes: tuple[int, int, int], layout: str, add: bool, seed: int) -> None:
    m, k, n = sizes
    generator = torch.Generator().manual_seed(seed)
    a = tensor((m, k), torch.bfloat16, generator, layout)
    b = halves.rows_of(tensor((k, n), torch.bfloat16, generator, layout))
    out = torch.randn(m, 2 * n, generator=generator)[:, :n]  # rows that lie apart
    expected = a.double() @ b.double() + (out.double() if add else 0)
    halves.product(out, halves.rows_of(a), b, add)
    size = a.double().abs() @ b.double().abs() + 1
    assert ((out - expected).abs() <= k * torch.finfo(torch.float32).eps * size).all()


@here
def test_conversion_keeps_the_transpose() -> None:
    tile = torch.randn(5, 9)
    assert torch.equal(halves.converted(tile.T), tile.bfloat16().T) and halves.converted(tile.T).is_contiguous()


@here
def test_statistics_of_bfloat16_inputs_are_those_of_float32() -> None:
    p = small(64, 48, 3000, torch.bfloat16)
    exact = reference.stats(p)
    found = tiled.forward(p)
    assert (found.nll - exact.nll).abs().max() < 1e-5  # logits rounded to bfloat16 would be off by 1e-2


PROBLEMS = {
    "at once": {"n": 40, "d": 9, "v": 300},
    "in blocks": {"n": 200, "d": 9, "v": 300, "workspace": 1 << 16},
    "too wide for all sums at once": {"n": 90, "d": 40, "v": 120, "workspace": 1 << 13},
    "with a cap": {"n": 90, "d": 40, "v": 120, "workspace": 1 << 15, "epilogue": Epilogue(0.5, 2.0, 3.0)},
}


@pytest.mark.parametrize("routine", [pytest.param(True, marks=here), False], ids=["bfloat16", "converted"])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("needs", [Needs(), Needs(hidden=False), Needs(weight=False)], ids=str)
def test_with_the_routine_and_without(routine: bool, name: str, needs: Needs) -> None:
    p = small(dtype=torch.bfloat16, **PROBLEMS[name])  # type: ignore[arg-type]
    grads = RowGrads(torch.randn(len(p.target), generator=torch.Generator().manual_seed(1)))
    if routine:
        check(p, grads, needs)
    else:
        with mock.patch.object(halves, "_routine", lambda: None):
            assert not halves.usable(p)
            check(p, grads, needs)
