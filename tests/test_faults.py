# SPDX-License-Identifier: Apache-2.0
"""A failure of the project's own is never the program's: at each stage of its work, one is put there on purpose."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import cce_fx
from cce_fx import LazyLogits
from cce_fx import backend as backend_module
from cce_fx.passes import faults, pipeline, rewriter
from cce_fx.passes import trace as trace_module

V, D = 1100, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)
        self.register_buffer("calls", torch.zeros(()))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.add_(1)
        logits = self.head(self.drop(self.body(x)))
        return F.cross_entropy(logits, y), logits


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("on purpose")


# Where the fault is put, and the name of the stage that the warning tells.
STAGES: dict[str, tuple[Any, str, str]] = {
    "trace": (trace_module, "_outcome", "finding losses"),
    "decide": (pipeline, "decide", "deciding"),
    "rewrite": (rewriter, "_write", "rewriting"),
    "propagate": (rewriter, "propagate", "rewriting"),
    "erase": (pipeline, "erase_unused", "rewriting"),
    "cut outputs": (backend_module, "cut_outputs", "making logits lazy"),
    "put back": (backend_module, "restore", "compiling the rewritten graph"),
    "first call": (LazyLogits, "make", "the first call"),
}


@pytest.fixture(autouse=True)
def fallen_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What users have: failures are not raised. And nothing is left of them."""
    monkeypatch.setattr(faults, "RAISED", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def told() -> Iterator[list[str]]:
    """The warnings of the project's logger."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("cce_fx")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


def data() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(6, D, generator=gen), torch.randint(V, (6,), generator=gen)


def step(model: Model, call: Callable[..., Any], seed: int) -> tuple[Tensor, list[Tensor], Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    loss, logits = call(*data())
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()], (logits + 0).detach()


def check_as_it_was(model: Model, call: Callable[..., Any], steps: int = 2, inner: str = "aot_eager") -> None:
    """Loss, gradients, logits, the state that a call changes and random numbers are those of the graph as it was."""
    torch.manual_seed(0)
    plain = Model()
    expected = torch.compile(plain, backend=inner)
    for seed in range(steps):
        for got, want in zip(step(model, call, seed), step(plain, expected, seed), strict=True):
            torch.testing.assert_close(got, want)
    assert model.calls == plain.calls == steps


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_the_program_runs_as_it_was(name: str, inner: str, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    owner, attribute, stage = STAGES[name]
    model = Model()
    call = torch.compile(model, backend="cce", options={"inner": inner})
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, fail)
        check_as_it_was(model, call, inner=inner)
    (message,) = told
    assert f"{stage}: KeyError: 'on purpose'" in message and "test_faults.py" in message
    if stage != "the first call":
        assert counters["cce_fx"]["declined_internal"] == 1 and not counters["cce_fx"]["rewritten"]


@pytest.mark.parametrize("name", [n for n in STAGES if n not in ("first call", "put back")])
def test_explain_lists_it(name: str, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    owner, attribute, _ = STAGES[name]
    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, fail)
        report = cce_fx.explain(Model(), *data())
    assert not report.rewritten
    (declined,) = report.declined
    assert declined.reason == "INTERNAL" and "on purpose" in declined.message and len(told) == 1


@pytest.mark.parametrize("name", [n for n in STAGES if n != "first call"])
def test_strict_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, _ = STAGES[name]
    call = torch.compile(Model(), backend="cce", options={"inner": "eager", "strict": True})
    with monkeypatch.context() as patch, pytest.raises(Exception, match=r"strict: no loss.*(\n.*)*on purpose"):
        patch.setattr(owner, attribute, fail)
        call(*data())


def is_cut(gm: torch.fx.GraphModule) -> bool:
    return any("cce." in str(n.target) for n in gm.graph.nodes)


def test_an_inner_backend_that_fails_on_the_rewritten_graph_alone(told: list[str]) -> None:
    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if is_cut(gm):
            # As a compiler that has changed the graph already when it fails.
            for node in list(gm.graph.nodes)[-3:-1]:
                node.meta.clear()
            raise KeyError("on purpose")
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    model = Model()
    check_as_it_was(model, torch.compile(model, backend="cce", options={"inner": inner}))
    assert "compiling the rewritten graph" in told[0] and len(told) == 1


def test_an_inner_backend_that_fails_on_every_graph_raises_its_own_error(told: list[str]) -> None:
    graphs = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(is_cut(gm))
        raise KeyError("the backend's")

    with pytest.raises(Exception, match="the backend's"):
        torch.compile(Model(), backend="cce", options={"inner": inner})(*data())
    assert graphs == [True, False] and not told


@pytest.mark.parametrize("at", ["forward", "loss"])
def test_code_that_fails_when_it_is_called(at: str, told: list[str]) -> None:
    """After it drew random numbers and wrote to a buffer, or before."""

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        compiled = torch._dynamo.lookup_backend("aot_eager")(gm, inputs)
        if not is_cut(gm):
            return compiled

        def call(*args: Any) -> Any:
            if at == "loss":
                compiled(*args)
            raise AssertionError("expected size 2==2, stride 576==512")

        return call

    model = Model()
    check_as_it_was(model, torch.compile(model, backend="cce", options={"inner": inner}), steps=3)
    (message,) = told
    assert "the first call: AssertionError: expected size" in message


def test_other_lengths_after_a_first_call_that_failed(told: list[str]) -> None:
    """What is compiled in its place is for the sizes that come, as the graph was."""

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        return fail if is_cut(gm) else torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    model = Model().eval()
    call = torch.compile(model, backend="cce", dynamic=True, options={"inner": inner})
    for rows in (6, 9, 4):
        x, y = torch.randn(rows, D), torch.randint(V, (rows,))
        torch.testing.assert_close(call(x, y)[0], model(x, y)[0])
    assert len(told) == 1


def test_an_input_that_changed_unseen_makes_the_error_stand(told: list[str]) -> None:
    """A call that cannot be taken back is not repeated."""
    model = Model()

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        if not is_cut(gm):
            return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

        def call(*args: Any) -> Any:
            with torch.no_grad():
                model.body.bias.add_(1)
            raise AssertionError("on purpose")

        return call

    with pytest.raises(AssertionError, match="on purpose"):
        torch.compile(model, backend="cce", options={"inner": inner})(*data())


def test_errors_of_the_program_stay_what_they_are(told: list[str]) -> None:
    x, y = data()
    call = torch.compile(Model(), backend="cce", options={"inner": "aot_eager"})
    with pytest.raises(IndexError, match="out of bounds|out of range") as raised:
        call(x, y + V)
    seen, error = [], raised.value
    while error is not None:  # a circle here, and whoever walks along an error's causes walks for ever
        assert all(error is not other for other in seen)
        seen.append(error)
        error = error.__cause__ or error.__context__
    assert call(x, y)[0].isfinite()
    with pytest.raises(Exception, match="shape|size"):
        torch.compile(Model(), backend="cce")(torch.randn(6, D + 1), y)
    assert not told


def test_a_loss_on_lazy_logits(monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """What cannot be cut outside the graph either is read, and runs as it was."""
    model = Model().eval()
    x, y = data()
    _, logits = torch.compile(model, backend="cce", options={"inner": "aot_eager"})(x, y)
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "decide", fail)
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
    torch.testing.assert_close(loss, F.cross_entropy(model(x, y)[1], y, label_smoothing=0.1))
    assert len(told) == 1


def test_a_pass_in_a_pipeline_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    inputs = [torch.randn(6, D), torch.randn(V, D), torch.randint(V, (6,))]
    gm = torch.fx.symbolic_trace(loss)
    before = str(gm.graph)
    with monkeypatch.context() as patch:
        patch.setattr(rewriter, "propagate", fail)
        gm, report = cce_fx.rewrite(gm, inputs)
    assert str(gm.graph) == before and report.declined[0].reason == "INTERNAL"
    torch.testing.assert_close(gm(*inputs), loss(*inputs))


def test_the_tests_would_see_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere in the tests a failure is an error."""
    monkeypatch.setattr(faults, "RAISED", True)
    monkeypatch.setattr(pipeline, "decide", fail)
    with pytest.raises(Exception, match="on purpose"):
        torch.compile(Model(), backend="cce", options={"inner": "eager"})(*data())
