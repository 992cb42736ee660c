# SPDX-License-Identifier: Apache-2.0
"""FSDP2: gradients are the average of eager's; the loss is cut where the head's weight is there when it is taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import cce_fx
from benchmarks import measure
from cce_fx import LazyLogits

from .support import Graphs, Workers, assert_same, gradients
from .test_vocabulary import LENGTH, WIDTH, Model, data

LARGE = 3000  # classes, above the threshold from which logits without a loss in their graph may be lazy


def step(own_group: bool, reshard: bool) -> None:
    rank = dist.get_rank()
    one, model = Model(LARGE), Model(LARGE)
    x, y = data(LARGE)
    if own_group:
        fully_shard(model.head, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    graphs = Graphs()
    counters.clear()
    run = torch.compile(model, backend="cce", options=graphs.options)
    mine = slice(rank, rank + 1)
    for _ in range(2):  # the second with weights that were gathered anew
        model.zero_grad()
        run(x[mine], y[mine]).backward()
    for part in (0, 1):
        (one(x[part : part + 1], y[part : part + 1]) / 2).backward()
    assert_same(gradients(model), gradients(one))
    if own_group:  # FSDP's hooks on the head break the graph before the loss, and torch runs nn.Linear by itself
        assert counters["cce_fx"]["rewritten"] == 0 and len(graphs.forward) == 2
    else:
        assert counters["cce_fx"]["rewritten"] == 1
        assert graphs.largest() <= LARGE * WIDTH < LENGTH * LARGE


@pytest.mark.parametrize("reshard", [False, True], ids=["kept", "resharded after forward"])
@pytest.mark.parametrize("own_group", [False, True], ids=["head in the root's group", "head in a group of its own"])
def test_gradients_are_averaged(two: Workers, own_group: bool, reshard: bool) -> None:
    two.run(step, own_group, reshard)


# --- lazy logits of gathered weights -------------------------------------------------------------------------------------

ROWS, CLASSES = 256, 4000
LOGITS = ROWS * CLASSES * 4  # bytes, beyond the kernel's workspace


class Both(nn.Module):
    """Returns the logits, and their loss where it is given labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.trunk(x)))
        return logits if y is None else (F.cross_entropy(logits, y), logits)


def rows() -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(ROWS, WIDTH, generator=gen), torch.randint(CLASSES, (ROWS,), generator=gen)


def compiled(module: nn.Module) -> Any:
    torch._dynamo.reset()
    return torch.compile(module, backend="cce", options={"inner": "aot_eager"})


def averaged(make: Any) -> dict[str, Tensor]:
    """Gradients of `make()`'s loss in this process, averaged over all."""
    one = Both()
    make(one).backward()
    for p in one.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    return gradients(one)


def head_in_a_group_of_its_own(reshard: bool, inside: bool) -> int:
    """The head's forward compiled by itself, the loss after it in the model or outside; bytes of a second step's largest tensor."""
    model = Both()
    fully_shard(model.head, reshard_after_forward=reshard)
    fully_shard(model)
    run, (x, y) = compiled(model), rows()
    model.head.forward = torch.compile(model.head.forward, backend="cce", options={"inner": "aot_eager"})

    def once() -> tuple[Tensor, Any]:
        model.zero_grad()
        loss, logits = run(x, y) if inside else (None, run(x))
        if loss is None:
            loss = F.cross_entropy(logits, y)
        loss.backward()
        return loss, logits

    once()
    (loss, logits), changes = measure.allocations(once)
    assert isinstance(logits, LazyLogits) is not reshard
    assert_same(gradients(model), averaged(lambda one: one(x, y)[0]))
    torch.testing.assert_close(loss, Both()(x, y)[0])
    return max(changes)


def blocks_compiled_one_by_one(backend: str) -> tuple[int, bool]:
    """As torchtitan has it: every block a graph and a group of its own, norm and head one, the loss a compiled function.

    Returns bytes of a second step's largest tensor, and whether the logits were lazy.
    """

    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(2))
            self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    def loss_of(logits: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, -2).float(), y.flatten())

    torch._dynamo.reset()
    model, one, (x, y) = Blocks(), Blocks(), rows()
    for block in model.blocks:
        block.compile(backend="aot_eager")
        fully_shard(block)
    fully_shard([model.norm, model.head], reshard_after_forward=False)
    fully_shard(model)
    cce_fx.lazy_head(model.head)
    options: dict[str, Any] = {"options": {"inner": "aot_eager"}} if backend == "cce" else {}
    compiled_loss = torch.compile(loss_of, backend=backend, **options)

    def once() -> bool:
        model.zero_grad()
        logits = model(x)
        lazy = isinstance(logits, LazyLogits)
        compiled_loss(logits, y).backward()
        return lazy and isinstance(logits, LazyLogits) and logits.chain is not None

    once()
    lazy, changes = measure.allocations(once)
    loss_of(one(x), y).backward()
    for p in one.parameters():
        dist.all_reduce(p.grad)
        p.grad /= dist.get_world_size()
    assert_same(gradients(model), gradients(one))
    return max(changes), lazy


@pytest.mark.parametrize("backend", ["aot_eager", "cce"])
def test_blocks_compiled_one_by_one_with_a_lazy_head(two: Workers, backend: str) -> None:
    for held, lazy in two.run(blocks_compiled_one_by_one, backend):
        assert lazy and held < LOGITS // 2


def logits_of_a_step(optimizer: Any) -> None:
    """What reading gives before the backward, after it, after the optimizer, and when the weight is back where it was."""
    model, (x, y) = Both(), rows()
    fully_shard(model)
    run = compiled(model)
    step = optimizer(model.parameters(), lr=0.1)
    want = Both()(x)
    loss, logits = run(x, y)
    assert isinstance(logits, LazyLogits) and logits.chain is not None  # FSDP's hooks have not read it
    loss.backward()
    with pytest.raises(RuntimeError, match="FSDP has let go"):
        logits.amax(-1)
    assert torch.equal(logits.argmax(-1), want.argmax(-1))  # which the loss has told
    assert_same(gradients(model), averaged(lambda one: one(x, y)[0]))
    _, again = run(x, y)
    torch.testing.assert_close(logits + 0, want)  # gathered anew, and the same
    torch.testing.assert_close(again + 0, want)
    loss, logits = run(x, y)
    loss.backward()
    step.step()
    model(x)  # other weights, perhaps at the same address
    with pytest.raises(RuntimeError, match="changed since the forward"):
        logits.sum()


def a_gradient_through_logits_that_were_read() -> None:
    """The hook of FSDP, put off, still gathers the weights before the backward, and sees to the gradients after it."""
    (x, y) = rows()

    def of_all(model: Any) -> Tensor:
        value, logits = model(x, y)
        return value + logits.float().pow(2).mean()

    def of_some(model: Any) -> Tensor:
        return model(x)[: ROWS // 4].float().pow(2).mean()

    for loss in (of_all, of_some):
        model = Both()
        fully_shard(model)
        run = compiled(model)
        for _ in range(2):
            model.zero_grad()
            loss(run).backward()
        assert_same(gradients(model), averaged(loss))


def every_read() -> dict[tuple[bool, bool], int]:
    for optimizer in (torch.optim.SGD, torch.optim.AdamW):
        logits_of_a_step(optimizer)
    a_gradient_through_logits_that_were_read()
    cases = [(reshard, inside) for reshard in (False, True) for inside in (False, True)]
    return {case: head_in_a_group_of_its_own(*case) for case in cases}


def test_lazy_logits_are_right_or_a_clear_error_once_the_weight_is_let_go(two: Workers) -> None:
    for made in two.run(every_read):
        for (reshard, _), largest in made.items():  # a weight that would be gone: logits are computed while it is there
            assert largest == LOGITS if reshard else largest < LOGITS / 2


# --- policies -------------------------------------------------------------------------------------------------------------


def policies() -> None:
    mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)}
    offload = {"offload_policy": CPUOffloadPolicy(pin_memory=False)}
    (x, y) = rows()
    exact = averaged(lambda one: one(x, y)[0])
    for policy in (mixed, offload):
        found = {}
        for way in ("eager", "cce"):
            model = Both()
            fully_shard(model, **copy.copy(policy))
            counters.clear()
            run = compiled(model) if way == "cce" else model
            for _ in range(2):
                model.zero_grad()
                loss, logits = run(x, y)
                loss.backward()
            found[way] = gradients(model)
        assert counters["cce_fx"]["rewritten"] == 1 and logits.chain is not None
        for name, want in exact.items():
            assert found["cce"][name].dtype == torch.float32
            error = {way: (grads[name] - want).abs().max() for way, grads in found.items()}
            # As in one process: below eager's error in the same dtype, up to a few roundings.
            assert error["cce"] <= 1.5 * error["eager"] + 1e-5 * want.abs().max(), (name, error)


def test_mixed_precision_and_offload(two: Workers) -> None:
    two.run(policies)
