# SPDX-License-Identifier: Apache-2.0
"""`lazy_head`: lazy logits of a module that nothing compiles."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cce_fx
from benchmarks import measure
from cce_fx import LazyLogits

B, T, D, V = 4, 64, 32, 4096
LOGITS = B * T * V * 4


class Capped(nn.Module):
    """As Gemma caps its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.weight = nn.LayerNorm(D), nn.Parameter(torch.randn(V, D) / 6)

    def forward(self, x: Tensor) -> Tensor:
        return 30.0 * torch.tanh(F.linear(self.norm(x), self.weight) / 30.0)


HEADS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(D, V),
    "without bias": lambda: nn.Linear(D, V, bias=False),
    "norm and linear": lambda: nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V)),
    "capped": Capped,
    "another layer before": lambda: nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, V)),
    "cast after": lambda: nn.Sequential(nn.Linear(D, V), Double()),
}


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(V, D), nn.Linear(D, D), head

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if float(x.sum()) > 1e9:  # what a compiler cannot follow
            raise ValueError("too large")
        return self.lm_head(self.body(x).relu())


def made(name: str) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    return Model(HEADS[name]()), torch.randint(V, (B, T))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def trained(model: nn.Module, ids: Tensor, loss: Callable[..., Tensor] = loss_of) -> tuple[Tensor, list[Tensor], int]:
    """The loss, the gradients and the bytes of the largest allocation of the second of two steps."""
    for _ in range(2):
        model.zero_grad()

        def step() -> Tensor:
            found = loss(model(ids), ids)
            found.backward()
            return found.detach()

        found, changes = measure.allocations(step)
    return found, [p.grad for p in model.parameters() if p.grad is not None], max(changes)


@pytest.mark.parametrize("name", HEADS)
def test_a_step_is_eagers_and_makes_no_logits(name: str) -> None:
    model, ids = made(name)
    expected, grads, held = trained(model, ids)
    names = [*model.state_dict()]
    handle = cce_fx.lazy_head(model.lm_head)
    assert [*model.state_dict()] == names
    found, ours, less = trained(model, ids)
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # The workspace of logits in float32 is a few rows, and no gradient of a weight is as large as the logits.
    assert held >= LOGITS and less < LOGITS // 2
    handle.remove()
    assert type(model(ids)) is Tensor


def test_the_options_are_those_of_the_backend() -> None:
    model, ids = made("linear")
    model.lm_head.requires_grad_(False)  # whose gradient is as large as a workspace
    for workspace in (1 << 17, 1 << 19):
        with cce_fx.lazy_head(model.lm_head, {"workspace": workspace}):
            trained(model, ids)
            _, changes = measure.allocations(functools.partial(loss_of, model(ids), ids))
        assert workspace / 2 < max(changes) <= workspace
    with pytest.raises(ValueError, match="strategy"):
        cce_fx.lazy_head(model.lm_head, {"strategy": "none"})
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        cce_fx.lazy_head(lambda x: x)  # type: ignore[arg-type]


def test_an_error_in_the_module_ends_what_was_begun() -> None:
    model, ids = made("linear")
    cce_fx.lazy_head(model.lm_head)
    with pytest.raises(RuntimeError):
        model.lm_head(torch.randn(3, D + 1))
    assert type(F.linear(torch.randn(3, D), model.lm_head.weight)) is Tensor


def test_without_a_gradient_size_decides() -> None:
    model, ids = made("linear")
    cce_fx.lazy_head(model.lm_head)
    with torch.no_grad():
        assert type(model(ids)) is Tensor
        many = ids.repeat(4, 1)
        assert isinstance(model(many), LazyLogits)
        torch.testing.assert_close(model(many).argmax(-1), model(ids).argmax(-1).repeat(4, 1))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_is_as_lazy(how: str) -> None:
    model, ids = made("linear")
    cce_fx.lazy_head(model.lm_head)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    logits = other(ids)
    assert isinstance(logits, LazyLogits) and logits.chain is not None
    loss_of(logits, ids).backward()
    assert other.lm_head.weight.grad is not None and model.lm_head.weight.grad is None


def test_under_autocast() -> None:
    model, ids = made("linear")
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_of(model(ids), ids)
    cce_fx.lazy_head(model.lm_head)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids)
        assert isinstance(logits, LazyLogits) and logits.dtype == torch.bfloat16
        found = loss_of(logits, ids)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["aot_eager", "cce"])
def test_a_loss_that_is_compiled_apart(backend: str) -> None:
    """As torchtitan has it: blocks compiled one by one, and the loss a function of its own."""
    torch._dynamo.reset()
    model, ids = made("linear")
    expected, grads, _ = trained(model, ids)
    model.body.compile(backend="aot_eager")
    cce_fx.lazy_head(model.lm_head)
    options: dict[str, Any] = {"options": {"inner": "aot_eager"}} if backend == "cce" else {}
    found, ours, less = trained(model, ids, torch.compile(loss_of, backend=backend, **options))
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert less < LOGITS // 2


def test_a_compiled_model_with_a_lazy_head_is_the_backends() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, V))
    ids = torch.randint(V, (B, T))
    expected = loss_of(model(ids), ids)
    cce_fx.lazy_head(model[1])
    call = torch.compile(model, backend="cce", options={"inner": "aot_eager"})
    logits = call(ids)
    assert isinstance(logits, LazyLogits)
    torch.testing.assert_close(loss_of(logits, ids), expected)
