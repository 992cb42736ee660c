# SPDX-License-Identifier: Apache-2.0
"""The edges of what the Triton kernels are handed: names, shards, devices, targets, and the workspace."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cce_fx.kernels import portable, triton
from cce_fx.kernels.spec import Norm, RowGrads, Shard
from cce_fx.kernels.triton.device import nearest
from tests.kernels.contract import ALL, check, small

from .support import Kernels

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parent.parent.parent


def test_the_kernels_take_what_the_portable_ones_take() -> None:
    for name in ("partial", "forward", "backward", "forward_backward"):
        both = (inspect.signature(getattr(module, name)).parameters for module in (triton, portable))
        ours, theirs = ([k for k, v in each.items() if v.kind is not v.KEYWORD_ONLY] for each in both)
        assert ours == theirs, name


@pytest.mark.parametrize("workspace", [1, 3000, 20_000, 10**9])
def test_scratch_memory_stays_within_the_workspace(kernels: Kernels, workspace: int) -> None:
    p = small(40, 24, 200, torch.bfloat16, workspace=workspace)
    head = triton.head.make_head(kernels.moved(p))
    for stats in (False, True):
        assert triton.cost.make_plan(head, ALL, with_stats=stats).scratch <= workspace
    for products in ("blas", "triton"):
        check(p, RowGrads(torch.ones(40)), ALL, kernels, products=products)


def test_a_shard_alone_has_no_loss(kernels: Kernels) -> None:
    p = small(5, 8, 20, shard=Shard(0, 40))
    with pytest.raises(ValueError, match="combine the partials"):
        kernels.forward(p)
    with pytest.raises(ValueError, match="combine the partials"):
        kernels.forward_backward(p, RowGrads(torch.ones(5)), ALL)


def test_unknown_names_are_refused(kernels: Kernels) -> None:
    p, rows = small(), RowGrads(torch.ones(6))
    for name in ("strategy", "products"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            kernels.backward(p, Norm(rows.nll, rows.nll), rows, ALL, **{name: "fast"})


@pytest.mark.parametrize("strategy", ["recompute", "chunked"])
def test_all_rows_ignored_gives_zeros_whatever_the_row_gradients(kernels: Kernels, strategy: str) -> None:
    p = small(bias=torch.ones(11))
    p.target.fill_(-100)
    stats, found = kernels.forward_backward(p, RowGrads(torch.full((6,), torch.nan)), ALL, strategy=strategy)
    assert not stats.nll.any() and not any(g.any() for g in found)


BAD_TARGET = """
import torch
from cce_fx.kernels import triton
from tests.gpu.support import Kernels
from tests.kernels.contract import small
p = small(ignore_index=None)
p.target[3] = {bad}
Kernels(torch.device("{device}")).forward(p)
"""


@pytest.mark.parametrize("bad", [11, -1])
def test_a_target_out_of_bounds_fails_as_in_eager(device: torch.device, bad: int) -> None:
    # In a process of its own: a failed assertion on a GPU is the end of everything on it.
    code = BAD_TARGET.format(bad=bad, device=device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    wanted = "device-side assert" if device.type == "cuda" else f"IndexError: Target {bad} is out of bounds"
    assert done.returncode != 0 and wanted in done.stderr


def test_a_tensor_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(NotImplementedError, match=r"kernels\.portable"):
        triton.forward(small())


def test_deterministic_may_be_asked_for_or_not(kernels: Kernels) -> None:
    p, rows = small(20, 16, 70), RowGrads(torch.ones(20))
    norm = kernels.forward(p).norm
    first, second = (kernels.backward(p, norm, rows, ALL, deterministic=wanted) for wanted in (True, False))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.hidden, second.hidden)


CARDS = {
    ("NVIDIA H200", 90, 227): "H200",
    ("NVIDIA A100-SXM4-80GB", 80, 163): "A100",
    ("NVIDIA GeForce RTX 4090", 89, 99): "L40S",
    ("NVIDIA GeForce RTX 5070", 120, 99): "RTX 5090",
    ("NVIDIA GB10", 121, 99): "RTX 5090",
    ("NVIDIA B300", 103, 227): "B200",
    ("Tesla T4", 75, 64): "RTX 3090",
    ("AMD Instinct MI300X", "gfx942", 64): "MI300X",
    ("AMD Instinct MI355X", "gfx950", 160): "MI300X",
}


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card[0])
def test_every_card_has_block_shapes_that_fit(card: tuple[str, int | str, int]) -> None:
    name, arch, kib = card
    found = nearest(name, arch, kib << 10)
    assert found.name == CARDS[card]
    assert found.shared <= kib << 10 or arch == 75  # older than all of the table
