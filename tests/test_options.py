# SPDX-License-Identifier: Apache-2.0
"""Options: validated, named in their errors, and inductor's own passed on with inductor's meaning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx
from cce_fx import _torch, op
from cce_fx.options import Options, split

from .helpers import Watch


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"logit": "keep"}, ValueError, "'logits'"),
        ({"stategy": "auto"}, ValueError, "'strategy'"),
        ({"max_autotun": True}, ValueError, "'max_autotune'"),
        ({"logits": "lasy"}, ValueError, "'lazy'"),
        ({"strategy": "fast"}, ValueError, "strategy"),
        ({"workspace": -1}, ValueError, "workspace"),
        ({"workspace": "1MB"}, TypeError, "workspace"),
        ({"filter_eps": 2.0}, ValueError, "filter_eps"),
        ({"filter_eps": "no"}, TypeError, "filter_eps"),
        ({"strict": 1}, ValueError, "strict"),
        ({"inner": 3}, ValueError, "inner"),
        ({"inner": "cce"}, ValueError, "inner"),
        ({"inner": "eager", "max_autotune": True}, ValueError, "max_autotune"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        split(options)


def test_inductors_options_pass_through() -> None:
    ours, rest = split({"logits": "keep", "max_autotune": False, "epilogue-fusion": True})
    assert ours == Options(logits="keep")
    assert rest == {"max_autotune": False, "epilogue-fusion": True}


def _loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def test_a_filter_reaches_the_kernel_and_leaves_gradients_on_a_cpu_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    h, y = torch.randn(30, 8, requires_grad=True), torch.randint(0, 40, (30,))
    w, bounds, choose = torch.randn(2000, 8, requires_grad=True), [], op.choose
    monkeypatch.setattr(op, "choose", lambda problem: (bounds.append(problem.filter_eps), choose(problem))[1])

    def grads(options: dict[str, Any]) -> tuple[Tensor, ...]:
        torch._dynamo.reset()
        call = torch.compile(_loss, backend="cce", options={"inner": "eager", **options})
        return torch.autograd.grad(call(h, w, y), (h, w))

    found = [grads(options) for options in ({}, {"filter_eps": 0.1}, {"filter_eps": "auto"})]
    found.append(torch.autograd.grad(cce_fx.linear_cross_entropy(h, w, y, filter_eps=0.2), (h, w)))
    assert bounds == [None, 0.1, torch.finfo(torch.float32).eps / 4, 0.2]
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others, strict=True))


def _inputs() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True), torch.randint(0, 50, (6,))]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_mean_what_they_mean_for_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(gm: Any, inputs: Any, config_patches: dict[str, Any], **kwargs: Any) -> Any:
        seen.append(dict(config_patches))
        return original(gm, inputs, config_patches=config_patches, **kwargs)

    original = _torch.compile_fx
    monkeypatch.setattr(_torch, "compile_fx", spy)
    torch._dynamo.reset()
    h, w, y = _inputs()
    torch.testing.assert_close(torch.compile(_loss, backend="cce", mode=mode)(h, w, y), _loss(h, w, y))
    assert seen == [torch._inductor.list_mode_options(mode, None)]


@pytest.mark.parametrize(
    "how, tune",
    [({"mode": "max-autotune-no-cudagraphs"}, True), ({"options": {"max_autotune": True}}, True), ({}, False)],
)
def test_kernels_may_tune_only_where_inductor_may(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], tune: bool
) -> None:
    graphs = []
    monkeypatch.setattr(_torch, "compile_fx", lambda gm, *_, **__: graphs.append(gm) or gm.forward)
    torch._dynamo.reset()
    torch.compile(_loss, backend="cce", **how)(*_inputs())
    (call,) = (n for n in graphs[0].graph.nodes if "cce.linear" in str(n.target))
    names = [a.name for a in call.target._schema.arguments]
    assert call.args[names.index("tune")] is tune


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
def test_strategy_chooses_the_operator(strategy: str) -> None:
    watch = Watch()
    torch._dynamo.reset()
    torch.compile(_loss, backend="cce", options={"inner": watch, "strategy": strategy})(*_inputs())
    assert bool(watch.calls("with_grads")) == (strategy == "grads_in_forward")
    assert watch.rewritten == 1


def test_strict_raises_where_nothing_could_be_rewritten() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w).relu(), y)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict.*\n.*declined"):
        torch.compile(program, backend="cce", options={"strict": True, "inner": "eager"})(*_inputs())


def test_fullgraph_and_dynamic_are_accepted() -> None:
    for kwargs in ({"fullgraph": True}, {"dynamic": True}, {"dynamic": False}):
        torch._dynamo.reset()
        h, w, y = _inputs()
        compiled = torch.compile(_loss, backend="cce", options={"inner": "aot_eager"}, **kwargs)
        torch.testing.assert_close(compiled(h, w, y), _loss(h, w, y))


def test_nothing_global_changes() -> None:
    before = torch._inductor.config.get_config_copy(), torch._dynamo.config.get_config_copy()
    torch._dynamo.reset()
    torch.compile(_loss, backend="cce", mode="max-autotune-no-cudagraphs")(*_inputs())
    assert (torch._inductor.config.get_config_copy(), torch._dynamo.config.get_config_copy()) == before


def test_an_inner_backend_sees_the_rewritten_graph_with_right_values() -> None:
    graphs = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(_loss, backend="cce", options={"inner": inner})(*_inputs())
    (gm,) = graphs
    assert "cce.linear_cross_entropy" in gm.code
    shapes = {n.name: n.meta["example_value"] for n in gm.graph.nodes if n.op == "call_function"}
    got = torch.fx.Interpreter(gm)
    for name, value in _values(got, _inputs()).items():
        fake = shapes.get(name)
        if isinstance(value, Tensor) and isinstance(fake, Tensor):
            assert (value.shape, value.dtype, value.stride()) == (fake.shape, fake.dtype, fake.stride()), name


def _values(interpreter: torch.fx.Interpreter, inputs: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Keep(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            found[n.name] = super().run_node(n)
            return found[n.name]

    order = [n.name for n in interpreter.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
    by_name = dict(zip(("L_h_", "L_w_", "L_y_"), inputs, strict=True))
    Keep(interpreter.module).run(*(by_name[n.replace("l_", "L_", 1)] for n in order))  # type: ignore[arg-type]
    return found
