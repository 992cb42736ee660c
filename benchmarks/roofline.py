# SPDX-License-Identifier: Apache-2.0
"""What a launch costs on a machine that is not there: flops, bytes and the time of the slowest of them.

Time is max(flops / peak, device memory bytes / its rate, cache bytes / its rate) and a launch. Peak rates are the
vendors', so these are lower bounds; they compare ways of computing the same thing, and predict no benchmark.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from cce_fx.kernels.triton.cost import LAUNCH
from cce_fx.kernels.triton.device import Launch
from cce_fx.kernels.triton.machines import Machine


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Work:
    """One kernel's share of a pass."""

    flops: float = 0.0  # on tensor cores
    memory: float = 0.0  # bytes to and from device memory
    cache: float = 0.0  # bytes through the last-level cache

    def seconds(self, machine: Machine, dtype: torch.dtype) -> float:
        rates = (machine.flops(dtype), machine.memory_rate, machine.l2_rate)
        return LAUNCH + max(x / rate for x, rate in zip((self.flops, self.memory, self.cache), rates, strict=True))


def product(m: int, n: int, k: int, size: int) -> Work:
    """A matrix product (m, k) @ (k, n) of a BLAS with tiles of 128 by 256."""
    once = (m * k + k * n + m * n) * size
    blocks = cdiv(m, 128) * cdiv(n, 256)
    return Work(2.0 * m * n * k, once, blocks * (128 + 256) * k * size)


def work_of(launch: Launch) -> Work:
    """The work of one of this project's or a peer's kernels. Raises KeyError for one without a model."""
    return _MODELS[launch.kernel.__name__](launch.args)


def _logits(a: dict[str, Any], rows: int, cols: int) -> Work:
    """Tiles of logits over all rows and `cols` classes; the weight is read once for each group of row blocks."""
    d, size = a["D"], a["hidden"].element_size()
    blocks, tiles = cdiv(rows, a["ROWS"]), cdiv(cols, a["COLS"])
    padded = blocks * a["ROWS"] * tiles * a["COLS"]
    memory = (cdiv(blocks, a["GROUP"]) * cols + rows) * d * size
    return Work(2.0 * padded * d, memory, blocks * tiles * (a["ROWS"] + a["COLS"]) * d * size)


def _packed(a: dict[str, Any]) -> dict[str, Any]:
    return {**a, "hidden": a["packed"]}


def _plus(work: Work, memory: float) -> Work:
    return Work(work.flops, work.memory + memory, work.cache + memory)


def _sweep(a: dict[str, Any]) -> Work:
    return _plus(_logits(a, a["N"], a["V"]), 3 * a["part_max"].numel() * 4)


def _scratch_tiles(a: dict[str, Any]) -> Work:
    cols = min(a["tiles"] * a["COLS"], a["V"])
    rows = min(a["blocks"] * a["ROWS"], a["N"])
    return _plus(_logits(a, rows, cols), rows * cols * a["scratch"].element_size())


def _release(a: dict[str, Any]) -> Work:
    moved = 2.0 * a["N"] * a["V"] * a["scratch"].element_size()
    return Work(0.0, moved, moved)


def _fused(a: dict[str, Any], owned: int, met: int) -> Work:
    """A program owns (OWN, WIDTH) of a gradient and makes each tile it meets anew, over all of D."""
    d, size = a["D"], a["hidden"].element_size()
    blocks, groups, tiles = cdiv(owned, a["OWN"]), a["groups"], cdiv(met, a["OTHER"])
    pairs = float(blocks * groups * tiles)
    flops = pairs * 2 * a["OWN"] * a["OTHER"] * (d + a["WIDTH"])
    cache = pairs * ((a["OWN"] + a["OTHER"]) * d + a["OTHER"] * a["WIDTH"]) * size
    memory = (cdiv(blocks, a["GROUP"]) * met + 2 * owned) * d * size
    return Work(flops, memory, cache)


def _into(a: dict[str, Any], rows: int, depth: int, out: int) -> Work:
    size = a["scratch"].element_size()
    blocks, groups = a["blocks"], a["groups"]
    flops = 2.0 * blocks * a["ROWS"] * groups * a["COLS"] * depth
    memory = (rows * depth + depth * a["D"]) * size + rows * a["D"] * out
    return Work(flops, memory, blocks * groups * depth * (a["ROWS"] + a["COLS"]) * size)


def _into_hidden(a: dict[str, Any]) -> Work:
    sums = a["out"].element_size() + (0 if a["before"] is None else a["before"].element_size())
    return _into(a, min(a["blocks"] * a["ROWS"], a["out"].shape[0]), a["stop"] - a["start"], sums)


def _into_weight(a: dict[str, Any]) -> Work:
    return _into(a, a["stop"] - a["start"], a["hidden"].shape[0], a["out"].element_size())


def _rows(a: dict[str, Any]) -> Work:
    n = float(next(v for v in a.values() if isinstance(v, torch.Tensor)).shape[0])
    return Work(0.0, 64 * n, 64 * n)


def _apple_tile(a: dict[str, Any]) -> dict[str, Any]:
    return {**a, "ROWS": a["BLOCK_B"], "COLS": a["BLOCK_V"], "GROUP": a["GROUP_B"], "hidden": a["E"], "N": a["B"]}


def _apple_forward(a: dict[str, Any]) -> Work:
    # One locked log-add-exp of a row block for every tile.
    work = _logits(_apple_tile(a), a["B"], a["V"])
    return Work(work.flops, work.memory, work.cache + cdiv(a["V"], a["BLOCK_V"]) * a["B"] * 8)


def _apple_backward(a: dict[str, Any]) -> Work:
    """The tile, and two products whose results are added into global memory under locks: read and written once a tile."""
    work = _logits(_apple_tile(a), a["B"], a["V"])
    size, d = a["E"].element_size(), a["D"]
    tiles = cdiv(a["B"], a["BLOCK_B"]) * cdiv(a["V"], a["BLOCK_V"])
    sides = tiles * (a["BLOCK_B"] + a["BLOCK_V"]) * d * size
    outputs = 2.0 * (a["B"] + a["V"]) * d * size
    return Work(3 * work.flops, work.memory + outputs, work.cache + 3 * sides)


def _liger(a: dict[str, Any]) -> Work:
    # Two readings of the logits, one for the sums and one for the gradient, which takes their place.
    moved = 3.0 * a["X_ptr"].numel() * a["X_ptr"].element_size()
    return Work(0.0, moved, moved)


_MODELS: dict[str, Callable[[dict[str, Any]], Work]] = {
    "_sweep": _sweep,
    "_sweep_tma": lambda a: _sweep(_packed(a)),
    "_write_gradient": _scratch_tiles,
    "_write_gradient_tma": lambda a: _scratch_tiles(_packed(a)),
    "_hold": _scratch_tiles,
    "_release": _release,
    "_hidden_gradient": lambda a: _fused(a, a["hidden"].shape[0], a["V"]),
    "_weight_gradient": lambda a: _fused(a, a["V"], a["hidden"].shape[0]),
    "_into_hidden": _into_hidden,
    "_into_weight": _into_weight,
    "_select": _rows,
    "_join": _rows,
    "_cce_lse_forward_kernel": _apple_forward,
    "_cce_backward_kernel": _apple_backward,
    "_indexed_neg_dot_forward_kernel": _rows,
    "liger_cross_entropy_kernel": _liger,
}
