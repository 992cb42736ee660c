# SPDX-License-Identifier: Apache-2.0
"""The pass inside pipelines of the user's own: beside other passes, with rules and reasons of the user's, and caches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import cce_fx
from cce_fx.passes import BEGINNERS, RULES, Call, Policy, Reason, rule

from .helpers import compare

N, D, V = 12, 6, 50


def tensors() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, generator=gen).requires_grad_() for s in ((N, D), (V, D)))
    return [h, w, torch.randint(V, (N,), generator=gen)]


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


@torch.library.custom_op("cce_fx_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


twice.register_autograd(lambda ctx, grad: grad * 2)


def with_twice(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(torch.ops.cce_fx_tests.twice(F.linear(h, w)), y)


@pytest.fixture
def rules() -> Iterator[None]:
    before, begin = dict(RULES), set(BEGINNERS)
    yield
    RULES.clear()
    RULES.update(before)
    BEGINNERS.clear()
    BEGINNERS.update(begin)


def test_beside_other_passes() -> None:
    ours = cce_fx.CutCrossEntropyPass(Policy(min_vocab=0))
    order = []

    def passes(graph: torch.fx.Graph) -> None:
        order.append(sum(str(n.target).startswith("cce.") for n in graph.nodes))
        ours(graph)
        order.append(sum(str(n.target).startswith("cce.") for n in graph.nodes))

    torch._dynamo.reset()
    with torch._inductor.config.patch(pre_grad_custom_pass=passes):
        got = torch.compile(loss)(*tensors())
    torch.testing.assert_close(got, loss(*tensors()))
    assert order == [0, 1] and len(ours.report.rewritten) == 1


def test_a_rule_of_the_users(rules: None) -> None:
    def explain() -> cce_fx.Report:
        return cce_fx.explain(with_twice, *tensors(), options=cce_fx.Options(min_vocab=0))

    assert explain().declined[0].reason == "NO_RULE" and "twice" in explain().declined[0].message

    @rule(torch.ops.cce_fx_tests.twice.default)
    def scaled(call: Call) -> object:
        view = call.view()
        if view is None:
            return None
        if view.epilogue.softcap is not None:
            return call.decline(Reason.NO_RULE, "twice a cap")
        return view.at(call.node, epilogue=type(view.epilogue)(scale=view.epilogue.scale * 2))

    assert len(explain().rewritten) == 1
    compare(with_twice, tensors())
    for tracer in (torch.fx.symbolic_trace, lambda f: make_fx(f)(*(t.detach() for t in tensors()))):
        gm, report = cce_fx.rewrite(tracer(with_twice), [t.detach() for t in tensors()], Policy(min_vocab=0))
        assert len(report.rewritten) == 1
        torch.testing.assert_close(gm(*tensors()), with_twice(*tensors()))


@torch.library.custom_op("cce_fx_tests::linear", mutates_args=())
def unlike_linear(h: Tensor, w: Tensor) -> Tensor:
    return (h @ w.t()).relu()


@unlike_linear.register_fake
def _(h: Tensor, w: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], w.shape[0])


def test_an_operator_of_another_library_is_not_taken_for_torchs() -> None:
    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.ops.cce_fx_tests.linear(h, w), y)

    assert not cce_fx.explain(program, *(t.detach() for t in tensors()), options=cce_fx.Options(min_vocab=0)).rewritten


def test_an_operation_has_one_rule() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        rule("linear")(lambda call: None)


def test_the_cache_key_changes_with_rules_and_policy(rules: None) -> None:
    ours = cce_fx.CutCrossEntropyPass()
    before = ours.uuid()
    assert before == cce_fx.CutCrossEntropyPass().uuid()
    assert before != cce_fx.CutCrossEntropyPass(Policy(min_vocab=0)).uuid()
    rule(torch.special.expit)(lambda call: None)
    assert before != ours.uuid()


def test_a_stale_cache_entry_is_not_used(rules: None, tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled twice through inductor's cache, the second time under another rule: the second result is the rule's."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    results = []
    for factor in (1.0, 3.0):
        RULES.pop("neg", None)

        @rule("neg")
        def minus(call: Call, factor: float = factor) -> object:  # deliberately wrong, to be told apart
            view = call.view()
            return view and view.at(call.node, epilogue=type(view.epilogue)(scale=-factor))

        torch._dynamo.reset()
        compiled = torch.compile(lambda h, w, y: F.cross_entropy(-F.linear(h, w), y), backend="cce",
                                 options={"min_vocab": 0})  # fmt: skip
        results.append(float(compiled(*(t.detach() for t in tensors()))))
    h, w, y = (t.detach() for t in tensors())
    wanted = [float(F.cross_entropy(-f * F.linear(h, w), y)) for f in (1.0, 3.0)]
    assert results == pytest.approx(wanted)


def test_twenty_shapes_compile_at_most_twice() -> None:
    compiled_times = []

    def inner(gm: torch.fx.GraphModule, inputs: object) -> object:
        compiled_times.append(sum("cce.linear" in str(n.target) for n in gm.graph.nodes))
        return gm.forward

    def program(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        logits = F.linear(h, w)
        return F.cross_entropy(logits[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="cce", options={"inner": inner, "min_vocab": 0})
    w = torch.randn(V, D)
    for at in range(20):
        b, t = 2 + at % 5, 3 + at
        h, y = torch.randn(b, t, D), torch.randint(V, (b, t))
        torch.testing.assert_close(compiled(h, w, y), program(h, w, y))
    assert compiled_times == [1, 1] or compiled_times == [1]


def test_caches_on_disk_know_the_version_of_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that was compiled before an operator changed must not be run after."""
    from torch._inductor.utils import fresh_cache

    from cce_fx import backend

    def hits(digest: str) -> tuple[int, int]:
        monkeypatch.setattr(backend, "source_digest", lambda: digest)
        torch._dynamo.reset()
        counters.clear()
        h, w, y = tensors()
        torch.compile(loss, backend="cce", options={"min_vocab": 0})(h, w, y).backward()
        assert torch.compiler.config.cache_key_tag == ""
        found = counters["aot_autograd"]
        return found["autograd_cache_hit"], found["autograd_cache_miss"]

    with fresh_cache():
        assert hits("first") == (0, 1)
        assert hits("first") == (1, 0)
        assert hits("second") == (0, 1)


class Scored(torch.nn.Module):
    """Logits in float32, as `torch.export` writes the cast with a check beside it."""

    def __init__(self, entropy: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head, self.entropy = torch.nn.Linear(8, 500), entropy

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self.head(x).float()
        if not self.entropy:
            return F.cross_entropy(z.view(-1, 500), y.view(-1)), z.argmax(-1)
        p = z.log_softmax(-1)
        return (p.exp() * p).sum(-1).mean(), z.topk(3).indices


@pytest.mark.parametrize("entropy", [False, True])
def test_an_exported_loss_of_cast_logits_leaves_no_logits(entropy: bool) -> None:
    model, x, y = Scored(entropy).bfloat16().eval(), torch.randn(2, 30, 8).bfloat16(), torch.randint(500, (2, 30))
    module = torch.export.export(model, (x, y)).module()
    expected = module(x, y)
    cut, report = cce_fx.rewrite(module, None, Policy(min_vocab=0))  # type: ignore[arg-type]
    assert [(r.tier, r.logits) for r in report.rewritten] == [("rows" if entropy else "kernel", "unused")]
    loss, best = cut(x, y)
    torch.testing.assert_close(loss, expected[0], rtol=1e-3, atol=1e-3)
    assert (best == expected[1]).float().mean() > 0.8  # equal but for a rounding
