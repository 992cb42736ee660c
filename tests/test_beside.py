# SPDX-License-Identifier: Apache-2.0
"""What is read of logits beside their loss: out of the loss's kernel where it can be, and right everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cce_fx
from cce_fx.lazy import operations
from tests.helpers import Watch, step

N, D, V = 48, 16, 3000
OPTIONS = {"min_vocab": 0}


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    x, w = (torch.randn(n, D, dtype=dtype, requires_grad=True) for n in (N, V))
    return [x, w, torch.randint(V, (N,))]


def first_without_gradient(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = x @ w.T
    with torch.no_grad():
        right, mean = (z.argmax(-1) == y).float().mean(), z.mean()
    return F.cross_entropy(z, y), right, mean


def afterwards(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w).view(2, -1, V)
    loss = F.cross_entropy(z.float().view(-1, V), y)
    return loss, z.argmax(-1), z.detach().mean(-1, keepdim=True), z.max(-1, keepdim=True).indices


def of_a_softmax(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    best = z.softmax(-1).argmax(-1)
    return F.nll_loss(z.log_softmax(-1), y), best


def ignored_rows_too(x: Tensor, w: Tensor, y: Tensor) -> Any:
    y = torch.where(torch.arange(len(y)) % 3 > 0, y, -100)
    z = F.linear(x, w)
    return F.cross_entropy(z, y, label_smoothing=0.1), z.argmax(-1), z.detach().mean(-1)


def all_ignored(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    return F.cross_entropy(z, torch.full_like(y, -100), reduction="sum"), z.argmax(-1), z.detach().mean()


def of_capped_logits(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    capped = 30 * torch.tanh(z / 30)
    return F.cross_entropy(capped, y), z.argmax(-1), capped.detach().mean()


def before_gradients_are_switched_on(x: Tensor, w: Tensor, y: Tensor) -> Any:
    with torch.no_grad():
        z = F.linear(x, w)
        return F.cross_entropy(z, y), z.argmax(-1)


READ = [
    first_without_gradient, afterwards, of_a_softmax, ignored_rows_too, all_ignored, of_capped_logits,
    before_gradients_are_switched_on,
]  # fmt: skip


def check(fn: Callable[..., Any], given: list[Tensor], **options: str) -> Watch:
    torch._dynamo.reset()
    watch = Watch()
    compiled = torch.compile(fn, backend="cce", options={**OPTIONS, **options, "inner": watch})
    found, want = step(compiled, given), step(fn, given)
    for a, b in zip(found.results, want.results, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, equal_nan=True)
    return watch


@pytest.mark.parametrize("fn", READ)
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_it_comes_out_of_the_kernel(fn: Callable[..., Any], strategy: str) -> None:
    watch = check(fn, tensors(), strategy=strategy)
    # The second call is for the rows that the loss leaves out.
    assert watch.calls("cce.linear_cross_entropy") == 2 and watch.calls("cce.") == 2
    assert watch.largest() < N * V


def another_head(x: Tensor, w: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(F.linear(x, w), y), F.linear(x, w + 1).argmax(-1)


def other_rows(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    return F.cross_entropy(z[1:], y[1:]), z.argmax(-1), z.flip(0).argmax(-1)


def rows_in_another_order(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w).view(2, -1, V)
    return F.cross_entropy(z.transpose(0, 1).reshape(-1, V), y), z.argmax(-1)


def another_temperature(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    return F.cross_entropy(z / -2, y), z.argmax(-1), z.detach().mean(-1)


def with_a_gradient(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    return F.cross_entropy(z, y) + 0.1 * z.mean()


def before_its_target(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    best = z.argmax(-1)
    return F.cross_entropy(z, (best + y) % V), best


def before_its_target_is_changed(x: Tensor, w: Tensor, y: Tensor) -> Any:
    y = y.clone()
    z = F.linear(x, w)
    best = z.argmax(-1)
    y.add_(1)
    y.remainder_(V)
    return F.cross_entropy(z, y), best


def after_the_logits_are_changed(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    loss = F.cross_entropy(z * 1.0, y)
    with torch.no_grad():
        changed = z.detach().clone().neg_()
    return loss, changed.argmax(-1)


def over_rows(x: Tensor, w: Tensor, y: Tensor) -> Any:
    z = F.linear(x, w)
    return F.cross_entropy(z, y), z.argmax(0), z.detach().mean(0)


LEFT = [
    another_head, other_rows, rows_in_another_order, another_temperature, with_a_gradient, before_its_target,
    before_its_target_is_changed, after_the_logits_are_changed, over_rows,
]  # fmt: skip


@pytest.mark.parametrize("fn", LEFT)
def test_what_cannot_is_right_all_the_same(fn: Callable[..., Any]) -> None:
    check(fn, tensors())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(afterwards, backend="cce", options=OPTIONS)
    found, z = compiled(*given), F.linear(given[0].double(), given[1].double()).view(2, -1, V)
    assert [t.dtype for t in found] == [t.dtype for t in afterwards(*given)]
    best = z.gather(-1, found[1][..., None])
    assert bool((best >= z.amax(-1, keepdim=True) - 0.05).all()) and torch.equal(found[1], found[3][..., 0])
    torch.testing.assert_close(found[2].double(), z.mean(-1, keepdim=True), rtol=1e-2, atol=1e-2)


def test_changing_lengths() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(afterwards, backend="cce", options=OPTIONS)
    x, w, y = tensors()
    for rows in (8, 12, 20, 30):
        given = [x[:rows], w, y[:rows]]
        for a, b in zip(compiled(*given), afterwards(*given), strict=True):
            torch.testing.assert_close(a, b)


def test_no_row_program_is_reported_for_it() -> None:
    report = cce_fx.explain(first_without_gradient, *tensors(), options=OPTIONS)
    assert [r.tier for r in report.rewritten] == ["kernel"] and not report.declined
    with pytest.raises(ValueError, match="unknown option"):
        cce_fx.explain(first_without_gradient, *tensors(), options={"min_vocap": 0})


class Model(nn.Module):
    """A loss of the next token, whose last row of each sequence is ignored, and the logits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(D, 9000, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(x)
        following = F.pad(y, (0, 1), value=-100)[..., 1:]
        return F.cross_entropy(z.float().view(-1, 9000), following.reshape(-1)), z


READ_LATER: dict[str, Callable[[Tensor], Tensor]] = {
    "all": lambda z: z.argmax(-1),
    "without the last": lambda z: z[:, :-1].argmax(-1),
    "flat": lambda z: torch.argmax(z.detach().view(-1, z.size(-1)), dim=1, keepdim=True),
    "of a softmax": lambda z: z.float().softmax(-1).argmax(-1),
    "some": lambda z: z[torch.arange(z.size(1)).expand(z.shape[:2]) % 2 > 0].argmax(-1),
    "turned": lambda z: z.transpose(0, 1).argmax(2),
}


@pytest.mark.parametrize("how", READ_LATER)
@pytest.mark.parametrize("training", [True, False])
def test_lazy_logits_know_the_likeliest_class(how: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = Model(), torch.randn(8, 11, D), torch.randint(9000, (8, 11))
    y[2, 3:6] = -100
    computed = []
    by_rows = operations.by_rows
    monkeypatch.setattr(operations, "by_rows", lambda f, a, k: (computed.append(len(a[0])), by_rows(f, a, k))[1])
    with torch.set_grad_enabled(training):
        loss, z = torch.compile(model, backend="cce")(x, y)
        want = READ_LATER[how](model(x, y)[1])
        if training:
            loss.backward()
            torch.optim.SGD(model.parameters(), lr=10.0).step()  # the rows that the loss left out are what they were
        assert isinstance(z, cce_fx.LazyLogits)
        assert torch.equal(READ_LATER[how](z), want)
        assert z.chain is not None, "the logits were read"
    assert max(computed, default=0) <= 8 + 3, "rows were computed again"
    with torch.no_grad():
        READ_LATER[how](z).zero_()
        assert torch.equal(READ_LATER[how](z), want)


def test_changed_lazy_logits_have_other_likeliest_classes() -> None:
    model, x, y = Model(), torch.randn(8, 11, D), torch.randint(9000, (8, 11))
    _, z = torch.compile(model, backend="cce")(x, y)
    want = model(x, y)[1].detach()
    assert torch.equal((-z).argmax(-1), want.argmin(-1)) and torch.equal(z.argmax(0), want.argmax(0))
    z.detach().neg_()
    assert torch.equal(z.argmax(-1), want.argmin(-1))


class Logits(nn.Module):
    def __init__(self, sign: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.sign = nn.Linear(D, 9000, bias=False), sign

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.sign


_TWICE = torch.tensor([2, 2])
# A loss outside of the graph, and of how many of the 88 rows it tells the likeliest class.
OUTSIDE: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "all": (lambda z, y: F.cross_entropy(z.view(-1, z.size(-1)), y.flatten()), 85),
    "of the next": (lambda z, y: F.cross_entropy(z[:, :-1].float().flatten(0, 1), y[:, 1:].flatten()), 77),
    "one loss a row": (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="none").sum(), 85),
    "of one sequence, twice": (lambda z, y: F.cross_entropy(z[_TWICE].flatten(0, 1), y[_TWICE].flatten()), 8),
    "of capped logits": (lambda z, y: F.cross_entropy((9 * torch.tanh(z / 9)).flatten(0, 1), y.flatten()), 85),
    "negated": (lambda z, y: F.cross_entropy(-z.flatten(0, 1), y.flatten()), 0),
    "beside another": (lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()) + z.square().mean(), 85),
}


@pytest.mark.parametrize("how", OUTSIDE)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_loss_outside_of_the_graph_tells_it_too(how: str, sign: float) -> None:
    model, x, y = Logits(sign), torch.randn(8, 11, D), torch.randint(9000, (8, 11))
    y[2, 3:6] = -100
    loss, told = OUTSIDE[how]
    for rows in (8, 5):
        z, plain = torch.compile(model, backend="cce")(x[:rows]), model(x[:rows])
        torch.testing.assert_close(loss(z, y[:rows]), loss(plain, y[:rows]))
        assert isinstance(z, cce_fx.LazyLogits) and z.chain is not None
        known = 0 if z.chain.top is None else int((z.chain.top >= 0).sum())
        assert known == told or rows == 5
        for read in READ_LATER.values():
            assert torch.equal(read(z), read(plain))
        assert z.chain is not None
