# SPDX-License-Identifier: Apache-2.0
"""The operators, as torch.library sees them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx.op

D, V, N = 6, 40, 9


def problem(dtype: torch.dtype = torch.float32, *, smooth: bool = False, bias: bool = True) -> list[Any]:
    gen = torch.Generator().manual_seed(0)
    h, w, b = (torch.randn(*s, generator=gen).to(dtype).requires_grad_() for s in ((N, D), (V, D), (V,)))
    y = torch.randint(0, V, (N,), generator=gen)
    y[2] = -100
    class_weight = torch.rand(V, generator=gen).to(torch.float64 if dtype == torch.float64 else torch.float32)
    head = [-100, True, smooth, 0.5, 3.0, 2.0, True, None, None, False, smooth]
    return [h, w, b if bias else None, y, class_weight if smooth else None, *head]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_per_token(dtype: torch.dtype, smooth: bool, bias: bool) -> None:
    args = tuple(problem(dtype, smooth=smooth, bias=bias))
    torch.library.opcheck(torch.ops.cce.linear_cross_entropy.default, args, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("smooth", [False, True])
def test_opcheck_with_grads(dtype: torch.dtype, smooth: bool) -> None:
    args = problem(dtype, smooth=smooth)
    rows = torch.rand(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    extra = (rows, rows if smooth else None, rows if smooth else None, True, True, True)
    torch.library.opcheck(torch.ops.cce.linear_cross_entropy_with_grads.default, (*args, *extra), rtol=2e-2, atol=2e-2)


@pytest.mark.sample(2)
@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_functional_gradcheck(strategy: str, reduction: str, smoothing: float) -> None:
    h, w, b, y, *_ = problem(torch.float64)

    def loss(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return cce_fx.linear_cross_entropy(
            h,
            w,
            y,
            bias=b,
            reduction=reduction,
            label_smoothing=smoothing,
            softcap=3.0,
            strategy=strategy,  # type: ignore[arg-type]
        )

    assert torch.autograd.gradcheck(loss, (h, w, b))


def test_all_statistics_have_their_gradient() -> None:
    args = problem(torch.float64, smooth=True)

    def stats(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.cce.linear_cross_entropy.default(h, w, b, *args[3:])

    assert torch.autograd.gradcheck(stats, tuple(args[:3]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_linear_does(dtype: torch.dtype) -> None:
    h, w, b, y, *_ = problem()
    with torch.autocast("cpu", dtype):
        ours = cce_fx.linear_cross_entropy(h, w, y, bias=b)
        eager = F.cross_entropy(F.linear(h, w, b).float(), y)
        exact = F.cross_entropy(F.linear(h.to(dtype).double(), w.to(dtype).double(), b.to(dtype).double()), y)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs() <= (eager - exact).abs() + 1e-5
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(ours, (h, w, b)))


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda a: a.__setitem__(0, a[0][None]), ValueError),
        (lambda a: a.__setitem__(1, a[1].double()), TypeError),
        (lambda a: a.__setitem__(3, a[3].int()), TypeError),
        (lambda a: a.__setitem__(3, a[3][1:]), RuntimeError),
        (lambda a: a.__setitem__(2, a[2][1:]), RuntimeError),
        (lambda a: a.__setitem__(0, a[0].to(torch.complex64)), TypeError),
        (lambda a: a.__setitem__(3, a[3] + 1000), IndexError),
    ],
)
def test_bad_arguments_raise(change: Any, error: type[Exception]) -> None:
    args = problem()
    change(args)
    with pytest.raises(error):
        torch.ops.cce.linear_cross_entropy.default(*args)


def test_functional_refuses_what_cross_entropy_refuses() -> None:
    h, w, _, y, *_ = problem()
    for kwargs in ({"reduction": "avg"}, {"label_smoothing": 1.5}, {"strategy": "x"}, {"softcap": 0.0}):
        with pytest.raises(ValueError, match=next(iter(kwargs))):
            cce_fx.linear_cross_entropy(h, w, y, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="target"):
        cce_fx.linear_cross_entropy(h, w, y[1:])


def test_retained_graph_gives_the_same_gradients_twice() -> None:
    h, w, _, y, *_ = problem()
    loss = cce_fx.linear_cross_entropy(h, w, y)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    again = torch.autograd.grad(loss * 2, (h, w))
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(2 * a, b)
