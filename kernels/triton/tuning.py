# SPDX-License-Identifier: Apache-2.0
"""Block shapes of the tiles of logits by timing, where the user asks for it (`Problem.tune`).

Off by default: timing needs the host to wait for the device, and results then depend, in their last bits, on what was
fastest that day. The choice is remembered per machine, dtype, hidden size and vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from triton.runtime.errors import OutOfResources

from ..spec import Partials, Problem
from .device import recording
from .head import Head, make_head
from .machines import BY_ARCH, Config, Machine, Tile
from .sweep import run

_ROUNDS = 3
_chosen: dict[tuple[object, ...], Tile] = {}


def tuned_head(problem: Problem) -> Head:
    """`make_head`, with the tile that is fastest in a forward over at most 2048 rows where `problem.tune` asks for it."""
    head = make_head(problem)
    if not problem.tune or recording() or not problem.target.numel():
        return head
    p = replace(problem, hidden=problem.hidden[:2048], target=problem.target[:2048])
    key = (head.machine.name, p.hidden.dtype, *p.weight.shape, p.smooth, p.epilogue.softcap is None, p.bias is None)
    tiles = tiles_to_try(head.machine, p.hidden.dtype)
    few = replace(head, problem=p)
    return head.using(tuned(head.config, tiles, key, lambda c: run(few.using(c), Partials)))


def tiles_to_try(machine: Machine, dtype: torch.dtype) -> list[Tile]:
    """The machine's own shapes first, then what other machines of its kind use."""
    kin = [machine, *(m for m in BY_ARCH.values() if m.backend == machine.backend)]
    configs = [m.config(dtype) for m in kin]
    return list(dict.fromkeys(tile for c in configs for tile in (c.sweep, c.logits, c.heavy)))


def tuned(config: Config, tiles: list[Tile], key: tuple[object, ...], run: Callable[[Config], object]) -> Config:
    """`config` with the tile of logits that makes `run` fastest; as it is while a CUDA graph is being captured."""
    if key not in _chosen:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return config
        timed = {tile: _seconds(run, _with(config, tile)) for tile in tiles}
        _chosen[key] = min(timed, key=lambda tile: timed[tile])
    return _with(config, _chosen[key])


def _with(config: Config, tile: Tile) -> Config:
    return replace(config, sweep=tile, logits=tile, heavy=tile)


def _seconds(run: Callable[[Config], object], config: Config) -> float:
    """The shortest of a few runs after one that compiles; infinite for a shape that does not fit."""
    try:
        run(config)
    except OutOfResources:
        return float("inf")
    found = []
    for _ in range(_ROUNDS):
        _wait()
        begin = time.perf_counter()
        run(config)
        _wait()
        found.append(time.perf_counter() - begin)
    return min(found)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
