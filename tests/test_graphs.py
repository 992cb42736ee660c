# SPDX-License-Identifier: Apache-2.0
"""Graphs from every tracer, and graphs inside higher-order operators."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import cce_fx
from cce_fx.passes import Policy

from .helpers import compare

N, D, V = 12, 6, 50


class Model(nn.Module):
    def __init__(self, loss: str) -> None:
        super().__init__()
        self.head, self.loss = nn.Linear(D, V), loss
        self.cross_entropy, self.log_softmax, self.nll = nn.CrossEntropyLoss(), nn.LogSoftmax(-1), nn.NLLLoss()

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        if self.loss == "three dimensions":
            return F.cross_entropy(self.head(h.view(3, 4, D)).view(-1, V), y)
        z = self.head(h)
        if self.loss == "cross_entropy":
            return self.cross_entropy(z, y)
        if self.loss == "nll":
            return self.nll(self.log_softmax(z), y)
        if self.loss == "gather":
            return -z.log_softmax(-1).gather(1, y[:, None]).mean()
        return (z.logsumexp(-1) - z.gather(1, y[:, None])[:, 0]).mean()


TRACERS: dict[str, Callable[..., GraphModule]] = {
    "symbolic_trace": lambda m, *args: torch.fx.symbolic_trace(m),
    "export": lambda m, *args: torch.export.export(m, args).module(),
    "export, core ATen": lambda m, *args: torch.export.export(m, args).run_decompositions().module(),
    "make_fx": lambda m, *args: make_fx(m)(*args),
}


@pytest.mark.parametrize("tracer", TRACERS)
@pytest.mark.parametrize("loss", ["cross_entropy", "three dimensions", "nll", "gather", "logsumexp"])
def test_every_tracer(tracer: str, loss: str) -> None:
    torch.manual_seed(0)
    model, h, y = Model(loss), torch.randn(N, D), torch.randint(V, (N,))
    if loss not in ("gather", "logsumexp"):
        y[0] = -100
    gm = TRACERS[tracer](model, h, y)
    inputs = [h, y] if tracer == "symbolic_trace" else None
    gm, report = cce_fx.rewrite(gm, inputs, Policy(min_vocab=0))
    assert report.rewritten and not report.declined, report
    values = [n.meta.get("example_value", n.meta.get("val")) for n in gm.graph.nodes if n.op == "call_function"]
    assert max(v.numel() for v in values if isinstance(v, Tensor)) < N * V
    torch.testing.assert_close(gm(h, y), model(h, y))


def test_a_hooked_module_stays_a_call() -> None:
    model = Model("cross_entropy")
    model.head.register_forward_hook(lambda module, args, out: out.relu())
    h, y = torch.randn(N, D), torch.randint(V, (N,))
    gm, report = cce_fx.rewrite(torch.fx.symbolic_trace(model), [h, y], Policy(min_vocab=0))
    assert not report.rewritten
    torch.testing.assert_close(gm(h, y), model(h, y))


def tensors() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, generator=gen).requires_grad_() for s in ((N, D), (V, D)))
    return [h, w, torch.randint(V, (N,), generator=gen)]


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


@pytest.mark.parametrize("reentrant", [False, True])
def test_inside_an_activation_checkpoint(reentrant: bool) -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return checkpoint(loss, h.tanh(), w, y, use_reentrant=reentrant)

    compare(program, tensors())
    report = cce_fx.explain(program, *tensors(), options=cce_fx.Options(min_vocab=0))
    assert [r.strategy for r in report.rewritten] == ["recompute"] and not report.declined


def test_inside_a_branch() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return torch.cond(h.sum() > 0, loss, lambda h, w, y: loss(2 * h, w, y), (h, w, y))

    with torch.no_grad():
        plain = [t.detach() for t in tensors()]
        compare(program, plain)
        report = cce_fx.explain(program, *plain, options=cce_fx.Options(min_vocab=0))
    assert len(report.rewritten) == 2


def test_a_graph_without_shapes_asks_for_them() -> None:
    graph = torch.fx.symbolic_trace(Model("cross_entropy"))
    (declined,) = cce_fx.rewrite(graph)[1].declined
    assert declined.reason == "NO_META" and "example_inputs" in declined.advice
    inputs = (torch.randn(N, D), torch.randint(V, (N,)))
    assert cce_fx.rewrite(torch.fx.symbolic_trace(Model("cross_entropy")), inputs)[1].rewritten


@pytest.mark.parametrize("weight", ["parameter", "argument"])
def test_sizes_of_a_head_may_be_symbols(weight: str) -> None:
    torch.compiler.reset()
    head, counts = torch.nn.Linear(D, V), torch._dynamo.utils.counters["cce_fx"]
    counts.clear()
    program = {
        "parameter": lambda x, w, y: F.cross_entropy(head(x), y),
        "argument": lambda x, w, y: F.cross_entropy(F.linear(x, w), y),
    }[weight]
    inputs = (torch.randn(N, D), torch.randn(V, D, requires_grad=True), torch.randint(V, (N,)))
    options = {"inner": "eager", "min_vocab": 0}
    found = torch.compile(program, backend="cce", dynamic=True, options=options)(*inputs)
    torch.testing.assert_close(found, program(*inputs))
    assert (counts["rewritten"], counts["declined_dynamic"]) == (1, 0)
