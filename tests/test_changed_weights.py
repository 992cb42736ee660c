# SPDX-License-Identifier: Apache-2.0
"""Lazy logits that are read after the weights changed: their values from before, or an error, and never others."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import peak_bytes
from cce_fx import LazyLogits
from tests.helpers import HeadedModel

V, D = 1100, 16


class Model(HeadedModel):
    def __init__(self) -> None:
        super().__init__(D, V)


def compiled(**options: Any) -> tuple[Model, Callable[..., Any], Tensor, Tensor]:
    torch._dynamo.reset()
    model = Model()
    x, y = torch.randn(3, 7, D), torch.randint(0, V, (3, 7))
    return model, torch.compile(model, backend="cce", options={"inner": "aot_eager", **options}), x, y


# Every optimizer of torch that takes the parameters of a model, and the ways in which it can make its step.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", "SparseAdam")
}
STEPS = {
    "plain": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def optimizer_of(name: str, step: str, model: nn.Module) -> torch.optim.Optimizer | None:
    """None where the optimizer has no such step."""
    parameters = [p for p in model.parameters() if p.dim() == 2] if name == "Muon" else model.parameters()
    try:
        return OPTIMIZERS[name](parameters, lr=0.1, **STEPS[step])
    except (TypeError, RuntimeError):
        return OPTIMIZERS[name](parameters, lr=0.1) if step == "plain" else None


STEPPED = [(name, step) for name in OPTIMIZERS for step in STEPS if optimizer_of(name, step, Model()) is not None]


def test_the_optimizers_are_all_of_torch() -> None:
    assert len(OPTIMIZERS) >= 13 and len(STEPPED) >= 27


@pytest.mark.sample(2)
@pytest.mark.parametrize(("name", "step"), STEPPED, ids=lambda v: str(v))
def test_an_optimizers_step_leaves_them_as_they_were(name: str, step: str) -> None:
    model, call, x, y = compiled()
    before = call(x, y)[1].materialize().detach().clone()
    loss, logits = call(x, y)
    loss.backward()
    optimizer = optimizer_of(name, step, model)
    assert optimizer is not None
    optimizer.step(lambda: loss) if name == "LBFGS" else optimizer.step()
    assert isinstance(logits, LazyLogits) and logits.chain is not None
    assert not torch.equal(model(x, y)[1], before), "the step changed nothing"
    assert torch.equal((logits + 0).detach(), before)


@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
@pytest.mark.parametrize("name", ["AdamW", "SGD", "LBFGS"])
def test_a_step_that_runs_the_forward_itself(name: str, named: bool) -> None:
    """As lightning's: the forward is in the closure that is handed to the step."""
    model, call, x, y = compiled()
    optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
    kept: list[tuple[Tensor, Tensor]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        before = call(x, y)[1].materialize().detach().clone()
        loss, logits = call(x, y)
        loss.backward()
        kept.append((logits, before))
        return loss

    optimizer.step(closure=closure) if named else optimizer.step(closure)
    assert not torch.equal(model(x, y)[1], kept[-1][1]), "the step changed nothing"
    assert [outcome(*pair) for pair in kept] == ["values"] * len(kept)


def test_the_first_lazy_logits_of_a_process_may_be_made_inside_a_step() -> None:
    program = """
import torch, torch.nn.functional as F
head = torch.nn.Linear(8, 1100)
def f(x, y):
    z = head(x)
    return F.cross_entropy(z, y), z
call, x, y = torch.compile(f, backend="cce", options={"inner": "eager"}), torch.randn(4, 8), torch.arange(4)
optimizer, kept, before = torch.optim.SGD(head.parameters(), lr=1.0), [], head(x)
def closure():
    loss, z = call(x, y)
    kept.append(z)
    loss.backward()
    return loss
optimizer.step(closure)
torch.testing.assert_close(kept[0] + 0, before)
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parent.parent)


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD", "Adagrad", "RMSprop", "Lion"])
def test_a_compiled_step_gives_the_values_or_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name not in OPTIMIZERS:
        name = "Adadelta"
    model, call, x, y = compiled()
    graphs = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)

    def steps() -> int:
        torch._dynamo.reset()
        graphs.clear()
        optimizer = OPTIMIZERS[name](model.parameters(), lr=0.1)
        step = torch.compile(optimizer.step, backend=count)
        for _ in range(3):
            before = call(x, y)[1].materialize().detach().clone()
            loss, logits = call(x, y)
            loss.backward()
            step()
            assert outcome(logits, before) in ("values", "error")
        return len(graphs)

    ours = steps()
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_global_optimizer_pre_hooks", {})
    assert ours == steps() > 0, "what is done before a step is in the step's graph, or breaks it"


def outcome(logits: Tensor, before: Tensor) -> str:
    try:
        return "values" if torch.equal((logits + 0).detach(), before) else "other"
    except RuntimeError as error:
        assert "lazy" in str(error)
        return "error"


@torch.no_grad()
def numpy_view(model: Model) -> None:
    model.head.weight.detach().numpy()[:] *= 2


def assigned(model: Model) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2)


def loaded(model: Model, assign: bool) -> None:
    model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=assign)


@torch.no_grad()
def averaged(model: Model) -> None:
    torch._foreach_lerp_(list(model.parameters()), [torch.ones_like(p) for p in model.parameters()], 0.5)


@torch.no_grad()
def under_no_grad(function: Callable[..., Any], *args: Any) -> None:
    function(*args)


BY_HAND: dict[str, Callable[[Model], Any]] = {
    "in place": lambda m: under_no_grad(m.head.weight.mul_, 2.0),
    "of the bias": lambda m: under_no_grad(m.head.bias.add_, 1.0),
    "copy_": lambda m: under_no_grad(m.head.weight.copy_, m.head.weight * 2),
    "set_": lambda m: under_no_grad(m.head.weight.set_, m.head.weight.detach() * 2),
    ".data.mul_": lambda m: m.head.weight.data.mul_(2.0),
    ".data.clamp_": lambda m: m.head.weight.data.clamp_(max=0.01),
    ".data.copy_": lambda m: m.head.weight.data.copy_(torch.randn(V, D)),
    ".data[:] =": lambda m: m.head.weight.data.__setitem__(slice(None), 0.5),
    ".data.zero_ of the bias": lambda m: m.head.bias.data.zero_(),
    ".data =": lambda m: setattr(m.head.weight, "data", m.head.weight.data * 2),
    ".data = of the bias": lambda m: setattr(m.head.bias, "data", m.head.bias.data + 1),
    "detach().mul_": lambda m: m.head.weight.detach().mul_(2.0),
    "a view": lambda m: under_no_grad(m.head.weight.view(-1).mul_, 2.0),
    "numpy": numpy_view,
    "the storage": lambda m: m.head.weight.untyped_storage().copy_((m.head.weight.detach() * 2).untyped_storage()),
    "an initialiser": lambda m: nn.init.xavier_uniform_(m.head.weight),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()).detach() * 2, m.parameters()
    ),
    "load_state_dict": lambda m: loaded(m, False),
    "load_state_dict, assigned": lambda m: loaded(m, True),
    "another parameter": assigned,
    "_foreach_mul_": lambda m: under_no_grad(torch._foreach_mul_, list(m.parameters()), 2.0),
    "an average": averaged,
    "to another dtype": lambda m: m.double(),
    "clip_grad_norm_, which changes none": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1.0),
    "hidden's module": lambda m: under_no_grad(m.body.weight.mul_, 2.0),
}
UNTOUCHED = {"clip_grad_norm_, which changes none", "hidden's module", "another parameter", "load_state_dict, assigned"}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_change_by_hand_gives_the_values_or_an_error(name: str) -> None:
    model, call, x, y = compiled()
    before = call(x, y)[1].materialize().detach().clone()
    loss, logits = call(x, y)
    loss.backward()
    BY_HAND[name](model)
    assert outcome(logits, before) == ("values" if name in UNTOUCHED else "error")


@pytest.mark.parametrize(
    "read",
    [lambda z: z.argmax(-1), lambda z: z.topk(3).indices, lambda z: z.softmax(-1).sum(-1), lambda z: z.detach().cpu(),
     lambda z: z[0, 1], lambda z: F.cross_entropy(z.view(-1, V), torch.arange(21)), lambda z: z.float().mean()],
    ids=["argmax", "topk", "softmax", "cpu", "a row", "a loss", "mean"],
)  # fmt: skip
def test_every_way_to_read_after_the_step(read: Callable[[Tensor], Tensor]) -> None:
    model, call, x, y = compiled()
    want = read(call(x, y)[1]).detach()
    loss, logits = call(x, y)
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    assert torch.equal(read(logits).detach() * 1, want * 1)


def test_steps_of_several_optimizers_and_many_forwards() -> None:
    """Accumulation: each logits are those of their own forward, with one copy of the weights for all of a step."""
    model, call, x, y = compiled()
    head, body = (torch.optim.SGD(m.parameters(), lr=0.5) for m in (model.head, model.body))
    kept, want = [], []
    for _ in range(3):
        for _ in range(2):
            want.append(call(x, y)[1].materialize().detach().clone())
            loss, logits = call(x, y)
            loss.backward()
            kept.append(logits)
        body.step()
        head.step()
    weights = {id(z.chain.inputs[0]) for z in kept}
    assert len(weights) == 3
    assert all(torch.equal(z + 0, w) for z, w in zip(kept, want, strict=True))


def test_a_step_inside_the_backward() -> None:
    model, call, x, y = compiled()
    steps = {p: torch.optim.SGD([p], lr=0.5) for p in model.parameters()}
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: steps[p].step())
    before = call(x, y)[1].materialize().detach().clone()
    loss, logits = call(x, y)
    loss.backward()
    assert not torch.equal(model(x, y)[1], before)
    assert torch.equal((logits + 0).detach(), before)


def test_tied_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(V, D)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = F.linear(self.embed(x), self.embed.weight)
            return F.cross_entropy(logits.flatten(0, 1), x.flatten()), logits

    torch._dynamo.reset()
    model = Tied()
    call = torch.compile(model, backend="cce", options={"inner": "aot_eager"})
    x = torch.randint(0, V, (2, 9))
    before = call(x)[1].materialize().detach().clone()
    loss, logits = call(x)
    loss.backward()
    torch.optim.Adam(model.parameters(), fused=True).step()
    assert torch.equal((logits + 0).detach(), before)


def test_a_gradient_through_logits_read_after_the_step() -> None:
    """What eager refuses, since the weights are others: the gradient is of the forward that was."""
    model, call, x, y = compiled()
    _, logits = call(x, y)
    want = torch.autograd.grad(model(x, y)[1].sum(), list(model.parameters()))
    (model.head.weight.sum() + model.head.bias.sum()).backward()
    torch.optim.SGD(model.head.parameters(), lr=0.1).step()
    model.zero_grad()
    logits.sum().backward()
    for p, w in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(p.grad, w)


def test_the_option_to_have_an_error() -> None:
    model, call, x, y = compiled(after_step="error")
    before = call(x, y)[1].materialize().detach().clone()
    for fused in (False, True):
        loss, logits = call(x, y)
        loss.backward()
        torch.optim.Adam(model.parameters(), fused=fused).step()
        assert outcome(logits, before) == "error"
        before = call(x, y)[1].materialize().detach().clone()


def test_nothing_is_copied_where_no_logits_are_alive() -> None:
    model, call, x, y = compiled()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def step(keep: bool) -> None:
        loss, logits = call(x, y)
        if not keep:
            del logits
        loss.backward()
        optimizer.step()

    step(False)
    weights = (V * D + V) * 4
    assert peak_bytes(lambda: step(True)) - peak_bytes(lambda: step(False)) <= weights + 4096
    _, logits = call(x, y)
    logits.sum()  # read: nothing is needed any more
    assert peak_bytes(optimizer.step) < weights / 2


def test_a_copy_of_the_model_steps_alone() -> None:
    """An optimizer of other weights takes no copies of these."""
    model, call, x, y = compiled()
    other = copy.deepcopy(model)
    loss, logits = call(x, y)
    loss.backward()
    F.mse_loss(other(x, y)[1], torch.zeros(3, 7, V)).backward()
    weight = logits.chain.inputs[0]
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert logits.chain.inputs[0] is weight


def test_nan_weights_equal_themselves() -> None:
    model, call, x, y = compiled()
    with torch.no_grad():
        model.head.weight[5] = torch.nan
    assert outcome(call(x, y)[1].nan_to_num(), call(x, y)[1].materialize().detach().nan_to_num()) == "values"
