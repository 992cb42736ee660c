# SPDX-License-Identifier: Apache-2.0
"""The compiled walks over a tile: against the torch operations that they stand for, and under the whole contract."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_fx.kernels.elementwise import Torch
from cce_fx.kernels.native import build, walks
from cce_fx.kernels.spec import Problem
from tests.kernels.contract import check, problems, small

COMPILED = walks.compiled()


def forced():
    return mock.patch.object(build, "FEWEST_LOGITS", 0)


@st.composite
def tiles(draw):
    """Logits (C, R) with rows that do not fill a vector, masked classes, rows without any class, NaN and wide ranges."""
    columns, rows = draw(st.integers(1, 300)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tile = torch.randn(columns, rows, generator=generator) * draw(st.sampled_from([0.0, 1.0, 20.0, 1e4]))
    if draw(st.booleans()):
        tile[torch.rand(columns, rows, generator=generator) < 0.2] = -torch.inf
    if draw(st.booleans()):
        tile[:, draw(st.integers(0, rows - 1))] = -torch.inf
    if draw(st.booleans()):
        tile[draw(st.integers(0, columns - 1)), draw(st.integers(0, rows - 1))] = torch.nan
    before = torch.randn(rows, generator=generator) if draw(st.booleans()) else None
    weights = torch.rand(columns, generator=generator) if draw(st.booleans()) else None
    return tile, before, weights


def sums_of(elementwise, tile, before, weights, weighted, keep=True):
    tile, rows = tile.clone(), tile.shape[1]
    out = [torch.full((rows,), 7.0, dtype=tile.dtype) for _ in range(3)]
    elementwise.exp_sums(tile, before, out[0], out[1], out[2] if weighted else None, weights, keep)
    return (*out, tile)


@settings(max_examples=150, deadline=None)
@given(tiles(), st.booleans(), st.booleans())
def test_sums_and_exponentials_are_those_of_torch_operations(drawn, weighted, keep):
    tile, before, weights = drawn
    found = sums_of(COMPILED, tile, before, weights, weighted, keep)
    double = sums_of(Torch(), tile.double(), None if before is None else before.double(),
                     None if weights is None else weights.double(), weighted)  # fmt: skip
    torch.testing.assert_close(found[0], double[0].float(), rtol=0, atol=0, equal_nan=True)
    top = float(tile.abs().nan_to_num(0, 0, 0).max())
    near = {"rtol": 4e-6 + 2e-7 * top, "atol": 1e-30, "equal_nan": True}  # exp of a difference rounded at the size of z
    torch.testing.assert_close(found[1], double[1].float(), **near)
    if keep:
        visible = double[3].nan_to_num(1.0) > 1e-30  # smaller ones are zero in either, each below its own floor
        torch.testing.assert_close(found[3][visible], double[3][visible].float(), **near)
        assert bool((found[3][~visible] <= 1e-29).all())
    if weighted:
        torch.testing.assert_close(found[2], double[2].float(), rtol=1e-5, atol=1e-5 * (1 + top), equal_nan=True)
    else:
        assert bool((found[2] == 7.0).all())


@settings(max_examples=50, deadline=None)
@given(tiles())
def test_probabilities_are_those_of_torch_operations(drawn):
    tile = drawn[0].clamp(-60, 0)
    highest, factor = tile.amax(0), torch.rand(tile.shape[1]) - 0.5
    found, expected = tile.clone(), tile.double()
    COMPILED.probabilities(found, highest, factor)
    Torch().probabilities(expected, highest.double(), factor.double())
    torch.testing.assert_close(found, expected.float(), rtol=2e-5, atol=1e-30, equal_nan=True)


@settings(max_examples=60, deadline=None)
@given(problems())
def test_the_kernel_with_compiled_walks_is_as_good_as_dense_arithmetic(drawn):
    with forced():
        check(*drawn)


def test_sums_do_not_depend_on_the_number_of_threads():
    tile, threads = torch.randn(3000, 70), torch.get_num_threads()
    two = sums_of(COMPILED, tile, None, None, True)
    try:
        torch.set_num_threads(1)
        one = sums_of(COMPILED, tile, None, None, True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_small_problems_and_other_dtypes_compile_nothing():
    assert isinstance(walks.elementwise(small()), Torch)
    with forced():
        assert isinstance(walks.elementwise(small()), walks.Native)
        assert isinstance(walks.elementwise(small(dtype=torch.float64)), Torch)


def test_without_a_compiler_torch_operations_serve(monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", missing)
    caches = build.library, walks.compiled
    for cache in caches:
        cache.cache_clear()
    try:
        with forced(), mock.patch.object(build._log, "info") as said:
            assert isinstance(walks.elementwise(small()), Torch)
        assert "no compiler" in str(said.call_args)
    finally:
        for cache in caches:
            cache.cache_clear()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_converted_and_then_compiled(dtype):
    with forced():
        problem: Problem = small(n=40, d=8, v=300, dtype=dtype)
        assert isinstance(walks.elementwise(problem), walks.Native)
