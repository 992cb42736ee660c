# SPDX-License-Identifier: Apache-2.0
"""Lazy logits: free until read, and then the plain tensor."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import allocations, peak_bytes
from cce_fx import LazyLogits

V, D = 1200, 16


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, V)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.head(self.body(x))
        if y is None:
            return logits
        return F.cross_entropy(logits.view(-1, V), y.view(-1)), logits


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type != "meta":
                self.size = max(self.size, t.numel())
        return out


@pytest.fixture
def setup(device: torch.device) -> tuple[Model, Callable[..., Any], Tensor, Tensor]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Model().to(device)
    x, y = torch.randn(3, 7, D).to(device), torch.randint(0, V, (3, 7)).to(device)
    y[0, :3] = -100
    return model, torch.compile(model, backend="cce", options={"inner": "aot_eager"}), x, y


@pytest.fixture
def worth(setup: Any) -> Any:
    """The same, and logits as small as these are worth it."""
    torch._dynamo.reset()
    model, _, x, y = setup
    return model, torch.compile(model, backend="cce", options={"inner": "aot_eager", "min_vocab": 0}), x, y


def unread(lazy: Any) -> bool:
    return isinstance(lazy, LazyLogits) and lazy.chain is not None


def grads(model: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def test_looks_like_the_tensor_it_stands_for(setup: Any) -> None:
    model, compiled, x, y = setup
    _, lazy = compiled(x, y)
    real = model(x, y)[1]
    assert isinstance(lazy, Tensor) and torch.is_tensor(lazy)
    assert (lazy.shape, lazy.dtype, lazy.device, lazy.stride()) == (real.shape, real.dtype, real.device, real.stride())
    assert (lazy.requires_grad, lazy.is_leaf, lazy.dim(), len(lazy)) == (True, False, 3, 3)
    assert unread(lazy)


def _entropy(z: torch.Tensor) -> torch.Tensor:
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


STAYS = {
    "view": lambda z: z.view(-1, V),
    "reshape": lambda z: z.reshape(-1, V),
    "flatten": lambda z: z.flatten(0, 1),
    "slice": lambda z: z[:, :-1, :],
    "ellipsis": lambda z: z[..., :-1, :],
    "index": lambda z: z[0],
    "new axis": lambda z: z[None],
    "float": lambda z: z.float(),
    "half": lambda z: z.half(),
    "to dtype": lambda z: z.to(torch.bfloat16),
    "to device": lambda z: z.to(z.device),
    "to both": lambda z: z.to(device=z.device, dtype=torch.float64),
    "detach": lambda z: z.detach(),
    "clone": lambda z: z.clone(),
    "contiguous": lambda z: z.contiguous(),
    "transpose": lambda z: z.transpose(1, 2),
    "permute": lambda z: z.permute(0, 2, 1),
    "unsqueeze": lambda z: z.unsqueeze(0),
    "scale": lambda z: z / 2.0,
    "scaled": lambda z: 3.0 * z,
    "mask": lambda z: z[torch.arange(21).view(3, 7) % 2 == 0],
    "mask of rows": lambda z: z[torch.tensor([True, False, True])],
    "positions": lambda z: z[torch.tensor([2, -3])],
    "chain": lambda z: (z[:, 1:].float() / 0.7).reshape(-1, V).detach(),
    "log_softmax": lambda z: F.log_softmax(z, dim=-1),
    "softmax": lambda z: z.softmax(-1),
    "log of softmax": lambda z: z.softmax(-1).log(),
    "exp": lambda z: z.exp(),
    "negative": lambda z: -z,
    "surprise": lambda z: -F.log_softmax(z, dim=-1),
    "p log p": lambda z: z.softmax(-1) * F.log_softmax(z, dim=-1),
    "split": lambda z: z.view(-1, V).split(4, dim=0)[1],
    "split by sizes": lambda z: torch.split(z, [2, 5], 1)[1],
    "chunk": lambda z: z.chunk(2, 1)[0],
    "unbind": lambda z: z.unbind(0)[2],
    "add": lambda z: z + 1,
    "stack": lambda z: torch.stack([z, z]),
    "compare": lambda z: z > 0,
    "product of other rows": lambda z: z[1:] * z[:-1],
    "smoothed probabilities": lambda z: 0.9 * z.softmax(-1) + 0.1 / V,
    "masked classes": lambda z: z.masked_fill(torch.arange(V, device=z.device) % 3 == 0, -1e4),
    "clipped": lambda z: z.clamp(-0.1, 0.1),
    "rows of a calculation": lambda z: torch.where(z > 0, z, 0.5 * z)[torch.arange(21).view(3, 7) % 2 == 0],
}
READS = {
    "split over the vocabulary": lambda z: z.split(V // 2, -1)[0],
    "max": lambda z: z.max(),
    "cat": lambda z: torch.cat([z, z]),
    "softmax over rows": lambda z: z.detach().softmax(1).sum(-1),
    "norm": lambda z: z.norm(),
    "argmax over rows": lambda z: z.argmax(0),
    "tolist": lambda z: torch.tensor(z.tolist()),
    "numpy": lambda z: torch.from_numpy(z.detach().cpu().numpy().copy()),
    "data": lambda z: z.data,
}
BLOCKS = {
    "argmax": lambda z: z.argmax(-1),
    "argmax keyword": lambda z: z.argmax(dim=-1),
    "torch.argmax": lambda z: torch.argmax(z, dim=2),
    "argmin": lambda z: z.argmin(-1),
    "detached max": lambda z: z.detach().max(-1).values,
    "detached max keyword": lambda z: z.detach().max(dim=-1).indices,
    "detached topk": lambda z: z.detach().topk(5, dim=-1).values,
    "detached topk default": lambda z: z.detach().topk(5).indices,
    "detached logsumexp": lambda z: torch.logsumexp(z.detach().float(), dim=-1),
    "argmax of shifted rows": lambda z: z[:, :-1].argmax(-1),
    "argmax of rows": lambda z: z.float().view(-1, V)[3:].argmax(-1),
    "argmax of a mask": lambda z: z[torch.arange(21).view(3, 7) % 2 == 0].argmax(-1),
    "topk of one dimension": lambda z: z.detach()[0].topk(1, dim=1).indices,
    "detached entropy": lambda z: -(z.detach().softmax(-1) * z.detach().log_softmax(-1)).sum(-1),
    "detached entropy of shifted rows": lambda z: _entropy(z.detach()[:, 1:].float()),
    "detached mean": lambda z: z.detach().mean(dim=-1, keepdim=True),
    "detached sum of probabilities": lambda z: (z.detach() / 2).softmax(2).sum([-1]),
    "scaled argmax": lambda z: (z / -0.5).argmax(-1),
    "iterate": lambda z: torch.stack(list(z)),
    "accuracy": lambda z: (z.argmax(-1) == 3).float().mean(),
    "vmap, which takes what is below Python": lambda z: torch.vmap(lambda r: r.sum())(z),
    "vmap of a cast": lambda z: torch.vmap(lambda r: r.exp().sum())(z.double()),
    "per-row gradients": lambda z: torch.vmap(torch.func.grad(lambda r: r.square().sum()))(z.detach()),
    "entropy with a gradient": lambda z: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "einsum": lambda z: torch.einsum("btv->bt", z),
    "rank of a class": lambda z: (z > z[..., 3:4]).sum(-1),
    "Renyi entropy": lambda z: z.softmax(-1).square().sum(-1).log(),
    "mean logit of the best": lambda z: z.topk(3).values.mean(-1),
    "norm of rows": lambda z: torch.linalg.vector_norm(z, dim=-1),
    "sum of rows of a calculation": lambda z: (z * z.tanh())[torch.arange(21).view(3, 7) % 2 == 0].sum(),
    "a number and one": lambda z: z.select(0, 0).select(0, 0).select(0, 0) + 1,
    "mean of all": lambda z: z.mean(),
    "soft embedding": lambda z: z.softmax(-1) @ torch.linspace(-1, 1, V * 3, device=z.device).view(V, 3),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("op", [*STAYS, *READS, *BLOCKS])
def test_every_operation_gives_what_it_gives_on_the_tensor(worth: Any, op: str) -> None:
    model, compiled, x, y = worth
    function = {**STAYS, **READS, **BLOCKS}[op]
    _, lazy = compiled(x, y)
    got, want = function(lazy), function(model(x, y)[1])
    assert unread(lazy) == (op not in READS), "read, or not, against expectation"
    if op in STAYS:
        assert unread(got)
    assert (got.shape, got.dtype, got.stride(), got.requires_grad) == (
        want.shape, want.dtype, want.stride(), want.requires_grad)  # fmt: skip
    torch.testing.assert_close(got * 1, want * 1)
    if want.requires_grad and want.is_floating_point():
        got.float().sum().backward()
        ours = grads(model)
        want.float().sum().backward()
        for a, b in zip(ours, grads(model), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


AUTOCAST = {
    "read": lambda z, y: z + 0,
    "cross entropy": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "log_softmax": lambda z, y: z.log_softmax(-1) * 1,
    "float": lambda z, y: z.float().softmax(-1) * 2,
    "argmax": lambda z, y: z.argmax(-1),
    "detached logsumexp": lambda z, y: z.detach().logsumexp(-1),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, -1).view(-1, V), y.view(-1)),
    "gather": lambda z, y: -z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(),
    "detached sum": lambda z, y: z.detach().exp().sum(-1),
    "a row": lambda z, y: z[0, 1].exp(),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("inside", [False, True], ids=["after autocast", "inside"])
@pytest.mark.parametrize("name", AUTOCAST)
def test_logits_made_under_autocast(setup: Any, name: str, inside: bool) -> None:
    """The head ran in autocast's dtype, and what is done with the logits runs in that of its own place."""
    model, compiled, x, y = setup
    found = []
    for call in (compiled, model):
        with torch.autocast("cpu", torch.bfloat16):
            logits = call(x, y)[1]
            assert logits.dtype == torch.bfloat16
            result = AUTOCAST[name](logits, y) if inside else None
        found.append(AUTOCAST[name](logits, y) if result is None else result)
    got, want = found
    assert (got.shape, got.dtype, got.requires_grad) == (want.shape, want.dtype, want.requires_grad)
    torch.testing.assert_close(got * 1, want * 1, rtol=2e-2, atol=2e-2)


ALIASES: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "twice": lambda z: (z, z),
    "view": lambda z: (z, z.view(-1, V)),
    "slice": lambda z: (z[:, :-1], z),
    "detached": lambda z: (z, z.detach()),
    "a copy": lambda z: (z, z.double()),
    "only views": lambda z: (z[:, 1:], z[:, :-1]),
    "a view of a cast": lambda z: (z.double(), z.double().flatten(0, 1), z),
}


@pytest.mark.parametrize("name", ALIASES)
def test_returned_views_share_memory(name: str) -> None:
    class Views(Model):
        def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
            loss, logits = super().forward(x, y)
            return loss, *ALIASES[name](logits)

    x, y = torch.randn(3, 7, D), torch.randint(0, V, (3, 7))
    found = []
    for backend, options in (("aot_eager", None), ("cce", {"inner": "aot_eager"})):
        torch._dynamo.reset()
        torch.manual_seed(0)
        _, *returned = torch.compile(Views(), backend=backend, **({"options": options} if options else {}))(x, y)
        assert backend == "aot_eager" or all(map(unread, returned))
        with torch.no_grad():
            returned[0].mul_(0.5)
            returned[-1][0] = 0.25
        found.append([t.detach() + 0 for t in returned])
    torch.testing.assert_close(*found)


def test_backward_through_loss_and_logits_together(setup: Any) -> None:
    model, compiled, x, y = setup
    for call in (compiled, model):
        loss, logits = call(x, y)
        (loss + logits.float().pow(2).mean()).backward()
        if call is compiled:
            ours = grads(model)
    for a, b in zip(ours, grads(model), strict=True):
        torch.testing.assert_close(a, b)


def test_reading_under_no_grad_keeps_the_graph_as_eager_does(setup: Any) -> None:
    _, compiled, x, y = setup
    _, lazy = compiled(x, y)
    with torch.no_grad():
        lazy.sum()
    assert lazy.sum().requires_grad


def test_a_forward_without_grad_gives_logits_without_graph(setup: Any) -> None:
    model, compiled, x, y = setup
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, lazy = compiled(x, y)
            want = model(x, y)[1]
        assert unread(lazy) and not lazy.requires_grad
        torch.testing.assert_close(lazy + 0, want + 0)


def test_reading_after_the_weight_changed_is_a_clear_error(setup: Any) -> None:
    model, compiled, x, y = setup
    loss, lazy = compiled(x, y)
    with torch.no_grad():
        model.head.weight.add_(1)
    for read in (lambda: lazy + 0, lambda: lazy.argmax(-1), lambda: F.cross_entropy(lazy.view(-1, V), y.view(-1))):
        with pytest.raises(RuntimeError, match="lazy.*changed since the forward.*'logits': 'keep'"):
            read()


def test_what_was_read_before_the_step_stays(setup: Any) -> None:
    model, compiled, x, y = setup
    _, lazy = compiled(x, y)
    before = (lazy + 0).detach().clone()
    with torch.no_grad():
        model.head.weight.add_(1)
    assert torch.equal(lazy.detach() + 0, before)


def test_in_place_changes_show_in_the_logits_and_their_views(setup: Any) -> None:
    model, compiled, x, _ = setup
    with torch.no_grad():
        _, lazy = compiled(x, torch.zeros(3, 7, dtype=torch.long, device=x.device))
        view, other = lazy[0], lazy.float()
        lazy[0] = 0
        assert not (view + 0).any() and not (lazy[0] + 0).any() and not (other[0] + 0).any()
        view.add_(2)
        assert bool((lazy[0] == 2).all())
        del model


def test_detaching_in_place_reads_nothing_and_lets_the_graph_go(setup: Any) -> None:
    model, compiled, x, y = setup
    want = model(x, y)[1].detach()
    lazy = compiled(x, y)[1]
    graph = weakref.ref(lazy.chain.hidden.grad_fn)
    with Largest() as seen:
        assert not lazy._is_view() and lazy.detach_() is lazy
    assert seen.size < V and graph() is None
    assert unread(lazy) and not lazy.requires_grad
    torch.testing.assert_close(lazy + 0, want)
    stale = compiled(x, y)[1].detach_()
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(RuntimeError, match="changed since"):
        stale.sum()


def test_detaching_in_place_leaves_views_their_gradient(setup: Any) -> None:
    model, compiled, x, y = setup
    results = []
    for call in (compiled, model):
        logits = call(x[0], y[0])[1]
        view = logits.transpose(0, 1)
        logits.detach_()
        assert view._is_view() and not logits._is_view() and not logits.requires_grad
        view.pow(2).sum().backward()
        results.append(grads(model))
        with pytest.raises(RuntimeError, match="Can't detach views in-place"):
            call(x[0], y[0])[1].transpose(0, 1).detach_()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_are_plain_tensors(setup: Any, how: str) -> None:
    _, compiled, x, y = setup
    with torch.no_grad():
        _, lazy = compiled(x, y)
    if how == "pickle":
        made = pickle.loads(pickle.dumps(lazy))
    elif how == "deepcopy":
        made = copy.deepcopy(lazy)
    else:
        file = io.BytesIO()
        torch.save({"logits": lazy}, file)
        file.seek(0)
        made = torch.load(file)["logits"]
    assert type(made) is Tensor
    assert torch.equal(made, lazy + 0)


def test_printing_shows_the_values(setup: Any) -> None:
    _, compiled, x, y = setup
    with torch.no_grad():
        _, lazy = compiled(x, y)
    assert repr(lazy) == repr(lazy + 0) and f"{lazy}" == f"{lazy + 0}"


def test_a_second_compiled_function_takes_lazy_logits(setup: Any) -> None:
    model, compiled, x, y = setup
    second = torch.compile(lambda z: (z.float() * 2).sum(), backend="eager")
    torch.testing.assert_close(second(compiled(x, y)[1]), second(model(x, y)[1]))


def test_nothing_is_kept_alive_when_the_logits_are_dropped(setup: Any) -> None:
    _, compiled, x, y = setup
    gc.collect()
    gc.disable()
    try:
        _, lazy = compiled(x, y)
        hidden = weakref.ref(lazy.chain.hidden)
        view = lazy.float().view(-1, V)[1:]
        del lazy, view, _
        assert hidden() is None
    finally:
        gc.enable()


# --- losses outside the compiled graph ---------------------------------------------------------------------------------


def _smoothed(surprise: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    ignored = y.eq(-100).unsqueeze(-1)
    nll = surprise.gather(dim=-1, index=y.clamp(min=0).unsqueeze(-1))
    smooth = surprise.sum(dim=-1, keepdim=True, dtype=torch.float32)
    nll.masked_fill_(ignored, 0.0)
    smooth.masked_fill_(ignored, 0.0)
    return 0.9 * nll.sum() + 0.1 * smooth.sum() / V


LOSSES = {
    "flat": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)),
    "shifted": lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1)),
    "class dim second": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "options": lambda z, y: F.cross_entropy(
        z.float().view(-1, V) / 2, y.view(-1), label_smoothing=0.1, reduction="sum"
    ),
    "none": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1), reduction="none").mean(),
    "module": lambda z, y: nn.CrossEntropyLoss(ignore_index=-100)(z.flatten(0, 1), y.flatten()),
    "nll": lambda z, y: F.nll_loss(F.log_softmax(z, dim=-1).view(-1, V), y.view(-1)),
    "masked": lambda z, y: F.cross_entropy(z[y != 5], y[y != 5]),
    "gather": lambda z, y: -z.log_softmax(-1).gather(-1, y.clamp(min=0)[..., None]).mean(),
    "take_along_dim": lambda z, y: -torch.take_along_dim(F.log_softmax(z, -1), y.clamp(min=0)[..., None], -1).sum(),
    "softmax, gather": lambda z, y: -z.softmax(-1).gather(2, y.clamp(min=0).unsqueeze(2)).log().mean(),
    "logsumexp minus gather": lambda z, y: (
        z.logsumexp(-1) - z.gather(-1, y.clamp(min=0)[..., None]).squeeze(-1)
    ).mean(),
    "selective_log_softmax": lambda z, y: (
        torch.gather(z, -1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        - torch.stack([torch.logsumexp(r, -1) for r in z.unbind(0)])
    ).mean(),
    "z-loss": lambda z, y: F.cross_entropy(z.view(-1, V), y.view(-1)) + 1e-3 * z.logsumexp(-1).square().mean(),
    "label smoothing of the Trainer": lambda z, y: _smoothed(-F.log_softmax(z, dim=-1), y),
    "class weights": lambda z, y: F.cross_entropy(
        z.view(-1, V), y.view(-1), weight=torch.linspace(0.5, 2, V, device=z.device)
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_outside_the_graph_is_cut(worth: Any, name: str) -> None:
    model, compiled, x, y = worth
    loss = LOSSES[name]
    compiled(x)  # compilation makes tensors of its own
    loss(compiled(x), y)
    logits = compiled(x)
    with Largest() as made:
        ours = loss(logits, y)
        ours.backward()
    assert unread(logits)
    assert made.size < 3 * 6 * V
    got = grads(model)
    want = loss(model(x), y)
    want.backward()
    torch.testing.assert_close(ours, want)
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b)


def entropy_by_chunks(z: Tensor) -> Tensor:
    """As trl writes it."""
    found = []
    for chunk in z.reshape(-1, V).split(2, dim=0):
        logp = F.log_softmax(chunk, dim=-1)
        found.append(-(torch.exp(logp) * logp).sum(-1))
    return torch.cat(found).reshape(z.shape[:-1])


PARTS = {
    "entropy by chunks": entropy_by_chunks,
    "a row": lambda z: z[0, 1] + 1,
    "the last token": lambda z: z[:, -1, :].softmax(-1) * 2,
    "two rows, scaled, classes first": lambda z: (z.flatten(0, 1)[3:5].float() / 2).t().exp(),
}


@pytest.mark.parametrize("workspace", [1 << 18, 1 << 20])
def test_a_loss_outside_the_graph_keeps_to_the_options(workspace: int) -> None:
    torch._dynamo.reset()
    model, x, y = Model(), torch.randn(512, D), torch.randint(0, V, (512,))
    run = torch.compile(model, backend="cce", options={"inner": "aot_eager", "workspace": workspace})

    def step() -> None:
        F.cross_entropy(run(x), y).backward()

    step()
    assert workspace / 2 < max(allocations(step)[1]) <= workspace


@pytest.mark.parametrize("name", PARTS)
def test_some_rows_are_read_without_the_others(setup: Any, name: str) -> None:
    model, compiled, x, _ = setup
    PARTS[name](compiled(x)).sum()  # what is made of fake tensors at first is not counted
    logits = compiled(x)
    with Largest() as made:
        ours = PARTS[name](logits)
        ours.square().sum().backward()
    assert unread(logits) and made.size <= 3 * 6 * V
    got = grads(model)
    want = PARTS[name](model(x))
    want.square().sum().backward()
    torch.testing.assert_close(ours, want)
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_small_heads_and_forwards_without_grad_return_plain_logits(setup: Any) -> None:
    _, compiled, x, _ = setup
    with torch.no_grad():
        assert type(compiled(x)) is Tensor
    torch._dynamo.reset()
    small = torch.compile(nn.Linear(D, 64), backend="cce", options={"inner": "eager"})
    assert type(small(x)) is Tensor


def test_keep_computes_the_logits() -> None:
    torch._dynamo.reset()
    model = Model()
    x, y = torch.randn(2, 3, D), torch.randint(0, V, (2, 3))
    compiled = torch.compile(model, backend="cce", options={"inner": "aot_eager", "logits": "keep"})
    loss, logits = compiled(x, y)
    assert type(logits) is Tensor and type(compiled(x)) is Tensor
    want = model(x, y)
    torch.testing.assert_close((loss, logits), want)


def test_a_plain_training_loop_with_its_own_loss_holds_no_logits() -> None:
    """Measured: the peak of a step whose loss is taken outside the compiled model, beyond gradients and eager's share."""
    torch._dynamo.reset()
    vocab, rows = 6000, 512
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(vocab, D), nn.Linear(D, D), nn.GELU(), nn.Linear(D, vocab, bias=False))
    x, y = torch.randint(vocab, (2, rows // 2)), torch.randint(vocab, (2, rows // 2))

    def step(run: Callable[..., Tensor]) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(run(x).view(-1, vocab), y.view(-1)).backward()

        return once

    eager, ours = step(model), step(torch.compile(model, backend="cce", options={"inner": "aot_eager"}))
    eager()
    want = grads(model)
    ours()
    for a, b in zip(grads(model), want, strict=True):
        torch.testing.assert_close(a, b)
    model.zero_grad(set_to_none=True)
    logits = rows * vocab * 4
    assert peak_bytes(eager) > 2 * logits
    model.zero_grad(set_to_none=True)
    assert peak_bytes(ours) < logits / 2


def test_c_code_that_asks_no_python_is_an_error(setup: Any) -> None:
    """And not another tensor's memory, or none."""
    _, compiled, x, y = setup
    lazy = compiled(x, y)[1].detach()
    assert isinstance(lazy, LazyLogits)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(lazy)
    torch.testing.assert_close(torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(lazy.materialize())), lazy)


# --- row by row ---------------------------------------------------------------------------------------------------------


def jsd(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """As trl's GKD trainer writes it."""
    p, q = F.log_softmax(student / 0.9, -1), F.log_softmax(teacher / 0.9, -1)
    half = torch.tensor(0.5, device=p.device).log()
    mixed = torch.logsumexp(torch.stack([p + half, q + half]), dim=0)
    parts = [F.kl_div(mixed, x, reduction="none", log_target=True) for x in (p, q)]
    return (0.5 * parts[0] + 0.5 * parts[1])[y != -100].sum() / (y != -100).sum()


# Losses of two models' logits; the second is the teacher.
OF_TWO: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "KL": lambda s, t, y: F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"),
    "KL of logarithms": lambda s, t, y: (t.softmax(-1) * (t.log_softmax(-1) - s.log_softmax(-1))).sum(-1).mean(),
    "reverse KL of shifted rows": lambda s, t, y: (
        (s[:, :-1].softmax(-1) * (s[:, :-1].log_softmax(-1) - t[:, :-1].log_softmax(-1))).sum(-1)[y[:, 1:] >= 0].mean()
    ),
    "JSD of chosen rows": jsd,
    "MSE": lambda s, t, y: F.mse_loss(s, t),
    "the teacher's best": lambda s, t, y: F.cross_entropy(s.flatten(0, 1), t.argmax(-1).flatten()),
    "agreement": lambda s, t, y: -(s.softmax(-1) * t.softmax(-1)).sum(-1).log().mean(),
}


class Wide(nn.Module):
    """A teacher, of more hidden dimensions than the student's."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 3 * D), nn.Linear(3 * D, V, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).tanh())


@pytest.mark.sample(2)
@pytest.mark.parametrize("kept", [False, True], ids=["teacher without gradient", "with"])
@pytest.mark.parametrize("name", OF_TWO)
def test_losses_of_two_models(name: str, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cce_fx.lazy.tensor._LARGE", 1)
    torch._dynamo.reset()
    torch.manual_seed(0)
    models, loss = [Model(), Wide()], OF_TWO[name]
    x, y = torch.randn(16, 8, D), torch.randint(0, V, (16, 8))
    y[0, :3] = -100
    options = {"inner": "aot_eager", "min_vocab": 0}
    calls = [torch.compile(m, backend="cce", options=options) for m in models]

    def step(student: Callable[..., Any], teacher: Callable[..., Any]) -> tuple[Tensor, list[Any], int]:
        for m in models:
            m.zero_grad()
        s = student(x)
        with torch.set_grad_enabled(kept):
            t = teacher(x)
        with Largest() as made:
            found = loss(s, t, y)
            found.backward()
        assert student is models[0] or (unread(s) and unread(t))
        return found, [p.grad for m in models for p in m.parameters()], made.size

    step(*calls)
    ours, grads, largest = step(*calls)
    assert largest <= max(16 * V, 3 * D * V) < 16 * 8 * V // 2
    grads = [g if g is None else g.clone() for g in grads]
    want, expected, _ = step(*models)
    torch.testing.assert_close(ours, want)
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


OF_ALL_LENGTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **{name: LOSSES[name] for name in ("flat", "shifted", "nll", "masked", "label smoothing of the Trainer", "z-loss")},
    "entropies": lambda z, y: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "mean": lambda z, y: z.mean(),
    "rows of a view": lambda z, y: (z.softmax(-1) ** 2).view(-1, V).sum(-1),
}


@pytest.mark.parametrize("name", OF_ALL_LENGTHS)
def test_a_loss_is_examined_once_for_all_lengths(worth: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cce_fx.lazy import graph

    model, compiled, _, _ = worth
    count, examined = 0, graph._examined

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return examined(*args)

    monkeypatch.setattr(graph, "_examined", counted)
    counts = []
    for length in range(6, 16):
        x, y = torch.randn(3, length, D), torch.randint(0, V, (3, length))
        logits = compiled(x)
        ours = OF_ALL_LENGTHS[name](logits, y)
        assert unread(logits)
        torch.testing.assert_close(ours, OF_ALL_LENGTHS[name](model(x), y))
        counts.append(count)
    # The first two lengths are graphs of their own, and Dynamo makes the length a symbol in the second.
    assert counts[-1] == counts[2], counts


def test_nothing_is_read_in_inference_mode(worth: Any) -> None:
    model, compiled, x, y = worth
    with torch.inference_mode():
        logits = compiled(x, y)[1]
        found = logits.argmax(-1), (logits.softmax(-1) + 1.0).log().sum(-1)
        assert unread(logits)
        want = model(x, y)[1]
        torch.testing.assert_close(found, (want.argmax(-1), (want.softmax(-1) + 1.0).log().sum(-1)))


def test_rows_chosen_of_a_calculation_that_moved_them(worth: Any) -> None:
    """As many in one dimension as in the other, so that no size tells."""
    model, compiled, _, _ = worth
    x = torch.randn(5, 5, D)
    mask = torch.rand(5, 5) < 0.5
    for move in (lambda z: z.transpose(0, 1).contiguous(), lambda z: z.permute(1, 0, 2).clone(), lambda z: z):
        found = []
        for call in (compiled, model):
            z = call(x)
            made = move(z * z.tanh()) * 2.0
            found.append((made[mask].sum(-1), made[mask[0]].sum(-1)))
        torch.testing.assert_close(*found)


def test_a_softmax_in_another_dtype(worth: Any) -> None:
    model, compiled, x, _ = worth
    for softmax in (lambda z: torch.softmax(z, -1, torch.float64), lambda z: F.log_softmax(z, 2, 3, torch.float64)):
        found = [(softmax(call(x))[:, 1:] + 1.0).sum(-1) for call in (compiled, model)]
        assert found[0].dtype == torch.float64
        torch.testing.assert_close(*found)


def test_signs_of_zero_are_told_apart(worth: Any) -> None:
    _, compiled, x, y = worth
    for zero, sign in ((0.0, 1.0), (-0.0, -1.0)):
        logits = compiled(x, y)[1].detach()
        least = torch.where(logits > 1e9, logits, zero).amin(-1)
        assert unread(logits) and torch.equal(torch.copysign(torch.ones(3, 7), least), torch.full((3, 7), sign))


def test_what_waits_is_not_kept_when_it_is_read(worth: Any) -> None:
    """Read at the end of a way, what was passed through is let go, as in eager."""
    _, compiled, x, y = worth
    with torch.no_grad():
        logits = compiled(x, y)[1]
        made = ((logits.softmax(-1) + 1.0) * 2.0).clamp(max=2.5)
        state = made.state
        assert unread(made) and (made.cpu() > 2.0).any()
    assert state.value is not None and state.base is None
