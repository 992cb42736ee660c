# SPDX-License-Identifier: Apache-2.0
"""Row programs that begin with a head turned round, or with the weight behind a scaled one: as exact as eager, and smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cce_fx
from benchmarks.measure import peak_bytes
from cce_fx import row_op
from tests.helpers import assert_no_worse

OPTIONS = {"inner": "aot_eager", "min_vocab": 0, "logits": "keep"}
N, D, V = 12, 40, 300
Loss = Callable[..., Tensor]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(V, D) / D**0.5), nn.Parameter(torch.randn(V))
        self.g = nn.Parameter(torch.rand(V, 1) + 0.5)


def labels(y: Tensor, z: Tensor) -> Tensor:
    return F.one_hot(y, z.size(-1)).to(z.dtype)


# --- losses of each class by itself, which are run with the classes as rows


def multi_label(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w, h.b)
    return F.binary_cross_entropy_with_logits(z, labels(y, z))


def without_bias(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = x @ h.w.t() / 2.0
    return F.binary_cross_entropy_with_logits(z, labels(y, z), reduction="sum")


def weights_of_classes(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w, h.b)
    by_class = torch.linspace(0.5, 2, V, dtype=z.dtype)
    return F.binary_cross_entropy_with_logits(z, labels(y, z), pos_weight=by_class, weight=by_class.flip(0))


def masked(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w, h.b)
    each = F.binary_cross_entropy_with_logits(z, labels(y, z), reduction="none")
    return (each * m[:, None]).sum() / m.sum()


def learnt_temperature(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w, h.b) * x.exp().mean(-1, keepdim=True)
    return F.mse_loss(z.sigmoid(), labels(y, z)) + z.tanh().mean()


def scaled_and_turned(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(F.normalize(x), F.normalize(h.w) * h.g, h.b) * 4
    return F.binary_cross_entropy_with_logits(z, labels(y, z))


TURNED: list[Loss] = [multi_label, without_bias, weights_of_classes, masked, learnt_temperature, scaled_and_turned]


# --- losses that mix classes, of which nothing is turned


def softmax(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return (F.linear(x, h.w, h.b).softmax(-1) ** 2).sum()


def likeliest(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w, h.b)
    return (z.sigmoid() - z.amax(-1, keepdim=True)).square().mean()


def of_each_row(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return (F.linear(x, h.w, h.b).sigmoid().sum(-1) * m).mean()


# --- heads whose weight is scaled


def arc_face(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    cosine = F.linear(F.normalize(x), F.normalize(h.w)).clamp(-1 + 1e-4, 1 - 1e-4)
    right = F.one_hot(y, V).bool()
    return F.cross_entropy(torch.where(right, torch.cos(torch.acos(cosine) + 0.5), cosine) * 16, y)


def divided_by_a_norm(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = F.linear(x, h.w / h.w.norm(dim=1, keepdim=True), h.b)
    return (z.softmax(-1) ** 2).sum(-1).log().mean()


def expanded(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    length = h.w.norm(p=2, dim=1, keepdim=True).clamp(min=1e-6).expand_as(h.w)
    return (F.linear(x, h.w.div(length)).softmax(-1) ** 2).sum(-1).log().mean()


def weight_norm(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return (F.linear(x, torch._weight_norm(h.w, h.g, 0), h.b).softmax(-1) ** 2).sum(-1).log().mean()


def columns(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    z = torch.mm(x, F.normalize(h.w.t(), p=1.0, dim=0) * h.b.exp())
    return (z.softmax(-1) ** 2).sum(-1).log().mean()


SCALED: list[Loss] = [arc_face, divided_by_a_norm, expanded, weight_norm, columns, scaled_and_turned]


# --- and some that are left as they are


def read_elsewhere(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    w = F.normalize(h.w)
    return (F.linear(x, w).softmax(-1) ** 2).sum(-1).log().mean() + w[y].mul(x).mean()


def written_between(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    v = h.w * 2.0
    w = v / h.g.detach()
    v.mul_(3.0)
    return (F.linear(x, w).softmax(-1) ** 2).sum(-1).log().mean() + v.mean()


def without_gradient(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    with torch.no_grad():
        w = F.normalize(h.w)
    return (F.linear(x, w, h.b).softmax(-1) ** 2).sum(-1).log().mean()


def along_hidden(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
    return (F.linear(x, F.normalize(h.w, dim=0)).softmax(-1) ** 2).sum(-1).log().mean()


PLAIN: list[Loss] = [read_elsewhere, written_between, without_gradient, along_hidden]


# ---


def data(n: int = N, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, D, generator=g).to(dtype).requires_grad_()
    return x, torch.randint(V, (n,), generator=g), (torch.rand(n, generator=g) > 0.3).to(dtype)


def outcome(loss: Loss, head: Head, given: tuple[Tensor, ...]) -> list[Tensor | None]:
    for t in (*head.parameters(), given[0]):
        t.grad = None
    value = loss(head, *given)
    value.backward()
    return [value.detach(), given[0].grad, *(p.grad for p in head.parameters())]


def check(loss: Loss, compiled: Any, head: Head, given: tuple[Tensor, ...], ulps: float = 8) -> None:
    double = tuple(t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in given)
    exact_head = Head().double().requires_grad_(False)
    for p, q in zip(exact_head.parameters(), head.parameters(), strict=True):
        p.copy_(q)
        p.requires_grad_(q.requires_grad)
    exact = outcome(loss, exact_head, double)
    eager, ours = outcome(loss, head, given), outcome(compiled, head, given)
    for number, values in enumerate(zip(exact, eager, ours, strict=True)):
        assert_no_worse(f"{loss.__name__}, result {number}", *values, ulps=ulps)


@pytest.fixture
def head() -> Head:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Head()


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Tensor]]]:
    """Of each run of blocks, how many rows there are and the first head's weight."""
    seen: list[tuple[int, Tensor]] = []
    init = row_op._Blocks.__init__

    def watched(self: Any, hidden: Any, weight: Any, *rest: Any) -> None:
        seen.append((hidden[0].shape[0], weight[0]))
        init(self, hidden, weight, *rest)

    monkeypatch.setattr(row_op._Blocks, "__init__", watched)
    yield seen


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
@pytest.mark.parametrize("loss", TURNED)
def test_classes_are_rows_where_there_are_more_of_them(
    loss: Loss, strategy: str, head: Head, blocks: list[tuple[int, Tensor]]
) -> None:
    check(loss, torch.compile(loss, backend="cce", options={**OPTIONS, "strategy": strategy}), head, data())
    assert {rows for rows, _ in blocks} == {V}


@pytest.mark.parametrize("loss", TURNED)
def test_rows_of_any_number(loss: Loss, head: Head, blocks: list[tuple[int, Tensor]]) -> None:
    compiled = torch.compile(loss, backend="cce", options=OPTIONS, dynamic=True)
    for n in (12, 7, 33):
        check(loss, compiled, head, data(n))
    assert {rows for rows, _ in blocks} == {V}


@pytest.mark.parametrize("loss", [multi_label, masked, arc_face, weight_norm])
def test_half_precision(loss: Loss, head: Head) -> None:
    head = head.to(torch.bfloat16)
    check(loss, torch.compile(loss, backend="cce", options=OPTIONS), head, data(N, torch.bfloat16))


@pytest.mark.parametrize("frozen", ["w", "b", "x"])
@pytest.mark.parametrize("loss", [multi_label, scaled_and_turned, weight_norm])
def test_a_part_without_gradient(loss: Loss, frozen: str, head: Head) -> None:
    given = data()
    (given[0] if frozen == "x" else getattr(head, frozen)).requires_grad_(False)
    check(loss, torch.compile(loss, backend="cce", options=OPTIONS), head, given)


@pytest.mark.parametrize("loss", [softmax, likeliest, of_each_row])
def test_what_mixes_classes_keeps_its_rows(loss: Loss, head: Head, blocks: list[tuple[int, Tensor]]) -> None:
    check(loss, torch.compile(loss, backend="cce", options=OPTIONS), head, data())
    assert {rows for rows, _ in blocks} == {N}


def test_many_rows_stay_rows(head: Head, blocks: list[tuple[int, Tensor]]) -> None:
    check(multi_label, torch.compile(multi_label, backend="cce", options=OPTIONS), head, data(200))
    assert {rows for rows, _ in blocks} == {200}


def test_targets_for_each_class_are_read_without_a_copy(head: Head) -> None:
    given = torch.rand(N, V)

    def loss(h: Head, x: Tensor, y: Tensor, m: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(F.linear(x, h.w, h.b), given.to(x.dtype))

    compiled = torch.compile(loss, backend="cce", options={**OPTIONS, "inner": "inductor"})
    check(loss, compiled, head, data())


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
@pytest.mark.parametrize("loss", SCALED)
def test_a_scaled_weight_is_seen_through(
    loss: Loss, strategy: str, head: Head, blocks: list[tuple[int, Tensor]]
) -> None:
    check(loss, torch.compile(loss, backend="cce", options={**OPTIONS, "strategy": strategy}), head, data())
    if loss is not scaled_and_turned:
        assert {weight.data_ptr() for _, weight in blocks} == {head.w.data_ptr()}


@pytest.mark.parametrize("loss", SCALED)
def test_a_scaled_weight_and_rows_of_any_number(loss: Loss, head: Head) -> None:
    compiled = torch.compile(loss, backend="cce", options=OPTIONS, dynamic=True)
    for n in (12, 7, 33):
        check(loss, compiled, head, data(n))


@pytest.mark.parametrize("loss", PLAIN)
def test_a_weight_that_is_needed_scaled_is_read_so(loss: Loss, head: Head, blocks: list[tuple[int, Tensor]]) -> None:
    check(loss, torch.compile(loss, backend="cce", options=OPTIONS), head, data())
    assert head.w.data_ptr() not in {weight.data_ptr() for _, weight in blocks}


def test_angles_that_are_all_but_zero(head: Head) -> None:
    """Whose cosine's rounding a margin magnifies."""
    x, y, m = data()
    with torch.no_grad():
        x.copy_(3 * head.w[y] + 1e-3 * x)
    check(arc_face, torch.compile(arc_face, backend="cce", options=OPTIONS), head, (x, y, m), ulps=64)


def memory(loss: Loss, backend: str, given: tuple[Tensor, ...], weight: Tensor) -> int:
    """What a step holds beside the gradients."""
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, options={"min_vocab": 0} if backend == "cce" else None)

    def step() -> None:
        weight.grad = given[0].grad = None
        compiled(*given, weight).backward()

    step()
    weight.grad = given[0].grad = None
    return peak_bytes(step) - 4 * (weight.numel() + given[0].numel())


@pytest.mark.parametrize("cosine", [False, True])
def test_a_tenth_of_the_memory_of_inductor(cosine: bool) -> None:
    n, d, v = 512, 64, 40000
    x, y, weight = torch.randn(n, d, requires_grad=True), torch.randint(v, (n,)), torch.randn(v, d, requires_grad=True)

    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        z = F.linear(F.normalize(x), F.normalize(w)) if cosine else F.linear(x, w)
        return F.binary_cross_entropy_with_logits(z, F.one_hot(y, v).to(z.dtype))

    ours, dense = (memory(loss, backend, (x, y), weight) for backend in ("cce", "inductor"))
    assert ours <= dense / 10


def test_the_report_knows_a_turned_block() -> None:
    def loss(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(F.linear(x, w), F.one_hot(y, 20000).float())

    given = torch.randn(512, 64, requires_grad=True), torch.randint(20000, (512,))
    weight = torch.randn(20000, 64, requires_grad=True)
    report = cce_fx.explain(loss, *given, weight, options=cce_fx.Options(min_vocab=0))
    (cut,) = report.rewritten
    assert (cut.rows, cut.classes) == (512, 20000) and cut.bytes_saved == 3 * 4 * 512 * 20000
    assert memory(loss, "cce", given, weight) <= 1.3 * cut.bytes_needed + 4 * weight.numel() / 10
