# SPDX-License-Identifier: Apache-2.0
"""The forward: one sweep over the vocabulary per row block (arXiv 2411.09009, section 4.1 and 4.2).

The vocabulary is split among programs where row blocks alone would leave multiprocessors idle. Each writes the sums of
its part; `join.py` adds the parts of a row in their order. No locks and no atomics, so results repeat bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import launch
from .head import Head, cdiv
from .join import Parts, Sums, join, make_parts, nothing
from .rows import Rows, select
from .tile import add_tile, columns, product, swizzle, tma_product
from .tma import pack, tma_args


@triton.jit
def _sweep(
    hidden,  # (N, D)
    weight,  # (V, D)
    bias,  # (V,) or None
    class_weight,  # (V,) or None
    index,
    column,
    state,
    part_max,  # (SPLITS, N)
    part_sum,
    part_target,
    part_smooth,  # (SPLITS, N) sum of w (z - max)
    part_weight,  # (SPLITS,) sum of w
    part_top,  # (SPLITS, N)
    N,
    V,
    D,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    blocks,
    splits,
    tiles,
    GROUP,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    block, split = swizzle(tl.program_id(0), blocks, splits, GROUP)
    count = tl.load(state)
    if block * ROWS >= count:
        return
    place = block * ROWS + tl.arange(0, ROWS)
    kept = place < count
    row = tl.load(index + place, mask=kept, other=0)
    target = tl.load(column + place, mask=kept, other=-1)
    hidden_rows = hidden + row.to(tl.int64) * stride_hn

    highest = tl.full((ROWS,), float("-inf"), dtype=ACC)
    total = tl.zeros((ROWS,), dtype=ACC)
    at_target = tl.zeros((ROWS,), dtype=ACC)
    smooth = tl.zeros((ROWS,), dtype=ACC)
    weights = tl.zeros((1,), dtype=ACC)
    best = tl.zeros((ROWS,), dtype=tl.int32)
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, COLS))):
        c, inside, at = columns(tile, None, V, COLS, EVEN_COLS, False)
        weight_rows = weight + c.to(tl.int64) * stride_wv
        x = product(
            hidden_rows, weight_rows, D, stride_hd, stride_wd, ROWS, COLS, DEPTH, EVEN_DEPTH, ACC, OPERAND,
            PRECISION,
        )  # fmt: skip
        highest, total, at_target, smooth, weights, best = add_tile(
            x, bias, class_weight, c, inside, at, target, highest, total, at_target, smooth, weights, best,
            INNER, OUTER, CAPPED, SMOOTH, TOP, EVEN_COLS,
        )  # fmt: skip
    _store_parts(
        part_max, part_sum, part_target, part_smooth, part_weight, part_top, split, N, place, kept, highest,
        total, at_target, smooth, weights, best, SMOOTH, TOP,
    )  # fmt: skip


@triton.jit
def _store_parts(
    part_max, part_sum, part_target, part_smooth, part_weight, part_top, split, N, place, kept, highest,
    total, at_target, smooth, weights, best, SMOOTH: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """The sums of the rows at `place` over one split of the vocabulary."""
    out = split * tl.full((), N, tl.int64) + place
    tl.store(part_max + out, highest, mask=kept)
    tl.store(part_sum + out, total, mask=kept)
    tl.store(part_target + out, at_target, mask=kept)
    if SMOOTH:
        tl.store(part_smooth + out, smooth, mask=kept)
        # Every row block writes the same number.
        tl.store(part_weight + split + tl.arange(0, 1), weights)
    if TOP:
        tl.store(part_top + out, best, mask=kept)


@triton.jit
def _sweep_tma(
    packed,  # (N, D), kept rows first
    weight,  # (V, D)
    bias,
    class_weight,
    column,
    state,
    part_max,  # (SPLITS, N)
    part_sum,
    part_target,
    part_smooth,
    part_weight,
    part_top,
    N,
    V,
    D,
    stride_pn,
    stride_wv,
    blocks,
    splits,
    tiles,
    GROUP,
    PROGRAMS,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
):
    """`_sweep` through tensor descriptors, by a fixed number of programs that each take one part after another."""
    a = tl.make_tensor_descriptor(packed, [N, D], [stride_pn, 1], [ROWS, DEPTH])
    b = tl.make_tensor_descriptor(weight, [V, D], [stride_wv, 1], [COLS, DEPTH])
    count = tl.load(state)
    for part in range(tl.program_id(0), blocks * splits, PROGRAMS):
        block, split = swizzle(part, blocks, splits, GROUP)
        if block * ROWS < count:
            place = block * ROWS + tl.arange(0, ROWS)
            kept = place < count
            target = tl.load(column + place, mask=kept, other=-1)
            highest = tl.full((ROWS,), float("-inf"), dtype=ACC)
            total = tl.zeros((ROWS,), dtype=ACC)
            at_target = tl.zeros((ROWS,), dtype=ACC)
            smooth = tl.zeros((ROWS,), dtype=ACC)
            weights = tl.zeros((1,), dtype=ACC)
            best = tl.zeros((ROWS,), dtype=tl.int32)
            for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, COLS))):
                c, inside, at = columns(tile, None, V, COLS, EVEN_COLS, False)
                x = tma_product(a, b, block * ROWS, tile * COLS, D, ROWS, COLS, DEPTH, ACC, OPERAND, PRECISION)
                highest, total, at_target, smooth, weights, best = add_tile(
                    x, bias, class_weight, c, inside, at, target, highest, total, at_target, smooth, weights, best,
                    INNER, OUTER, CAPPED, SMOOTH, TOP, EVEN_COLS,
                )  # fmt: skip
            _store_parts(
                part_max, part_sum, part_target, part_smooth, part_weight, part_top, split, N, place, kept,
                highest, total, at_target, smooth, weights, best, SMOOTH, TOP,
            )  # fmt: skip


def splits_of(head: Head) -> int:
    """Into how many parts the vocabulary is split.

    Enough programs for four waves, so that blocks of ignored rows, which end at once, leave no multiprocessor idle for
    long; and at least four tiles to a part, so that starting one costs little.
    """
    t = head.config.sweep
    blocks, tiles = cdiv(head.n, t.rows), cdiv(head.v, t.cols)
    wanted = cdiv(4 * head.machine.processors, blocks)
    return max(1, min(wanted, tiles // 4))


def run(head: Head, kind: type[Sums]) -> Sums:
    """Stats or Partials of `head`."""
    if not head.n:
        return nothing(head, kind)
    rows = select(head.problem)
    return join(head, rows, _parts(head, rows), kind)


def _parts(head: Head, rows: Rows) -> Parts:
    problem, t = head.problem, head.config.sweep
    tiles = cdiv(head.v, t.cols)
    splits = splits_of(head)
    per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, per_split)
    device, parts = problem.hidden.device, make_parts(head, splits)
    blocks = cdiv(head.n, t.rows)
    shared = {
        **parts._asdict(),
        "N": head.n,
        "blocks": blocks,
        "splits": splits,
        "tiles": per_split,
        "GROUP": head.group(t.rows),
        "SMOOTH": problem.smooth,
        "TOP": problem.top,
        "ROWS": t.rows,
        "COLS": t.cols,
        "DEPTH": t.depth,
        "EVEN_COLS": head.v % t.cols == 0,
    }
    if t.tma:
        programs = min(head.machine.processors, blocks * splits)
        args = tma_args(head, pack(head, rows))
        launch(device, _sweep_tma, (programs,), t.options, **args, **shared, PROGRAMS=programs)
    else:
        grid, even = (blocks * splits,), head.d % t.depth == 0
        launch(device, _sweep, grid, t.options, **head.args(rows), **shared, EVEN_DEPTH=even)
    return parts
