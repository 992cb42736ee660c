# SPDX-License-Identifier: Apache-2.0
"""Block shapes by timing: only where asked for, once for each problem, and never a shape that does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cce_fx.kernels.triton import tuning
from cce_fx.kernels.triton.device import machine_of
from cce_fx.kernels.triton.machines import INTERPRETER, Tile
from tests.kernels.contract import small

from .support import Kernels

pytestmark = pytest.mark.gpu

REAL_TILES = tuning.tiles_to_try
SLOW, FAST = Tile(16, 64, 32, 1, 1), Tile(32, 32, 16, 1, 1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "tiles_to_try", lambda *_: [SLOW, FAST])


def test_the_fastest_tile_is_chosen_once(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def seconds(run: object, config: object) -> float:
        timed.append(config.sweep)
        run(config)
        return 1.0 if config.sweep == FAST else 2.0

    monkeypatch.setattr(tuning, "_seconds", seconds)
    p = small(v=80, tune=True)
    for _ in range(2):
        config = tuning.tuned_head(kernels.moved(p)).config
        assert (config.sweep, config.logits) == (FAST, FAST)
    assert timed == [SLOW, FAST]
    torch.testing.assert_close(kernels.forward(p).nll, kernels.forward(replace(p, tune=False)).nll)
    tuning.tuned_head(kernels.moved(replace(p, bias=torch.zeros(80))))
    assert len(timed) == 4, "another problem is timed anew"


def test_nothing_is_timed_unasked(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_seconds", lambda *_: pytest.fail("timed"))
    p = kernels.moved(small(v=256))
    assert tuning.tuned_head(p).config == machine_of(kernels.device).config(torch.float32)


def test_a_shape_that_does_not_fit_is_passed_over() -> None:
    def run(config: object) -> None:
        if config.sweep == FAST:
            raise tuning.OutOfResources(1, 0, "shared memory")

    config = INTERPRETER.config(torch.float32)
    assert tuning.tuned(config, [SLOW, FAST], ("key",), run).sweep == SLOW


def test_every_machine_tries_its_own_shapes_first() -> None:
    for machine in tuning.BY_ARCH.values():
        tiles = REAL_TILES(machine, torch.bfloat16)
        assert tiles[0] == machine.config(torch.bfloat16).sweep and len(tiles) == len(set(tiles)) > 1
