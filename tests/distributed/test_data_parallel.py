# SPDX-License-Identifier: Apache-2.0
"""DistributedDataParallel: gradients are the average of eager's, whichever way it is put around a compiled model."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from .support import Graphs, Workers, assert_same, gradients
from .test_vocabulary import LENGTH, VOCAB, Model, data

# MiB of a bucket, below the head's weight, so that DDP's optimizer splits the graph and the head is in the first part of the
# backward. Its first bucket is a constant of torch's, far above this model.
SMALL_BUCKET = 1 / 2**10
FIRST_BUCKET_BYTES = 512


def step(order: str, steps: int) -> None:
    rank, usual = dist.get_rank(), dist._DEFAULT_FIRST_BUCKET_BYTES
    dist._DEFAULT_FIRST_BUCKET_BYTES = FIRST_BUCKET_BYTES
    try:
        _step(rank, order, steps)
    finally:
        dist._DEFAULT_FIRST_BUCKET_BYTES = usual


def _step(rank: int, order: str, steps: int) -> None:
    one, model = Model(), Model()
    x, y = data()
    mine = slice(rank, rank + 1)
    graphs = Graphs()
    counters.clear()
    if order == "DDP around compiled":
        run = DistributedDataParallel(
            torch.compile(model, backend="cce", options=graphs.options), bucket_cap_mb=SMALL_BUCKET
        )
        no_sync = run.no_sync
    else:
        wrapped = DistributedDataParallel(model, bucket_cap_mb=SMALL_BUCKET)
        run = torch.compile(wrapped, backend="cce", options=graphs.options)
        no_sync = wrapped.no_sync
    for at in range(steps):
        with contextlib.nullcontext() if at == steps - 1 else no_sync():
            run(x[mine], y[mine]).backward()
    for part in (0, 1):
        for _ in range(steps):
            (one(x[part : part + 1], y[part : part + 1]) / 2).backward()
    assert_same(gradients(model), gradients(one))
    assert counters["cce_fx"]["rewritten"] >= 1
    assert graphs.largest() < LENGTH * VOCAB
    if order == "compiled around DDP":
        assert len(graphs.forward) > 1  # the graph was split


@pytest.mark.sample(2)
@pytest.mark.parametrize("steps", [1, 3], ids=["one step", "accumulated under no_sync"])
@pytest.mark.parametrize("order", ["DDP around compiled", "compiled around DDP"])
def test_gradients_are_averaged_and_the_loss_is_cut(two: Workers, order: str, steps: int) -> None:
    two.run(step, order, steps)
