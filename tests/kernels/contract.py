# SPDX-License-Identifier: Apache-2.0
"""What every kernel is held to: problems with any of the options of `kernels/spec.py`, and agreement with float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from cce_fx.kernels import native, portable, reference
from cce_fx.kernels.combine import finish, statistics_dtype
from cce_fx.kernels.spec import Epilogue, Kernel, Needs, Problem, RowGrads, Stats

ALL = Needs()
_FEW = 8  # ulp of the numbers that a result is made of


def assert_as_good(
    found: Tensor | None, exact: Tensor | None, dense: Tensor | None, what: str, terms: float = 0.0
) -> None:
    """`found` is off from the float64 `exact` by no more than `dense` arithmetic in its dtype, and a few ulp.

    `terms` is the size of what `found` is a difference of, where the contract itself rounds those.
    """
    assert (found is None) == (exact is None), what
    if found is None or exact is None or dense is None:
        return
    assert found.shape == exact.shape, what
    assert torch.equal(found.isnan(), exact.isnan()), f"{what}: NaN in other places"
    finite = exact.isfinite()
    assert torch.equal(found.double()[exact.isinf()], exact[exact.isinf()]), f"{what}: other infinities"
    if not finite.any():
        return
    exact, error = exact[finite], (found.double()[finite] - exact[finite]).abs()
    dense = dense.double()[finite]
    allowed = (dense - exact).abs().nan_to_num(torch.inf).max()
    kind, size = torch.finfo(found.dtype), max(float(exact.abs().max()), terms)
    few_ulp = _FEW * kind.eps * size + 64 * kind.tiny
    if found.dtype == torch.float64:  # where the answer itself is of this dtype, and tells nothing of its error
        few_ulp = 1e-12 * max(size, 1.0)
    assert error.max() <= allowed + few_ulp, f"{what}: off by {error.max():.3g}, dense by {allowed:.3g} + {few_ulp:.3g}"


def assert_likeliest(found: Tensor | None, exact: Tensor | None, problem: Problem, what: str) -> None:
    """Each class that is found has a logit as large as the largest, but for the rounding of logits."""
    assert (found is None) == (exact is None) == (not problem.top), what
    if found is None or exact is None:
        return
    assert found.dtype == torch.int64 and torch.equal(found < 0, exact < 0), what
    rows = (exact >= 0).nonzero()[:, 0]
    z = reference.logits(problem)[rows]
    one, other = (z.gather(1, t[rows, None])[:, 0] for t in (found, exact))
    near = (one - other).abs() <= 4 * torch.finfo(statistics_dtype(problem.hidden.dtype)).eps * (
        1 + logit_terms(problem)
    )
    assert bool((near | (found[rows] == exact[rows])).all()), f"{what}: other classes"


def logit_terms(problem: Problem) -> float:
    """The size of what a logit is a sum of: its dot product is rounded by this much in any order of summation.

    A loss of two equal logits shows it: dense arithmetic may round both alike, another order of the same sum need not.
    """
    p, e = problem, problem.epilogue
    if p.target.numel() == 0 or (p.hidden.shape[1] == 1 and p.bias is None):  # one term has no order
        return 0.0
    sums = p.hidden.double().abs() @ p.weight.double().abs().T
    if p.bias is not None:
        sums = sums + p.bias.double().abs().nan_to_num(posinf=0)
    return abs(e.scale * e.post_scale) * float(sums.nan_to_num(0, 0, 0).max())


def stats_terms(problem: Problem, exact: Stats, field: str, sharded: bool = False) -> float:
    """The size of what a field of Stats is a sum or difference of; `sharded` where it went through Partials."""
    if field == "smooth":
        return smooth_terms(problem, exact) if sharded else 0.0
    terms = logit_terms(problem)
    if field == "sumexp" and exact.sumexp.numel():  # exp(z - max) is off by the error of z, relative to itself
        terms *= float(exact.sumexp.nan_to_num(0, 0, 0).max())
    return terms


def smooth_terms(problem: Problem, stats: Stats) -> float:
    """The size of sum(w) lse, of which a shard's sum of logits is taken; both are rounded in Partials."""
    weight = problem.weight.shape[0] if problem.class_weight is None else float(problem.class_weight.sum())
    return weight * float(stats.lse.nan_to_num(0, 0, 0).abs().max()) if stats.lse.numel() else 0.0


def gradient_terms(problem: Problem, grads: RowGrads, field: str) -> float:
    """The size of what a gradient is a sum of: probability and one-hot times row gradient times the other factor.

    A sum of k numbers is off by up to k/2 ulp of it, in the dtype of accumulation, and that much is left where a gradient
    cancels to zero: with all classes alike every rounding of the sum may go the same way. And a probability is off by the
    error of its logit, relative to itself.
    """
    if problem.target.numel() == 0:
        return 0.0
    classes, e = problem.weight.shape[0], problem.epilogue
    row = grads.nll.abs().max() + (0 if grads.lse is None else grads.lse.abs().max())
    row = row + (0 if grads.smooth is None else grads.smooth.abs().max() * classes)
    factor = {"hidden": problem.weight, "weight": problem.hidden, "bias": torch.ones(1)}[field]
    size = float((row * abs(e.scale * e.post_scale) * factor.double().abs().max()).nan_to_num(0, 0, 0))
    ulps = (classes if field == "hidden" else problem.target.numel()) / 2 + logit_terms(problem)
    exact, own = (torch.finfo(t).eps for t in (statistics_dtype(problem.hidden.dtype), problem.hidden.dtype))
    return size * (1 + ulps * exact / (_FEW * own))


# Those that run on any machine.
KERNELS: dict[str, Kernel] = {"portable": portable, "native": native}
NATIVE = (torch.float32, torch.bfloat16, torch.float16)


def serves(kernel: Kernel, problem: Problem) -> bool:
    """Whether a kernel is made for a problem, on this machine."""
    p = problem
    return kernel is not native or (p.hidden.dtype in NATIVE and native.compiled(p.hidden.dtype) is not None)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check(problem: Problem, grads: RowGrads, needs: Needs, kernel: Kernel, **how: str) -> None:
    """Every entry point of `kernel` agrees with the reference; `how` goes to its backward."""
    exact_stats, exact_grads = reference.forward_backward(problem, grads, needs)
    dense_stats, dense_grads = reference.forward_backward(problem, grads, needs, problem.hidden.dtype)
    stats = kernel.forward(problem)
    found = {
        "forward_backward": kernel.forward_backward(problem, grads, needs, **how),
        "forward, backward": (stats, kernel.backward(problem, stats.norm, grads, needs, **how)),
        "partial": (finish(kernel.partial(problem), problem), None),
    }
    for name, got in found.items():
        for part, exact, dense in zip(got, (exact_stats, exact_grads), (dense_stats, dense_grads), strict=True):
            if part is not None:
                for field, a, b, c in zip(part._fields, part, exact, dense, strict=True):
                    if field == "top":
                        if name != "partial":
                            assert_likeliest(a, b, problem, name)
                        continue
                    if part is got[1]:
                        terms = gradient_terms(problem, grads, field)
                    else:
                        terms = stats_terms(problem, exact_stats, field, sharded=name == "partial")
                    assert_as_good(a, b, c, f"{name}: {field}", terms)
        assert {t.dtype for t in got[0][:5]} == {statistics_dtype(problem.hidden.dtype)}, name
        for g, of in zip(got[1] or (), (problem.hidden, problem.weight, problem.bias), strict=False):
            assert g is None or (g.dtype == of.dtype and g.is_contiguous())


def tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, layout: str = "rows") -> Tensor:
    """Normal values; `layout` is how they lie in memory."""
    full = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    if layout == "columns":
        return full.T.contiguous().T
    if layout == "strided" and len(shape) == 2:
        return full.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    if layout == "expanded" and shape[0]:
        return full[:1].expand(shape)
    return full


layouts = st.sampled_from(["rows", "columns", "strided", "expanded"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Problem, RowGrads, Needs]:
    """A problem with any of the options, row gradients that fit, and wanted gradients."""
    n, v = draw(st.sampled_from([0, 1, 2, 17, 90, 150])), draw(st.integers(1, 300))
    d = draw(st.integers(1, 40) | st.sampled_from([64, 100, 257]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ignore = draw(st.sampled_from([-100, 0, v + 5, None]))
    target = torch.randint(0, v, (n,), generator=generator)
    if ignore is not None:
        target[torch.rand(n, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = ignore
    smooth, top = draw(st.booleans()), draw(st.booleans())
    stats_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    weighted = draw(st.booleans())
    problem = Problem(
        hidden=tensor((n, d), dtype, generator, draw(layouts)),
        weight=tensor((v, d), dtype, generator, draw(layouts)),
        bias=tensor((v,), dtype, generator) if draw(st.booleans()) else None,
        target=target,
        epilogue=Epilogue(
            draw(st.sampled_from([1.0, 0.25, -1.0])),
            draw(st.sampled_from([None, 2.0])),
            draw(st.sampled_from([1.0, 3.0])),
        ),
        ignore_index=ignore,
        skip_ignored=draw(st.booleans()),
        smooth=smooth,
        top=top,
        class_weight=torch.rand(v, generator=generator).to(stats_dtype) if smooth and weighted else None,
        workspace=draw(st.sampled_from([None, 1, 1 << 12, 1 << 14, 1 << 16, 1 << 18])),
    )
    row = lambda: torch.randn(n, generator=generator).to(stats_dtype)  # noqa: E731
    grads = RowGrads(row(), row() if draw(st.booleans()) else None, row() / v if smooth else None)
    return problem, grads, Needs(*(draw(st.booleans()) for _ in range(3)))


def small(n: int = 6, d: int = 5, v: int = 11, dtype: torch.dtype = torch.float32, **options: object) -> Problem:
    """A problem of that size with normal hidden states and weights."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = tensor((n, d), dtype, generator), tensor((v, d), dtype, generator)
    return replace(Problem(hidden, weight, None, torch.randint(v, (n,), generator=generator)), **options)
