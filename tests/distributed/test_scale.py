# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of `python -m benchmarks scale`: its bytes are what processes that share a head allocate."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import loss_parallel

from benchmarks import measure, scale
from benchmarks.scale import Head, Layout

from .support import Workers

HEADS = [Head(512, 64, 16000), Head(1024, 32, 24000), Head(256, 256, 16000)]


def measured(head: Head, layout: Layout, dtype: torch.dtype, cut: bool) -> int:
    """The peak of this process in one step."""
    mesh = init_device_mesh("cpu", (2,))
    by_rows, by_classes = ([Shard(0) if size > 1 else Replicate()] for size in (layout.sequence, layout.tensor))
    gen = torch.Generator().manual_seed(0)
    drawn = [torch.randn(rows, head.width, generator=gen).to(dtype) for rows in (head.tokens, head.classes)]
    h, w = (
        nn.Parameter(distribute_tensor(t, mesh, where)) for t, where in zip(drawn, (by_rows, by_classes), strict=True)
    )
    y = distribute_tensor(torch.randint(head.classes, (head.tokens,), generator=gen), mesh, by_rows)
    torch._dynamo.reset()

    def loss(h: Any, w: Any, y: Any) -> Any:
        """With the gradient of hidden summed over the processes, as an operation before it asks."""
        return scale.loss(h.redistribute(mesh, by_rows), w, y)

    run: Any = torch.compile(loss, backend="cce", options={"inner": "aot_eager"}) if cut else loss

    def step() -> None:
        with loss_parallel() if layout.tensor > 1 else contextlib.nullcontext():
            run(h, w, y).backward()

    step()
    h.grad = w.grad = None
    return measure.peak_bytes(step)


def every_case(layout: Layout) -> list[tuple[Head, torch.dtype, int, int]]:
    cases = [(head, torch.float32) for head in HEADS] + [(HEADS[0], torch.bfloat16)]
    return [(head, dtype, *(measured(head, layout, dtype, cut) for cut in (False, True))) for head, dtype in cases]


@pytest.mark.sample(2)
@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(sequence=2)], ids=str)
def test_predictions_for_divided_heads_are_what_is_measured(two: Workers, layout: Layout) -> None:
    for head, dtype, dense, cut in two.run(every_case, layout)[0]:
        found = scale.held(head, layout, dtype, "cpu")
        assert found.loss_parallel == pytest.approx(dense, rel=0.1), (head, dtype)
        assert found.cut == pytest.approx(cut, rel=0.1), (head, dtype)
