# SPDX-License-Identifier: Apache-2.0
"""`portable` and `native` against the dense float64 answer, for every option of the contract in `kernels/spec.py`."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from benchmarks.measure import peak_bytes
from cce_fx.kernels import native, reference
from cce_fx.kernels.combine import combine, finish
from cce_fx.kernels.spec import Epilogue, Grads, Kernel, Needs, Problem, RowGrads, Shard, Stats
from tests.kernels.contract import (
    ALL,
    KERNELS,
    assert_as_good,
    check,
    gradient_terms,
    problems,
    serves,
    small,
    stats_terms,
    tensor,
)


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found = KERNELS[request.param]
    if found is native and native.compiled(torch.float32) is None:
        pytest.skip("no compiled code for this processor")
    return found


kernels = pytest.mark.parametrize("name", KERNELS)


@kernels
@settings(max_examples=150, deadline=None)
@given(drawn=problems())
def test_every_option_is_as_good_as_dense_arithmetic(drawn, name):
    if serves(KERNELS[name], drawn[0]):
        check(*drawn, KERNELS[name])


@pytest.mark.sample(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0.0, 0.4])
@pytest.mark.parametrize("rows, width, workspace", [(700, 160, 80), (300, 32, 80), (300, 32, 1000), (300, 200, 9)])
def test_rows_whose_tiles_are_stored_and_rows_whose_are_made_again(
    kernel, dtype, softcap, ignored, rows, width, workspace
):
    generator, classes = torch.Generator().manual_seed(1), 3000
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < ignored] = -100
    problem = Problem(
        tensor((rows, width), dtype, generator) * width**-0.5,
        tensor((classes, width), dtype, generator),
        tensor((classes,), dtype, generator),
        target,
        Epilogue(softcap=softcap),
        smooth=True,
        workspace=workspace * classes * 4,
    )
    check(problem, RowGrads(torch.rand(rows), torch.rand(rows), torch.rand(rows) / classes), ALL, kernel)


def test_the_likeliest_class_is_the_first_of_equals_and_a_nan_is_the_largest(kernel):
    hidden, weight = torch.ones(5, 1), torch.arange(4000.0)[:, None] % 1000
    hidden[2], hidden[3] = 0.0, torch.inf
    problem = Problem(hidden, weight, None, torch.zeros(5, dtype=torch.int64), workspace=1 << 14, top=True)
    found = kernel.forward(problem).top
    assert found.tolist() == [999, 999, 0, 0, 999]  # row 3: inf * 0 is NaN
    weight[700], weight[2500], weight[3000] = torch.inf, torch.nan, torch.nan
    assert kernel.forward(problem).top.tolist() == [2500, 2500, 700, 0, 2500]
    weight.fill_(-torch.inf)
    hidden.fill_(1.0)
    assert kernel.forward(problem).top.tolist() == [0] * 5
    problem = replace(problem, target=torch.tensor([1, -100, 2, -100, 3]), weight=torch.rand(4000, 1))
    best = int(problem.weight.argmax())
    assert kernel.forward(problem).top.tolist() == [best, -1, best, -1, best]
    assert kernel.forward_backward(problem, RowGrads(torch.ones(5)), ALL)[0].top.tolist() == [best, -1, best, -1, best]


@pytest.mark.parametrize("skip", [True, False])
def test_ignored_row_that_is_not_finite_makes_gradients_nan(kernel, skip):
    problem = small(skip_ignored=skip)
    problem.hidden[2, 1] = torch.nan
    problem.target[torch.tensor([1, 2])] = -100
    check(problem, RowGrads(torch.ones(6)), ALL, kernel)
    stats, grads = kernel.forward_backward(problem, RowGrads(torch.ones(6)), ALL)
    assert grads.weight.isnan().all() and stats.nll.isfinite().all()


def test_all_rows_ignored_gives_zeros_whatever_the_row_gradients(kernel):
    problem = small(target=torch.full((6,), -100))
    nan = torch.full((6,), torch.nan)
    stats, grads = kernel.forward_backward(problem, RowGrads(nan), ALL)
    again = kernel.backward(problem, stats.norm, RowGrads(nan), ALL)
    for t in (stats.nll, stats.lse, grads.hidden, grads.weight, again.hidden, again.weight):
        assert not t.any()


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_neither_overflow_nor_cancel(kernel, value):
    hidden, weight = torch.full((3, 1), value), torch.tensor([[1.0], [-1.0], [1.0], [0.5]])
    check(Problem(hidden, weight, None, torch.tensor([0, 1, 3])), RowGrads(torch.ones(3)), ALL, kernel)


@pytest.mark.parametrize("masked", [[0, 3, 4], list(range(8)), list(range(11))])
@pytest.mark.parametrize("workspace", [None, 1])
def test_minus_infinity_from_the_bias_is_probability_zero(kernel, masked, workspace):
    bias = torch.zeros(11)
    bias[masked] = -torch.inf
    check(small(bias=bias, workspace=workspace), RowGrads(torch.ones(6), torch.ones(6)), ALL, kernel)


def test_minus_infinity_over_whole_chunks_of_the_vocabulary(kernel):
    bias = torch.zeros(300)
    bias[:200] = -torch.inf
    problem = small(n=90, v=300, bias=bias, smooth=True, workspace=1)
    problem = replace(problem, class_weight=torch.rand(300))
    check(problem, RowGrads(torch.ones(90), None, torch.zeros(90)), ALL, kernel)


@pytest.mark.parametrize("bad", [11, -1, 2**40])
def test_target_out_of_range_raises_as_eager_does(kernel, bad):
    problem = small()
    problem.target[3] = bad
    with pytest.raises(IndexError, match=rf"^Target {bad} is out of bounds\.$"):
        kernel.forward(problem)


@kernels
@settings(max_examples=40, deadline=None)
@given(drawn=problems(), cuts=st.lists(st.integers(0, 300), max_size=3))
@example(drawn=(small(smooth=True), RowGrads(torch.ones(6), None, torch.ones(6)), ALL), cuts=[4])
def test_shards_combine_to_the_whole(drawn, cuts, name):
    (problem, grads, _), kernel = drawn, KERNELS[name]
    problem = replace(problem, top=False)  # of the whole vocabulary only
    if not serves(kernel, problem):
        return
    v = problem.weight.shape[0]
    edges = sorted({0, v, *(c for c in cuts if c < v)})
    shards = []
    for start, stop in pairwise(edges):
        bias = None if problem.bias is None else problem.bias[start:stop]
        shard = Shard(start, v)
        shards.append(replace(problem, weight=problem.weight[start:stop], bias=bias, shard=shard))
    exact_stats, exact_grads = reference.forward_backward(problem, grads, ALL)
    dense_stats, dense_grads = reference.forward_backward(problem, grads, ALL, problem.hidden.dtype)
    stats = finish(combine([kernel.partial(s) for s in shards]), shards[0])
    for field, a, b, c in zip(Stats._fields, stats, exact_stats, dense_stats, strict=True):
        assert_as_good(a, b, c, field, stats_terms(problem, exact_stats, field, sharded=True))
    parts = [kernel.backward(s, stats.norm, grads, ALL) for s in shards]
    weight = torch.cat([p.weight for p in parts])
    terms = gradient_terms(problem, grads, "weight")
    assert_as_good(weight, exact_grads.weight, dense_grads.weight, "weight", terms)
    if len(shards) == 1:
        terms = gradient_terms(problem, grads, "hidden")
        assert_as_good(parts[0].hidden, exact_grads.hidden, dense_grads.hidden, "hidden", terms)
    elif problem.hidden.dtype == torch.float64:
        total = sum(p.hidden for p in parts)
        torch.testing.assert_close(total, exact_grads.hidden, rtol=1e-9, atol=1e-9)


def test_a_shard_has_no_statistics_of_its_own(kernel):
    problem = small(shard=Shard(0, 22))
    with pytest.raises(ValueError, match=r"combine\(\)"):
        kernel.forward(problem)
    with pytest.raises(ValueError, match="whole vocabulary"):
        kernel.partial(replace(problem, smooth=True, class_weight=torch.ones(11)))


def extra_bytes(kernel: Kernel, problem: Problem, needs: Needs) -> int:
    """The peak of what forward_backward allocates beyond what it returns."""
    rows = RowGrads(torch.ones(problem.target.shape[0]))
    kept = []
    peak = peak_bytes(lambda: kept.append(kernel.forward_backward(problem, rows, needs)))
    return peak - sum(t.nbytes for results in kept[0] for t in results if t is not None)


@pytest.mark.sample(8)
@pytest.mark.parametrize("workspace", [1 << 18, 1 << 20, 1 << 22])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_bounds_the_memory_beyond_results(kernel, workspace, softcap, ignored, dtype):
    generator, n, v = torch.Generator().manual_seed(0), 512, 8000
    target = torch.randint(v, (n,), generator=generator)
    target[torch.rand(n, generator=generator) < ignored] = -100
    problem = Problem(
        tensor((n, 64), dtype, generator),
        tensor((v, 64), dtype, generator),
        None,
        target,
        Epilogue(softcap=softcap),
        workspace=workspace,
    )
    per_row = 256 * n  # sums (of each chunk too), coefficients and targets
    for needs in (ALL, Needs(weight=False), Needs(hidden=False)):
        extra = extra_bytes(kernel, problem, needs)
        assert extra <= workspace + workspace // 16 + per_row, (needs, extra)


def test_few_classes_and_no_room_at_all(kernel):
    """One class, 150 rows: their one tile fits into the gradient of hidden, but nothing into the workspace."""
    problem = replace(small(n=150, d=2, v=1, workspace=1), target=torch.zeros(150, dtype=torch.long))
    check(problem, RowGrads(torch.ones(150)), Needs(True, False, False), kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_by_bit(kernel, dtype):
    problem = small(n=300, d=20, v=1000, dtype=dtype, workspace=1 << 18)
    first, second = (kernel.forward_backward(problem, RowGrads(torch.ones(300)), ALL) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_unwanted_gradients_are_none(kernel):
    problem, rows = small(bias=torch.randn(11)), RowGrads(torch.ones(6))
    for needs in (Needs(*wanted) for wanted in product((False, True), repeat=3)):
        norm = kernel.forward(problem).norm
        for grads in (kernel.forward_backward(problem, rows, needs)[1], kernel.backward(problem, norm, rows, needs)):
            assert isinstance(grads, Grads) and tuple(g is not None for g in grads) == tuple(needs)


@pytest.mark.parametrize("options, match", [({"workspace": 0}, "workspace"), ({"workspace": -5}, "workspace")])
def test_an_option_outside_its_range_is_named(kernel, options, match):
    with pytest.raises(ValueError, match=match):
        kernel.forward(small(**options))
