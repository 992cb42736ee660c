# SPDX-License-Identifier: Apache-2.0
"""Losses that are, or go through, an `autograd.Function`: its backward is the gradient that counts, row by row as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx
from cce_fx.functional import OWN_GRADIENT, RowProgram
from cce_fx.passes.programs.own_gradient import is_in_proportion
from tests import row_programs
from tests.row_losses import Data, Heads, Loss, data
from tests.test_row_programs import OPTIONS, check, outcome


class SavedSoftmax(torch.autograd.Function):
    """Cross entropy as tensor-parallel libraries write it: in place, with what the gradient needs."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        z = logits - logits.max(-1, keepdim=True).values
        rows = torch.arange(z.size(0))
        picked = z[rows, target]
        p = z.exp()
        total = p.sum(-1)
        p.div_(total.unsqueeze(-1))
        ctx.save_for_backward(p, target)
        return total.log() - picked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, target = ctx.saved_tensors
        d = p.clone()
        d[torch.arange(d.size(0)), target] -= 1
        return d.mul_(grad.unsqueeze(-1)), None


class Weighted(torch.autograd.Function):
    """Two results, one of which is a metric, and a gradient for a number of each row."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp = logits.log_softmax(-1)
        nll = -logp.gather(-1, target[:, None]).squeeze(-1)
        right = logits.argmax(-1) == target
        ctx.save_for_backward(logp, weight, nll, target)
        ctx.mark_non_differentiable(right)
        return nll * weight, right

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        logp, weight, nll, target = ctx.saved_tensors
        d = logp.exp() - F.one_hot(target, logp.size(-1))
        return d * (grad * weight)[:, None], grad * nll, None


class WithConstant(torch.autograd.Function):
    """A result through which no gradient flows, though the backward would take one."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        p = logits.softmax(-1)
        largest = p.amax(-1)
        ctx.save_for_backward(p)
        ctx.mark_non_differentiable(largest)
        return logits.logsumexp(-1), largest

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_largest: Tensor) -> Tensor:
        (p,) = ctx.saved_tensors
        return p * (grad + of_largest)[:, None]


class Clipped(torch.autograd.Function):
    """A gradient that is not in proportion to what comes from above."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.sigmoid().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return (grad[:, None] * z).clamp(-1e-2, 1e-2)


class Chosen(torch.autograd.Function):
    """A gradient of which the incoming one decides."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.square().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        each = grad[:, None].expand_as(z)
        return torch.where(each > 0.02, each * z, 0.0)


class Ready(torch.autograd.Function):
    """The gradient is made in the forward, and the incoming one ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1))
        return logits.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return ctx.saved_tensors[0] * 0.25


class Even(torch.autograd.Function):
    """A gradient that is made from nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.shape = logits.shape
        return logits.tanh().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.full(ctx.shape, 0.5, dtype=grad.dtype)


class Scaled(torch.autograd.Function):
    """Logits as they are, with less of a gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.1


class Distilled(torch.autograd.Function):
    """Of two heads, only one of which learns."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, mask: Tensor, temperature: float) -> Tensor:
        p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        ctx.save_for_backward(p, q, mask)
        ctx.temperature = temperature
        return (q * (q.log() - p.log())).sum(-1) * mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, q, mask = ctx.saved_tensors
        return (p - q) / ctx.temperature * (grad * mask).unsqueeze(1), None, None, None


def saved_softmax(h: Heads, d: Data) -> Tensor:
    kept = d.y != -100
    return (SavedSoftmax.apply(h.s(d.x), d.y.clamp(0)) * kept).sum() / kept.sum()


def weighted(h: Heads, d: Data) -> tuple[Tensor, Tensor]:
    each, right = Weighted.apply(h.b(d.x), d.x[:, 0].sigmoid(), d.y.clamp(0))
    return each.mean(), right.to(d.x.dtype).mean()


def with_constant(h: Heads, d: Data) -> Tensor:
    lse, largest = WithConstant.apply(h.b(d.x))
    return (lse * (1 + largest)).mean()


def clipped(h: Heads, d: Data) -> Tensor:
    return 3 * Clipped.apply(h.s(d.x)).mean()


def chosen(h: Heads, d: Data) -> Tensor:
    return (Chosen.apply(h.s(d.x)) * d.a / 10).sum()


def ready(h: Heads, d: Data) -> Tensor:
    return Ready.apply(h.s(d.x)).mean()


def even(h: Heads, d: Data) -> Tensor:
    return Even.apply(h.s(d.x)).mean()


def scaled(h: Heads, d: Data) -> Tensor:
    return F.cross_entropy(Scaled.apply(h.b(d.x)), d.y)


def distilled(h: Heads, d: Data) -> Tensor:
    return Distilled.apply(h.s(d.x), h.t(d.e), d.m, 2.0).sum() / d.m.sum()


def two_of_them(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x)
    return (SavedSoftmax.apply(Scaled.apply(z), d.y.clamp(0)) + Ready.apply(z)).mean()


def many_of_them(h: Heads, d: Data) -> Tensor:
    """What each takes from the program is made of what those before it take."""
    z = h.s(d.x)
    for _ in range(16):
        z = row_programs.Bent.apply(z, 0.1)
    return z.square().sum(-1).mean()


def in_batches(h: Heads, d: Data) -> Tensor:
    z = h.s(d.x.view(4, -1, d.x.size(-1)))
    return SavedSoftmax.apply(z.flatten(0, 1), d.y.clamp(0)).view(4, -1)[:, 1:].mean()


BY_ROWS: dict[Loss, str] = {
    saved_softmax: "grads_in_forward",
    weighted: "grads_in_forward",
    with_constant: "grads_in_forward",
    scaled: "grads_in_forward",
    distilled: "grads_in_forward",
    many_of_them: "grads_in_forward",
    clipped: "recompute",
    chosen: "recompute",
    ready: "recompute",
    even: "recompute",
    two_of_them: "recompute",
    in_batches: "recompute",
}


def compiled(loss: Loss, **options: Any) -> Callable[..., Any]:
    return torch.compile(loss, backend="cce", options={**OPTIONS, **options})


@pytest.fixture
def heads() -> Heads:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Heads()


@pytest.mark.parametrize("loss", BY_ROWS, ids=lambda f: f.__name__)
def test_a_function_by_rows_is_cut_and_its_gradient_counts(loss: Loss, heads: Heads) -> None:
    report = cce_fx.explain(loss, heads, data(), options=cce_fx.Options(**OPTIONS))
    assert [(r.tier, r.strategy) for r in report.rewritten] == [("rows", BY_ROWS[loss])]
    torch._dynamo.reset()
    check(loss, data(), heads, compiled(loss))


@pytest.mark.parametrize("loss", [saved_softmax, weighted, ready], ids=lambda f: f.__name__)
def test_with_inductor_and_without_gradients_in_the_forward(loss: Loss, heads: Heads) -> None:
    check(loss, data(), heads, compiled(loss, inner="inductor", strategy="recompute"))


def test_any_number_of_rows(heads: Heads) -> None:
    run = compiled(saved_softmax)
    for n in (24, 31, 8, 17):
        check(saved_softmax, data(n, n), heads, run)
    assert not [d for d in cce_fx.explain(saved_softmax, heads, data(1, 19)).declined if d.reason == "OWN_GRADIENT"]


def test_a_backward_for_another_scale_is_the_function_s_own(heads: Heads) -> None:
    """What is not in proportion is made for the gradient that comes."""
    for loss in (clipped, chosen, ready):
        torch._dynamo.reset()
        for scale in (1.0, 100.0):
            scaled_loss = lambda h, d, loss=loss, scale=scale: loss(h, d) * scale  # noqa: E731
            run = compiled(loss)
            eager = outcome(scaled_loss, heads, data())
            ours = outcome(lambda h, d, run=run, scale=scale: run(h, d) * scale, heads, data())
            for a, b in zip(eager, ours, strict=True):
                assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def run_twice(h: Heads, d: Data) -> Tensor:
    """What the function returns is read in the program, and before it by another head, of a single class."""
    s = row_programs.Clipped.apply(h.s(d.x))
    mean = s.softmax(-1) @ torch.linspace(-1, 1, s.size(-1), dtype=s.dtype).unsqueeze(-1)
    picked = s.gather(-1, d.y.clamp(0)[:, None]).squeeze(-1)
    return (mean.squeeze(-1) * 3 + picked).square().sum()


def test_the_parts_of_a_gradient_are_not_clipped_one_by_one(heads: Heads) -> None:
    check(run_twice, data(), heads, compiled(run_twice))


def even_with_a_bias(h: Heads, d: Data) -> Tensor:
    return Even.apply(h.b(d.x)).mean()


def ready_with_a_bias(h: Heads, d: Data) -> Tensor:
    return Ready.apply(h.b(d.x)).mean()


@pytest.mark.parametrize("loss", [even_with_a_bias, ready_with_a_bias, even], ids=lambda f: f.__name__)
@pytest.mark.parametrize("n", [19, 33])
def test_rows_that_fill_up_a_block_have_no_part_in_a_gradient(loss: Loss, n: int, heads: Heads) -> None:
    check(loss, data(0, n), heads, compiled(loss))


class Overwritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.mark_dirty(logits)
        return logits.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


class Centred(torch.autograd.Function):
    """A backward that mixes rows."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1))
        return logits.logsumexp(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        d = ctx.saved_tensors[0] * grad[:, None]
        return d - d.mean(0)


class Tempered(torch.autograd.Function):
    """A gradient for what all rows share."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(logits, temperature)
        return (logits * temperature).sigmoid().sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        z, t = ctx.saved_tensors
        s = (z * t).sigmoid()
        d = grad[:, None] * s * (1 - s)
        return d * t, (d * z).sum()


def overwritten(h: Heads, d: Data) -> Tensor:
    return Overwritten.apply(h.s(d.x) * 1.0).sigmoid().sum(-1).mean()


def centred(h: Heads, d: Data) -> Tensor:
    return Centred.apply(h.s(d.x)).mean()


def tempered(h: Heads, d: Data) -> Tensor:
    return Tempered.apply(h.s(d.x), h.b.bias[0]).mean()


def under_autocast(h: Heads, d: Data) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return SavedSoftmax.apply(h.s(d.x).float(), d.y.clamp(0)).mean()


@pytest.mark.parametrize("loss", [centred, tempered], ids=lambda f: f.__name__)
def test_any_other_function_is_left_as_it_is(loss: Loss, heads: Heads) -> None:
    report = cce_fx.explain(loss, heads, data(), options=cce_fx.Options(**OPTIONS))
    assert not report.rewritten and [d.reason for d in report.declined] == ["OWN_GRADIENT"]
    torch._dynamo.reset()
    check(loss, data(), heads, compiled(loss))


@pytest.mark.parametrize("loss", [overwritten, under_autocast], ids=lambda f: f.__name__)
def test_what_writes_to_its_arguments_or_is_under_autocast_is_not_cut(loss: Loss, heads: Heads) -> None:
    assert not cce_fx.explain(loss, heads, data(), options=cce_fx.Options(**OPTIONS)).rewritten
    torch._dynamo.reset()
    eager, ours = (outcome(loss, heads, data(), run) for run in (None, compiled(loss)))
    for a, b in zip(eager, ours, strict=True):
        assert (a is None and b is None) or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def program(code: list[Any], grads: list[Any], taken: list[Any] = (), outer: list[Any] = ()) -> RowProgram:  # type: ignore[assignment]
    backward = {"backward": {"code": code, "grads": grads}}
    return RowProgram((*outer, (OWN_GRADIENT, [[{"head": 0}], [{"row": 0}], list(taken), backward], {})), ())


G, LAST = {"grad": 0}, [{"made": [0, None]}]


@pytest.mark.parametrize(
    "code",
    [
        ["aten.mul.Tensor", [G, {"taken": 0}], {}],
        ["aten.mul.Tensor", [{"taken": 0}, G], {}],
        ["aten.div.Tensor", [G, {"taken": 0}], {}],
        ["aten.add.Tensor", [G, G], {"alpha": 2}],
        ["aten.where.self", [{"taken": 0}, G, {"taken": 1}], {}],
        ["aten.masked_fill.Scalar", [G, {"taken": 0}, 0], {}],
        ["aten.index_put.default", [{"taken": 1}, [{"taken": 0}], G, True], {}],
        ["aten.sum.dim_IntList", [G, [0], True], {}],
    ],
)
def test_linear_in_the_gradient(code: list[Any]) -> None:
    zeros = ("aten.full.default", [[5], 0], {})
    assert is_in_proportion(program([code], LAST, [{"row": 1}, {"made": [0, None]}], [zeros]))


@pytest.mark.parametrize(
    "code",
    [
        ["aten.mul.Tensor", [G, G], {}],
        ["aten.div.Tensor", [{"taken": 0}, G], {}],
        ["aten.div.Tensor_mode", [G, {"taken": 0}], {"rounding_mode": "floor"}],
        ["aten.add.Tensor", [G, {"taken": 0}], {}],
        ["aten.where.self", [G, {"taken": 1}, {"taken": 1}], {}],
        ["aten.where.self", [{"taken": 0}, G, {"taken": 0}], {}],
        ["aten.masked_fill.Scalar", [G, {"taken": 0}, 1.0], {}],
        ["aten.sign.default", [G], {}],
        ["aten.clamp.default", [G, -1, 1], {}],
        ["aten._to_copy.default", [G], {"dtype": {"dtype": "int64"}}],
        ["aten.gather.default", [{"taken": 0}, 0, G], {}],
    ],
)
def test_not_linear_in_the_gradient(code: list[Any]) -> None:
    zeros = ("aten.full.default", [[5], 0], {})
    assert not is_in_proportion(program([code], LAST, [{"row": 1}, {"made": [0, None]}], [zeros]))


def test_a_gradient_that_does_not_depend_on_the_incoming_one_is_not_linear() -> None:
    assert not is_in_proportion(program([], [{"taken": 0}], [{"row": 1}]))
