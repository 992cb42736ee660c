# SPDX-License-Identifier: Apache-2.0
"""FSDP2: gradients are the average of eager's; with the head in the root's group the loss is cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.distributed.fsdp import fully_shard

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
    if own_group:  # FSDP's hooks on the head break the graph before the loss
        assert counters["cce_fx"]["rewritten"] == 0 and len(graphs.forward) == 2
    else:
        assert counters["cce_fx"]["rewritten"] == 1
        assert graphs.largest() <= LARGE * WIDTH < LENGTH * LARGE


@pytest.mark.parametrize("reshard", [False, True], ids=["kept", "resharded after forward"])
@pytest.mark.parametrize("own_group", [False, True], ids=["head in the root's group", "head in a group of its own"])
def test_gradients_are_averaged(two: Workers, own_group: bool, reshard: bool) -> None:
    two.run(step, own_group, reshard)
