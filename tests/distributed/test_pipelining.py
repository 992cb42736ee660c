# SPDX-License-Identifier: Apache-2.0
"""Pipelining: the last stage and its loss are cut, whichever of them is compiled, and gradients are those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

from benchmarks import measure

from .support import Workers, assert_same, gradients

VOCAB, WIDTH, MICROBATCHES, LENGTH = 8000, 8, 4, 64
BATCH = 2 * MICROBATCHES


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mix(self.embed(x)))


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.only_hidden = False

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        h = self.norm(h)
        if self.only_hidden:
            return h
        return self.head(h) if y is None else loss_of_logits(self.head(h), y)


def loss_of_logits(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def stages() -> tuple[First, Last]:
    torch.manual_seed(0)
    return First(), Last()


def compiled(fn: Any) -> Any:
    return torch.compile(fn, backend="cce", options={"inner": "aot_eager"})


def in_place(last: Last) -> Last:
    last.compile(backend="cce", options={"inner": "aot_eager"})
    return last


def only_hidden(last: Last) -> Last:
    """The head stays a part of the stage's module: a schedule divides the gradients of that by the number of microbatches."""
    last.only_hidden = True
    return last


# What a user may compile: (the stage's module, the schedule's loss_fn) of the last stage.
SPELLINGS: dict[str, Callable[[Last], tuple[nn.Module, Callable[..., Tensor]]]] = {
    "the stage": lambda last: (compiled(last), loss_of_logits),
    "the stage in place": lambda last: (in_place(last), loss_of_logits),
    "the head with the loss": lambda last: (only_hidden(last), compiled(lambda h, y: loss_of_logits(last.head(h), y))),
    "the stage with the loss": lambda last: (compiled(last), lambda loss, y: loss),
    "the stage and the loss, each by itself": lambda last: (compiled(last), compiled(loss_of_logits)),
    "the loss alone": lambda last: (last, compiled(loss_of_logits)),
}

LOGITS = BATCH // MICROBATCHES * LENGTH * VOCAB * 4  # bytes of a microbatch


def step(spelling: str, schedule: type, outputs: bool = False) -> int:
    """A step of both stages; the bytes of the largest tensor that this process makes in a second one."""
    rank = dist.get_rank()
    parts = first, last = stages()
    gen = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCAB, (BATCH, LENGTH), generator=gen) for _ in range(2))
    y[::3, :5] = -100
    module, loss_fn = (first, loss_of_logits) if rank == 0 else SPELLINGS[spelling](last)
    run = schedule(PipelineStage(module, rank, 2, torch.device("cpu")), MICROBATCHES, loss_fn=loss_fn)
    losses: list[Tensor] = []
    more = {"y": y} if spelling == "the stage with the loss" else {}

    def once() -> Any:
        losses.clear()
        parts[rank].zero_grad()
        if rank == 0:
            return run.step(x, return_outputs=outputs)
        return run.step(**more, target=y, losses=losses, return_outputs=outputs)

    once()
    out, changes = measure.allocations(once)
    one, expected, logits = stages(), [], []
    for a, b in zip(x.chunk(MICROBATCHES), y.chunk(MICROBATCHES)):
        logits.append(one[1](one[0](a)))
        expected.append(loss_of_logits(logits[-1], b))
        (expected[-1] / MICROBATCHES).backward()
    assert_same(gradients(parts[rank]), gradients(one[rank]))
    if rank == 1:
        assert_same({"loss": torch.stack(losses)}, {"loss": torch.stack(expected)})
        if outputs:
            assert_same({"outputs": out}, {"outputs": torch.cat(logits)})
    return max(changes)


def every_spelling(schedule: type) -> dict[str, int]:
    made = {}
    for spelling in SPELLINGS:
        made[spelling] = step(spelling, schedule)
        torch._dynamo.reset()
    made["outputs"] = step("the stage", schedule, outputs=True)
    return made


@pytest.mark.parametrize("schedule", [ScheduleGPipe, Schedule1F1B])
def test_loss_and_gradients_are_those_of_one_process_and_no_logits_are_made(two: Workers, schedule: type) -> None:
    _, made = two.run(every_spelling, schedule)
    # The head is not in the graph of the loss; logits are asked for.
    dense = {"the loss alone": LOGITS, "outputs": MICROBATCHES * LOGITS}
    for spelling, largest in made.items():
        if spelling in dense:
            assert largest == dense[spelling]
        else:
            assert largest < LOGITS / 2, spelling
