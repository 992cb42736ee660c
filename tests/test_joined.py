# SPDX-License-Identifier: Apache-2.0
"""Several losses on one weight become one call, which makes one gradient of the weight, and the numbers stay eager's."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import cce_fx
from benchmarks.measure import peak_bytes
from cce_fx.passes import Policy

from .helpers import Watch

N, D, V = 24, 8, 50
Loss = Callable[["Model", Tensor, Tensor], Any]


class Model(nn.Module):
    """A body, a head that all losses share, and what is made of them."""

    def __init__(self, loss: Loss, bias: bool = False, width: int = D, classes: int = V) -> None:
        super().__init__()
        self.body, self.cell = nn.Linear(width, width), nn.Linear(width, width)
        self.head, self.mix, self.loss = nn.Linear(width, classes, bias=bias), nn.Parameter(torch.randn(3)), loss

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self.loss(self, self.body(x), y)


def chunks(m: Model, h: Tensor, y: Tensor) -> Tensor:
    loss: Any = 0.0
    for a, b in zip(h.chunk(3), y.chunk(3), strict=True):
        loss += F.cross_entropy(m.head(a), b, reduction="sum")
    return loss / len(y)


def steps(m: Model, h: Tensor, y: Tensor) -> Tensor:
    """A decoder, each of whose states is made of the one before."""
    losses, h = [], h[:6]
    for t in range(4):
        h = torch.tanh(m.cell(h))
        losses.append(F.cross_entropy(m.head(h), y[6 * t : 6 * t + 6], label_smoothing=0.1))
    return torch.stack(losses).mean()


def early_exits(m: Model, h: Tensor, y: Tensor) -> Tensor:
    losses = []
    for weight in (0.1, 0.3, 1.0):
        h = torch.tanh(m.cell(h))
        losses.append(weight * F.cross_entropy(m.head(h), y))
    return sum(losses) + h.pow(2).mean() - 3.0  # an auxiliary loss with a gradient of its own


def added_to_an_auxiliary_loss(m: Model, h: Tensor, y: Tensor) -> Tensor:
    loss = h.pow(2).mean()
    for k in range(3):
        h = torch.tanh(m.cell(h))
        loss = (k + 1.0 - loss if k == 1 else loss - k) + F.cross_entropy(m.head(h), y)
    return loss


def weighted_exits(m: Model, h: Tensor, y: Tensor) -> Tensor:
    """The weights of the exits are learnt, so their losses' gradients are not known in the forward."""
    p, loss = m.mix.softmax(0), torch.zeros(())
    for k in range(3):
        h = torch.tanh(m.cell(h))
        loss = loss + p[k] * F.cross_entropy(m.head(h), y, reduction="none").mean()
    return loss


def later_tokens(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Each head predicts one token further; the parts are told."""
    first = F.cross_entropy(m.head(h), y)
    more = [F.cross_entropy(m.head(torch.tanh(m.cell(h[:-k]))), y[k:]) for k in (1, 2)]
    return first + 0.3 * (more[0] + more[1]) / 2, first.detach(), more[1].detach()


def parts_with_gradients(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return tuple(F.cross_entropy(m.head(a), b) for a, b in zip(h.chunk(2), y.chunk(2), strict=True))


def other_rows_of_one(m: Model, h: Tensor, y: Tensor) -> Tensor:
    """One hidden state, two targets for each of its rows."""
    return F.cross_entropy(m.head(h), y) + F.cross_entropy(m.head(h), y.flip(0))


def some_ignored(m: Model, h: Tensor, y: Tensor) -> Tensor:
    y = torch.where(torch.arange(N) % 5 == 0, -100, y)
    y = torch.where(torch.arange(N) < N // 3, -100, y)  # all of the first chunk
    losses = [F.cross_entropy(m.head(a), b, reduction="sum") for a, b in zip(h.chunk(3), y.chunk(3), strict=True)]
    return (losses[0] + losses[1] + losses[2]) / (y != -100).sum()


def class_weights(m: Model, h: Tensor, y: Tensor) -> Tensor:
    w = torch.linspace(0.5, 1.5, V, dtype=h.dtype)
    a, b = (F.cross_entropy(m.head(a), b, weight=w) for a, b in zip(h.chunk(2), y.chunk(2), strict=True))
    return a - 0.5 * b


def in_checkpoints(m: Model, h: Tensor, y: Tensor) -> Tensor:
    def two(h: Tensor) -> Tensor:
        return F.cross_entropy(m.head(h), y) + F.cross_entropy(m.head(m.cell(h)), y)

    return checkpoint(two, h, use_reentrant=False)  # type: ignore[no-any-return]


def distillation(m: Model, h: Tensor, y: Tensor) -> Tensor:
    """No kernel's loss: row programs."""
    loss: Any = 0.0
    for a in h.chunk(3):
        q = (a.detach().sin() @ m.head.weight.detach().T).softmax(-1)
        loss += F.kl_div(m.head(a).log_softmax(-1), q, reduction="sum")
    return loss / len(y)


JOINED = {
    added_to_an_auxiliary_loss: "with_grads",
    chunks: "with_grads", steps: "with_grads", early_exits: "with_grads", later_tokens: "with_grads",
    other_rows_of_one: "with_grads", some_ignored: "with_grads", class_weights: "with_grads",
    weighted_exits: "linear_cross_entropy", parts_with_gradients: "linear_cross_entropy", distillation: "rows_with_grads",
}  # fmt: skip


def feeds_the_next(m: Model, h: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy(m.head(h), y)
    return first + F.cross_entropy(m.head(h * first), y)


def weight_changed_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    w = m.head.weight * 1.0
    first = F.cross_entropy(F.linear(h[:12], w.clone()), y[:12])
    with torch.no_grad():
        m.head.weight.mul_(0.9)
    return first + F.cross_entropy(F.linear(h[12:], m.head.weight * 1.0), y[12:])


def weight_of_rows_changed_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    losses = []
    for a in h.chunk(2):
        losses.append(F.linear(a, torch.tanh(m.head.weight)).softmax(-1).pow(2).sum())
        with torch.no_grad():
            m.head.weight.mul_(0.9)
    return losses[0] + losses[1]


def read_without_gradient_between(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    first = F.cross_entropy(m.head(h[:12]), y[:12])
    with torch.no_grad():
        told = first * 2
    return first + F.cross_entropy(m.head(h[12:]), y[12:]), told


def written_down_between(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    record = torch.zeros(2, dtype=h.dtype)
    first = F.cross_entropy(m.head(h[:12]), y[:12])
    record[0].add_(first.detach())
    seen = record.clone()
    second = F.cross_entropy(m.head(h[12:]), y[12:])
    record[1] = second.detach()
    return first + second, record, seen


def added_to_what_is_kept(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    first = F.cross_entropy(m.head(h[:12]), y[:12])
    kept = first.detach()
    first += F.cross_entropy(m.head(h[12:]), y[12:])
    return first, kept  # the sum of both: they share their memory


def an_addend_changed_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    aux = h.detach().pow(2).mean()
    loss = aux + F.cross_entropy(m.head(h[:12]), y[:12])
    aux.add_(1.0)
    return loss + F.cross_entropy(m.head(h[12:]), y[12:])


def a_loss_changed_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    first, second = F.cross_entropy(m.head(h[:12]), y[:12]), F.cross_entropy(m.head(h[12:]), y[12:])
    first.detach().mul_(2.0)
    return first + second


def a_factor_changed_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    factor = torch.ones((), dtype=h.dtype)
    first, second = F.cross_entropy(m.head(h[:12]), y[:12]), F.cross_entropy(m.head(h[12:]), y[12:])
    factor.mul_(3.0)
    return factor * first + second


def noise_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy(m.head(h[:12]), y[:12])
    noisy = F.dropout(first, 0.5) if torch.is_grad_enabled() else first
    return noisy + F.cross_entropy(m.head(F.dropout(h[12:], 0.5)), y[12:])


def autocast_between(m: Model, h: Tensor, y: Tensor) -> Tensor:
    first = F.cross_entropy(m.head(h[:12]), y[:12])
    with torch.autocast("cpu", torch.bfloat16):
        near = (first.float() * torch.ones(1, 1)) @ torch.ones(1, 1)
    return first + near.sum().to(h.dtype) + F.cross_entropy(m.head(h[12:]), y[12:])


ANY = [
    feeds_the_next, weight_changed_between, weight_of_rows_changed_between, read_without_gradient_between,
    written_down_between, added_to_what_is_kept, an_addend_changed_between, a_loss_changed_between,
    a_factor_changed_between, noise_between, in_checkpoints, autocast_between,
]  # fmt: skip


def leaves(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def step(model: Model, run: Callable[..., Any], x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    torch.manual_seed(1)
    model.zero_grad()
    found = leaves(run(x, y))
    sum(t.sum() * (n + 1) for n, t in enumerate(found) if t.requires_grad).backward()  # type: ignore[union-attr]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [t.detach().clone() for t in found], grads


def check(loss: Loss, dtype: torch.dtype = torch.float64, bias: bool = False, **options: Any) -> Watch:
    """A step, compiled and in eager, and the graphs in between."""
    torch.manual_seed(0)
    model = Model(loss, bias).to(dtype)
    x, y, watch = torch.randn(N, D, dtype=dtype), torch.randint(V, (N,)), Watch()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    want = step(model, model, x, y)
    model.load_state_dict(state)
    compiled = torch.compile(model, backend="cce", options={"inner": watch, "min_vocab": 0, **options})
    got = step(model, compiled, x, y)
    relative, absolute = (1e-9, 1e-11) if dtype == torch.float64 else (2e-5, 2e-6)
    for some, others in zip(got, want, strict=True):
        assert len(some) == len(others)
        for a, b in zip(some, others, strict=True):
            torch.testing.assert_close(a, b, rtol=relative, atol=absolute, equal_nan=True)
    return watch


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
@pytest.mark.parametrize("loss", JOINED, ids=lambda f: f.__name__)
def test_losses_on_one_weight_are_one_call(loss: Loss, strategy: str) -> None:
    watch = check(loss, strategy=strategy)
    assert watch.rewritten == 1
    early = JOINED[loss].endswith("with_grads") and strategy == "auto"
    assert watch.calls("with_grads") == early


@pytest.mark.parametrize("loss", [chunks, steps, some_ignored, distillation], ids=lambda f: f.__name__)
def test_a_bias_and_float32(loss: Loss) -> None:
    assert check(loss, torch.float32, bias=True).rewritten == 1


@pytest.mark.parametrize("loss", ANY, ids=lambda f: f.__name__)
def test_what_stands_between_keeps_its_meaning(loss: Loss) -> None:
    check(loss)


def test_a_mean_of_ignored_rows_alone_is_nan_as_in_eager() -> None:
    def loss(m: Model, h: Tensor, y: Tensor) -> Tensor:
        none = torch.full_like(y[:12], -100)
        return F.cross_entropy(m.head(h[:12]), none) + F.cross_entropy(m.head(h[12:]), y[12:])

    assert check(loss).calls("with_grads") == 1


@pytest.mark.parametrize("loss", [chunks, early_exits, later_tokens, distillation], ids=lambda f: f.__name__)
def test_lengths_that_change(loss: Loss) -> None:
    torch.manual_seed(0)
    watch, model = Watch(), Model(loss).double()
    compiled = torch.compile(model, backend="cce", options={"inner": watch, "min_vocab": 0})
    for rows in (12, 24, 27, 33):
        x, y = torch.randn(rows, D, dtype=torch.float64), torch.randint(V, (rows,))
        got, want = step(model, compiled, x, y), step(model, model, x, y)
        for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert watch.calls("with_grads") == len(watch.dynamo) == 2


@pytest.mark.parametrize("loss", [chunks, steps, distillation], ids=lambda f: f.__name__)
def test_one_gradient_of_the_weight_is_held(loss: Loss) -> None:
    """In bytes: that, what it is multiplied into, and little more for all that is of rows and tiles."""
    torch.manual_seed(0)
    model, x, y = Model(loss, width=512, classes=4000), torch.randn(N, 512), torch.randint(4000, (N,))
    run = torch.compile(model, backend="cce", options={"inner": "aot_eager"})
    step(model, run, x, y)
    model.zero_grad()
    assert peak_bytes(lambda: run(x, y).backward()) < 3.5 * model.head.weight.nbytes


def test_under_a_transform_nothing_is_noted() -> None:
    """There tensors have no memory of their own; the error is torch's."""
    h, w, y = torch.randn(4, D), torch.randn(V, D), torch.randint(V, (4,))
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda w: cce_fx.linear_cross_entropy(h, w, y))(w)


def test_explain_tells_what_became_of_each() -> None:
    torch.manual_seed(0)
    report = cce_fx.explain(Model(chunks), torch.randn(N, D), torch.randint(V, (N,)), options={"min_vocab": 0})
    assert [line.strategy for line in report.rewritten] == ["grads_in_forward"] * 3
    needed = [line.bytes_needed for line in report.rewritten]
    # The gradient of the weight is counted once.
    assert [needed[0] - one for one in needed] == [0, 4 * V * D, 4 * V * D]


def test_a_graph_module_s_code_is_that_of_its_graph() -> None:
    model, x, y = Model(chunks), torch.randn(N, D), torch.randint(V, (N,))
    seen: list[tuple[torch.fx.GraphModule, list[Tensor]]] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        seen.append((gm, inputs))
        return gm.forward

    want = torch.compile(model, backend=keep)(x, y)
    ((dynamo, inputs),) = seen
    gm = torch.fx.GraphModule(dynamo, dynamo.graph)  # Dynamo's own writes its code when it is first run
    cce_fx.rewrite(gm, policy=Policy(min_vocab=0, strategy="recompute"))
    assert gm.code.count("torch.ops.cce.") == 1
    torch.testing.assert_close(gm(*inputs)[0], want)


def test_calls_that_differ_make_gradients_in_the_forward_each() -> None:
    """Where one tells more than the others, they stay apart."""

    def loss(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = m.head(h[:12])
        return F.cross_entropy(z, y[:12]) + F.cross_entropy(m.head(h[12:]), y[12:]), z.detach().mean()

    watch = check(loss)
    assert watch.calls("with_grads") == watch.rewritten - 1 == 2  # and the rows that a mean needs beside


def test_an_accuracy_of_one_comes_out_of_the_call_of_all() -> None:
    def loss(m: Model, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = m.head(h[:12])
        hits = (z.argmax(-1) == y[:12]).float().mean()
        return F.cross_entropy(z, y[:12]) + F.cross_entropy(m.head(h[12:]), y[12:]), hits

    assert check(loss).calls("with_grads") == 1


def losses_of(model: Model, x: Tensor, y: Tensor) -> list[Tensor]:
    return [F.cross_entropy(model.head(a), b) for a, b in zip(x.chunk(3), y.chunk(3), strict=True)]


def functional_losses(model: Model, x: Tensor, y: Tensor) -> list[Tensor]:
    pairs = zip(x.chunk(3), y.chunk(3), strict=True)
    return [cce_fx.linear_cross_entropy(a, model.head.weight, b) for a, b in pairs]


def is_early(loss: Tensor) -> bool:
    """Whether a loss made its gradients in the forward."""
    nodes = [loss.grad_fn]
    for node in nodes:
        nodes += [n for n, _ in node.next_functions if n is not None]  # type: ignore[union-attr]
    return any("with_grads" in node.name() for node in nodes if node is not None)


@pytest.mark.parametrize("losses", [losses_of, functional_losses])
def test_losses_outside_a_graph_hold_one_gradient_of_the_weight(losses: Callable[..., list[Tensor]]) -> None:
    torch.manual_seed(0)
    model, x, y = Model(chunks, width=512, classes=4000), torch.randn(N, 512), torch.randint(4000, (N,))
    want = torch.autograd.grad(sum(losses_of(model, x, y)), model.head.weight)[0]  # type: ignore[arg-type]
    handle = cce_fx.lazy_head(model.head, {"min_vocab": 0}) if losses is losses_of else None
    for _ in range(2):  # after a backward, the first makes its gradient in the forward again
        model.zero_grad()
        found = losses(model, x, y)
        assert [is_early(loss) for loss in found] == [True, False, False]
        sum(found).backward()  # type: ignore[union-attr]
        torch.testing.assert_close(model.head.weight.grad, want)
    model.zero_grad()
    assert peak_bytes(lambda: sum(losses(model, x, y)).backward()) < 3.5 * model.head.weight.nbytes  # type: ignore[union-attr]
    first, *_ = found = losses(model, x, y)
    first.backward(retain_graph=True)
    assert not is_early(losses(model, x, y)[0])  # its gradient may be asked for again
    del first, found
    assert is_early(losses(model, x, y)[0])
    if handle is not None:
        handle.remove()


def drawn(seed: int) -> Loss:
    """Two to five losses on one weight, of kinds, reductions and sums that are drawn."""
    rng = random.Random(seed)
    kinds = [rng.choice(["rows", "next", "same", "fed", "other"]) for _ in range(rng.randint(2, 5))]
    options = [{"label_smoothing": rng.choice([0.0, 0.1])} for _ in kinds]
    options = [options[0] if rng.random() < 0.7 else o for o in options]
    reductions = [rng.choice(["mean", "sum", "none"]) for _ in kinds]
    factors = [rng.choice([1.0, 0.5, -2.0]) for _ in kinds]
    ignored = [rng.choice([0.0, 0.3, 1.0]) for _ in kinds]
    how, told = (
        rng.choice(["add", "iadd", "stack", "sum", "learnt", "apart"]),
        rng.choice([None, "detach", "no_grad", "argmax"]),
    )

    def loss(m: Model, h: Tensor, y: Tensor) -> Any:
        losses, seen, at = [], [], 0
        for n, kind in enumerate(kinds):
            a, b = h, y
            if kind == "rows":
                a, b = h[at : at + 7], y[at : at + 7]
                at = (at + 3) % 12
            elif kind == "next":
                h = a = torch.tanh(m.cell(h))
            elif kind == "fed" and losses:
                a = h * torch.sigmoid(losses[-1])
            elif kind == "other":
                b = y.flip(0)
            b = torch.where(torch.arange(len(b)) < ignored[n] * len(b), -100, b)
            z = m.head(a)
            one = F.cross_entropy(z, b, reduction=reductions[n], **options[n])
            one = one.sum() / 3 if reductions[n] == "none" else one
            one = torch.nan_to_num(one) if ignored[n] == 1.0 and n % 2 else one
            if told == "detach":
                seen.append(one.detach() * 2)
            elif told == "no_grad":
                with torch.no_grad():
                    seen.append(one + 1)
            elif told == "argmax" and n == 0:
                seen.append((z.argmax(-1) == b).double().mean())
            losses.append(factors[n] * one)
        if how == "apart":
            return (*losses, *seen)
        if how == "stack":
            total = torch.stack(losses).mean()
        elif how == "sum":
            total = sum(losses) / len(losses) + h.pow(2).mean()  # type: ignore[assignment]
        elif how == "learnt":
            total = (torch.stack(losses) * m.mix[0].exp()).sum()
        else:
            total = losses[0]
            for one in losses[1:]:
                if how == "iadd":
                    total += one
                else:
                    total = total + one
        return (total, *seen)

    return loss


@pytest.mark.parametrize("seed", [*range(12), *(pytest.param(n, marks=pytest.mark.slow) for n in range(12, 400))])
def test_drawn_sums_of_losses(seed: int) -> None:
    check(drawn(seed))
