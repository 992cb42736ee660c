# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels against the dense float64 answer, for every option of the contract in `kernels/spec.py`."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cce_fx.kernels import reference
from cce_fx.kernels.combine import combine, finish
from cce_fx.kernels.spec import Epilogue, Grads, Needs, Norm, Problem, RowGrads, Shard, Stats
from tests.kernels.contract import ALL, assert_as_good, check, gradient_terms, problems, small, stats_terms, tensor

pytestmark = pytest.mark.gpu
HOW = [
    {"strategy": "recompute"},
    {"strategy": "chunked", "products": "triton"},
    {"strategy": "chunked", "products": "blas"},
]
ways = pytest.mark.parametrize("how", HOW, ids=lambda how: "-".join(how.values()))


# The interpreter takes about a second for each problem: too slow to shrink one that fails.
few = settings(max_examples=20, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])


@few
@given(drawn=problems(), how=st.sampled_from(HOW))
def test_every_option_is_as_good_as_dense_arithmetic(kernels, drawn, how):
    check(*drawn, kernels, **how)


@pytest.mark.slow
@settings(max_examples=500, deadline=None)
@given(drawn=problems(), how=st.sampled_from(HOW))
def test_many_options_are_as_good_as_dense_arithmetic(kernels, drawn, how):
    check(*drawn, kernels, **how)


OPTIONS = {
    "bias": {"bias": torch.randn(37)},
    "scale": {"epilogue": Epilogue(scale=0.5)},
    "softcap": {"epilogue": Epilogue(softcap=2.0)},
    "post_scale": {"epilogue": Epilogue(softcap=2.0, post_scale=3.0)},
    "ignore_index": {"ignore_index": 3},
    "no_ignore_index": {"ignore_index": None},
    "skip_ignored": {"ignore_index": 3, "skip_ignored": False},
    "smooth": {"smooth": True},
    "class_weight": {"smooth": True, "class_weight": torch.rand(37)},
    "workspace": {"workspace": 1 << 14},
    "top": {"top": True},
    "tune": {"tune": True},
}


def test_problem_options_are_all_covered():
    known = {field for fields in OPTIONS.values() for field in fields} | {"hidden", "weight", "target"}
    beside = {"shard", "filter_eps"}  # sharded below, filtered in test_filter.py
    assert set(Problem.__dataclass_fields__) == known | beside, "a new option needs a test here, or a clear error"


PAIRS = list(combinations(OPTIONS, 2))


@pytest.mark.parametrize(
    "names, how",
    [((name,), how) for name in OPTIONS for how in HOW] + [(p, HOW[k % len(HOW)]) for k, p in enumerate(PAIRS)],
    ids=lambda value: "-".join(value.values() if isinstance(value, dict) else value),
)
def test_options_alone_and_in_pairs_are_as_good_as_dense_arithmetic(kernels, names, how):
    fields = {k: v for name in names for k, v in OPTIONS[name].items()}
    problem = small(n=19, d=12, v=37, **fields)
    grads = RowGrads(torch.rand(19), torch.rand(19), torch.rand(19) / 37 if problem.smooth else None)
    check(problem, grads, ALL, kernels, **how)


@settings(few, max_examples=10)
@given(drawn=problems(), cuts=st.lists(st.integers(1, 300), max_size=2))
def test_one_two_and_three_shards_combine_to_the_whole(kernels, drawn, cuts):
    problem, grads, _ = drawn
    problem = replace(problem, top=False)  # of the whole vocabulary only
    v = problem.weight.shape[0]
    shards = []
    for start, stop in pairwise(sorted({0, v, *(c for c in cuts if c < v)})):
        bias = None if problem.bias is None else problem.bias[start:stop]
        shards.append(replace(problem, weight=problem.weight[start:stop], bias=bias, shard=Shard(start, v)))
    exact_stats, exact_grads = reference.forward_backward(problem, grads, ALL)
    dense_stats, dense_grads = reference.forward_backward(problem, grads, ALL, problem.hidden.dtype)
    stats = finish(combine([kernels.partial(s) for s in shards]), shards[0])
    for name, a, b, c in zip(Stats._fields, stats, exact_stats, dense_stats, strict=True):
        assert_as_good(a, b, c, name, stats_terms(problem, exact_stats, name, sharded=True))
    parts = [kernels.backward(s, stats.norm, grads, ALL) for s in shards]
    terms = gradient_terms(problem, grads, "weight")
    assert_as_good(torch.cat([p.weight for p in parts]), exact_grads.weight, dense_grads.weight, "weight", terms)


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_repeat_bit_by_bit(kernels, how, dtype):
    generator = torch.Generator().manual_seed(0)
    problem = Problem(
        tensor((70, 40), dtype, generator),
        tensor((300, 40), dtype, generator),
        tensor((300,), dtype, generator),
        torch.randint(300, (70,), generator=generator),
        workspace=1 << 14,
        top=True,
    )
    first, second = (kernels.forward_backward(problem, RowGrads(torch.ones(70)), ALL, **how) for _ in range(2))
    for a, b in zip((*first[0], *first[1]), (*second[0], *second[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [1e4, -1e4])
def test_huge_logits_neither_overflow_nor_cancel(kernels, value):
    hidden, weight = torch.full((3, 1), value), torch.tensor([[1.0], [-1.0], [1.0], [0.5]])
    for how in HOW:
        check(Problem(hidden, weight, None, torch.tensor([0, 1, 3])), RowGrads(torch.ones(3)), ALL, kernels, **how)


@pytest.mark.parametrize("masked", [[0, 3, 4], list(range(8)), list(range(11))])
def test_minus_infinity_from_the_bias_is_probability_zero(kernels, masked):
    bias = torch.zeros(11)
    bias[masked] = -torch.inf
    for how in HOW:
        check(small(bias=bias), RowGrads(torch.ones(6), torch.ones(6)), ALL, kernels, **how)


@ways
def test_unwanted_gradients_are_none(kernels, how):
    problem, rows = small(bias=torch.randn(11)), RowGrads(torch.ones(6))
    for hidden in (False, True):
        for weight in (False, True):
            needs = Needs(hidden, weight, not weight)
            for grads in (
                kernels.forward_backward(problem, rows, needs, **how)[1],
                kernels.backward(problem, Norm(rows.nll, rows.nll), rows, needs, **how),
            ):
                assert isinstance(grads, Grads) and tuple(g is not None for g in grads) == tuple(needs)
