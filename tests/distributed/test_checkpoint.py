# SPDX-License-Identifier: Apache-2.0
"""torch.distributed.checkpoint: the keys are those of the model that is not compiled; what two processes save, one loads."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module

from .support import Workers, assert_same
from .test_vocabulary import PLANS, Model, data

OPTIONS = {"inner": "aot_eager"}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train(run: Any, optimizer: torch.optim.Optimizer, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One step on the mean of the parts' losses."""
    optimizer.zero_grad()
    loss = torch.stack([run(x, y) for x, y in parts]).mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def halves() -> list[tuple[Tensor, Tensor]]:
    x, y = data()
    return [(x[part : part + 1], y[part : part + 1]) for part in (0, 1)]


def parts_of(layout: str) -> list[tuple[Tensor, Tensor]]:
    return halves() if layout == "FSDP2" else [data()]


def save(layout: str, wrapped: bool, folder: Path) -> set[str]:
    """Train a step on two processes and save; the names of what was saved."""
    model = Model()
    if layout == "FSDP2":
        fully_shard(model)
        parts = [halves()[dist.get_rank()]]
    else:
        parallelize_module(model, init_device_mesh("cpu", (2,)), PLANS["replicated"]())
        parts = parts_of(layout)
    compiled = torch.compile(model, backend="cce", options=OPTIONS)
    if not wrapped:
        model.compile(backend="cce", options=OPTIONS)
        assert model.state_dict().keys() == Model().state_dict().keys()
        compiled = model
    optimizer = optimizer_of(model)
    counters.clear()
    with loss_parallel() if layout == "TP" else contextlib.nullcontext():
        train(compiled, optimizer, parts)
    assert counters["cce_fx"]["rewritten"] == 1
    state = dict(zip(("model", "optimizer"), get_state_dict(compiled, optimizer)))
    dcp.save(state, checkpoint_id=folder)
    return set(state["model"])


@pytest.mark.sample(4)
@pytest.mark.parametrize("wrapped", [False, True], ids=["compiled in place", "torch.compile(model)"])
@pytest.mark.parametrize("layout", ["FSDP2", "TP"])
def test_one_process_goes_on_from_what_two_saved(two: Workers, tmp_path: Path, layout: str, wrapped: bool) -> None:
    one = Model()
    reference = optimizer_of(one)
    for names in two.run(save, layout, wrapped, tmp_path):
        assert names == one.state_dict().keys()
    train(one, reference, parts_of(layout))
    torch._dynamo.reset()
    model = Model()
    optimizer = optimizer_of(model)
    compiled = torch.compile(model, backend="cce", options=OPTIONS)
    found = dict(zip(("model", "optimizer"), get_state_dict(compiled, optimizer)))
    dcp.load(found, checkpoint_id=tmp_path)
    set_state_dict(compiled, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"])
    assert_same(model.state_dict(), one.state_dict())
    for _ in range(2):  # the first goes by the momentum that was saved
        ours, theirs = (train(run, o, parts_of(layout)) for run, o in ((compiled, optimizer), (one, reference)))
        assert_same({"loss": ours}, {"loss": theirs})
    assert_same(model.state_dict(), one.state_dict())
