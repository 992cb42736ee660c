# SPDX-License-Identifier: Apache-2.0
"""What differs between processes, and processes that are gone; more of it stands beside what it tests, in test_vocabulary.py."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from cce_fx import distributed

from .support import Workers, assert_same, gradients
from .test_vocabulary import PLANS, ROWS, VOCAB, WIDTH, Model, data

OPTIONS = {"inner": "aot_eager"}


def different_rows() -> None:
    """Data parallelism over sequences of different lengths, with no label in one process; each step a gradient more."""
    rank = dist.get_rank()
    models = {"eager": Model(), "cce": Model()}
    found = {}
    counters.clear()
    for way, model in models.items():
        run: nn.Module = DistributedDataParallel(model)
        if way == "cce":
            run = torch.compile(run, backend="cce", options=OPTIONS)
        losses = []
        for lengths, ignored in (((12, 7), None), ((7, 12), None), ((5, 9), 1), ((9, 9), 0)):
            x, y = (t[:, : lengths[rank]] for t in data())
            if ignored == rank:
                y = torch.full_like(y, -100)
            loss = run(x, y)
            loss.backward()
            assert loss.isnan() == (ignored == rank)  # as eager: a mean over nothing, whose gradients are zero
            losses.append(loss.detach())
        found[way] = gradients(model) | {"losses": torch.stack(losses).nan_to_num(-1.0)}
    assert_same(found["cce"], found["eager"])
    assert counters["cce_fx"]["rewritten"] >= 1


def test_rows_and_labels_that_differ_between_processes(two: Workers) -> None:
    two.run(different_rows)


def differing_arguments() -> str:
    """The error; afterwards the same arguments are right, also where a process looks before the other has come."""
    hidden, weight = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH)
    target = torch.zeros(ROWS, dtype=torch.int64)
    try:
        distributed.linear_cross_entropy(
            hidden, weight, target, vocab_group=dist.group.WORLD, label_smoothing=0.1 * dist.get_rank()
        )
    except RuntimeError as error:
        time.sleep(0.5 * dist.get_rank())
        distributed.linear_cross_entropy(hidden, weight, target, vocab_group=dist.group.WORLD)
        return str(error)
    return "no error"


def test_arguments_that_differ_are_an_error_in_both(two: Workers) -> None:
    for message in two.run(differing_arguments):
        assert "processes differ in the options of linear_cross_entropy" in message
        assert "label_smoothing=0.0" in message and "label_smoothing=0.1" in message


def ends_before_the_loss(plain: bool) -> None:
    if plain:
        if dist.get_rank() == 1:
            os._exit(9)
        target = torch.zeros(ROWS, dtype=torch.int64)
        distributed.linear_cross_entropy(
            torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH), target, vocab_group=dist.group.WORLD
        )
    model = parallelize_module(Model(), init_device_mesh("cpu", (2,)), PLANS["replicated"]())
    if dist.get_rank() == 1:
        os._exit(9)
    with loss_parallel():
        torch.compile(model, backend="cce", options=OPTIONS)(*data())


@pytest.mark.sample(2)
@pytest.mark.parametrize("plain", [True, False])
def test_a_process_that_never_gets_to_the_loss_is_an_error_in_the_others(plain: bool) -> None:
    workers = Workers(2, timeout=8)
    try:
        start = time.monotonic()
        (survived, message), (other, ended) = workers.outcomes(ends_before_the_loss, plain)
        assert not survived and "rank 1 of group" in message and "did not reach" in message, message
        assert not other and ended == "the process ended"
        assert time.monotonic() - start < 100  # the start of the processes, a compilation, and one timeout
    finally:
        workers.stop()
