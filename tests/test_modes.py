# SPDX-License-Identifier: Apache-2.0
"""Ways in which torch is used around a compiled model: each does what it does in eager, with the loss still cut."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from cce_fx.kernels.choose import on_gpu

from .device import INTERPRETED
from .stacks.support import allocations

ROWS, WIDTH, VOCAB = 256, 24, 4096
LOGITS_BYTES = ROWS * VOCAB * 4
INNER = {"inner": "aot_eager"}


class Model(nn.Module):
    """A trunk and a head with the loss inside, and switches for what a test needs."""

    def __init__(self, tied: bool = False, breaks: str = "", recompute: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.breaks, self.recompute = breaks, recompute

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.embed(x)
        if self.recompute.startswith("trunk"):
            h = checkpoint(self.trunk, h, use_reentrant="reentrant" in self.recompute)
        else:
            h = self.trunk(h)
        if "before" in self.breaks:
            torch._dynamo.graph_break()
        if self.recompute == "head":
            return checkpoint(self._loss, h, y, use_reentrant=False)
        z = self.head(h)
        if "after" in self.breaks:
            torch._dynamo.graph_break()
        return F.cross_entropy(z.view(-1, VOCAB), y.view(-1))

    def _loss(self, h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(h).view(-1, VOCAB), y.view(-1))


def data(rows: int = ROWS, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(VOCAB, (4, rows // 4), generator=gen) for _ in range(2))
    y[0, :5] = -100
    return x.to(device), y.to(device)


def compiled(model: Any, **how: Any) -> Any:
    torch._dynamo.reset()
    counters.clear()
    return torch.compile(model, backend="cce", **{"options": INNER, **how})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(run: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    return run(x, y)


def assert_step_as_eager(model: nn.Module, call: Any, loss: Callable[..., Tensor] = plain, rtol: float = 1e-4) -> None:
    """One step gives eager's loss and gradients, and allocates nothing of half the logits' size."""
    device = next(model.parameters()).device
    x, y = data(device=device)

    def step(run: Callable[..., Any]) -> Tensor:
        model.zero_grad()
        value = loss(run, x, y)
        value.backward()
        return value.detach()

    step(call)  # compiles
    expected = step(model)
    wanted = gradients(model)
    found = allocations(lambda: step(call), device)
    torch.testing.assert_close(found.result, expected, rtol=rtol, atol=1e-6)
    ours = gradients(model)
    assert ours.keys() == wanted.keys()
    for name, g in wanted.items():
        error, size = (ours[name] - g).abs().max(), g.abs().max()
        assert error <= rtol * size, f"{name}: off by {error:.3g} of {size:.3g}"
    # A GPU's kernel takes as many bytes for a workspace as these logits have.
    assert counters["cce_fx"]["rewritten"] if on_gpu(device) else found.largest < LOGITS_BYTES // 2


# --- how it is compiled -----------------------------------------------------------------------------------------------


@pytest.mark.sample(2)
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_of_inductor(mode: str | None, device: torch.device) -> None:
    model = Model().to(device)
    assert_step_as_eager(model, compiled(model, options=None, mode=mode))


def test_fullgraph() -> None:
    model = Model()
    assert_step_as_eager(model, compiled(model, fullgraph=True))


@pytest.mark.parametrize("breaks", ["before", "after", "before after"])
def test_graph_breaks_around_the_head(breaks: str) -> None:
    model = Model(breaks=breaks)
    assert_step_as_eager(model, compiled(model))


def test_twenty_lengths_are_compiled_twice_at_most() -> None:
    model = Model()
    call = compiled(model)
    for length in range(16, 116, 5):
        x, y = data(4 * length, seed=length)
        torch.testing.assert_close(call(x, y), model(x, y))
    assert counters["stats"]["unique_graphs"] <= 2
    assert counters["cce_fx"]["rewritten"] == counters["stats"]["unique_graphs"]


def test_compiled_autograd() -> None:
    model = Model()
    call = compiled(model)
    x, y = data()
    model(x, y).backward()
    wanted = gradients(model)
    model.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        call(x, y).backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, wanted[name], rtol=1e-3, atol=1e-7)
    assert counters["compiled_autograd"]["captures"] == 1
    assert counters["cce_fx"]["rewritten"] == 1


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["around the call", "inside the graph"])
def test_autocast(dtype: torch.dtype, where: str, device: torch.device) -> None:
    model = Model().to(device)

    def inside(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return model(x, y)

    def around(run: Callable[..., Any], x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype):
            return run(x, y)

    call = compiled(model if where == "around the call" else inside)
    assert_step_as_eager(model, call, around, rtol=2e-2)


def test_float16_with_a_grad_scaler(device: torch.device) -> None:
    model, twin = Model().to(device), Model().to(device)
    call = compiled(model)
    for m, run in ((twin, twin), (model, call)):
        optimizer = torch.optim.SGD(m.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**14)
        for seed in range(3):
            x, y = data(seed=seed, device=device)
            with torch.autocast(device.type, torch.float16):
                value = run(x, y)
            scaler.scale(value).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert scaler.get_scale() == 2.0**14  # no step was skipped
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=2e-4)
    assert counters["cce_fx"]["rewritten"] == 1


# --- what needs a gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recompute", ["trunk", "trunk, reentrant", "head"])
def test_activation_checkpointing(recompute: str, device: torch.device) -> None:
    model = Model(recompute=recompute).to(device)
    assert_step_as_eager(model, compiled(model))


@pytest.mark.sample(2)
@pytest.mark.parametrize("trained", ["embed trunk", "embed head", "trunk head", "head"])
def test_frozen_parts(trained: str) -> None:
    model = Model()
    for name, p in model.named_parameters():
        p.requires_grad_(name.split(".")[0] in trained)
    assert_step_as_eager(model, compiled(model))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads_accumulate_into_grad(tied: bool, device: torch.device) -> None:
    model, twin = Model(tied).to(device), Model(tied).to(device)
    call = compiled(model)
    for seed in range(3):
        (call(*data(seed=seed, device=device)) / 3).backward()
        (twin(*data(seed=seed, device=device)) / 3).backward()
    assert counters["cce_fx"]["rewritten"] == 1
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_functional_call_differentiates_given_weights() -> None:
    model = Model()
    call = compiled(model)
    x, y = data()
    given = {name: (p.detach() * 1.1).requires_grad_() for name, p in model.named_parameters()}

    def step(run: Any, prefix: str) -> list[Tensor]:
        for p in given.values():
            p.grad = None
        torch.func.functional_call(run, {prefix + name: p for name, p in given.items()}, (x, y)).backward()
        return [p.grad.clone() for p in given.values()]

    expected = step(model, "")
    step(call, "_orig_mod.")
    found = allocations(lambda: step(call, "_orig_mod."))
    for a, b in zip(found.result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in model.parameters())
    assert found.largest < LOGITS_BYTES // 2


@pytest.mark.parametrize("how", ["fused", "foreach", "compiled"])
def test_optimizers(how: str, device: torch.device) -> None:
    model, twin = Model().to(device), Model().to(device)
    call = compiled(model)
    for m, run in ((model, call), (twin, twin)):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, **{"fused" if how == "fused" else "foreach": True})
        update = optimizer.step
        if how == "compiled" and m is model:
            update = torch.compile(optimizer.step, backend="aot_eager")
        for seed in range(3):
            run(*data(seed=seed, device=device)).backward()
            update()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
    assert counters["cce_fx"]["rewritten"] == 1


# --- without a gradient -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_perplexity_of_a_long_text_without_logits(mode: Callable[[], Any], device: torch.device) -> None:
    model = Model().to(device).eval()
    call = compiled(model)
    x, y = data(4 * ROWS, device=device)
    with mode():
        call(x, y)
        found = allocations(lambda: call(x, y), device)
        torch.testing.assert_close(found.result, model(x, y))
    assert found.largest < 4 * LOGITS_BYTES // 4 or on_gpu(device)


# --- around the model -------------------------------------------------------------------------------------------------


def test_two_models_in_one_process() -> None:
    first, second = Model(), Model(tied=True)
    calls = [compiled(first), torch.compile(second, backend="cce", options=INNER)]
    for model, call in zip((first, second, first), (*calls, calls[0]), strict=True):
        assert_step_as_eager(model, call)


def test_two_models_trained_by_two_threads(device: torch.device) -> None:
    if INTERPRETED and on_gpu(device):
        pytest.skip("Triton's interpreter takes one thread at a time")
    models = [Model().to(device), Model(tied=True).to(device)]
    calls = [compiled(models[0]), torch.compile(models[1], backend="cce", options=INNER)]
    for model, call in zip(models, calls, strict=True):
        call(*data(device=device)).backward()
        model.zero_grad()
    errors: list[BaseException] = []

    def train(at: int) -> None:
        try:
            for _ in range(5):
                calls[at](*data(device=device)).backward()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(at,)) for at in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors and counters["cce_fx"]["rewritten"] >= 1
    for model in models:
        ours = gradients(model)
        model.zero_grad()
        model(*data(device=device)).backward()
        for name, g in gradients(model).items():
            torch.testing.assert_close(ours[name], 5 * g, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_of_a_compiled_model(how: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    model = Model()
    model.compile(backend="cce", options=INNER)
    model(*data()).backward()
    assert counters["cce_fx"]["rewritten"] == 1
    model.zero_grad()
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = Model()
        twin.load_state_dict(model.state_dict())
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert all(a is not b for a, b in zip(twin.parameters(), model.parameters(), strict=True))
    twin(*data()).backward()
    assert all(p.grad is None for p in model.parameters())
    model(*data()).backward()
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_batches_of_loader_workers() -> None:
    model = Model()
    call = compiled(model)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=2, num_workers=2)
    for x, y in loader:
        torch.testing.assert_close(call(x, y), model(x, y))
    assert counters["cce_fx"]["rewritten"] >= 1
