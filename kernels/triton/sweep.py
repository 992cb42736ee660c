# SPDX-License-Identifier: Apache-2.0
"""The forward: one sweep over the vocabulary per row block (arXiv 2411.09009, section 4.1 and 4.2).

The vocabulary is split among programs where row blocks alone would leave multiprocessors idle. Each writes the sums of
its part; a second kernel adds the parts of a row in their order. No locks and no atomics, so results repeat bit by bit.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine import total_weight
from ..spec import Partials, Stats
from .device import launch
from .head import Head, cdiv
from .rows import Rows, select
from .tile import add_tile, columns, product, swizzle, tma_product
from .tma import pack, tma_args

Sums = TypeVar("Sums", Partials, Stats)


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
    for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, COLS))):
        c, inside, at = columns(tile, None, V, COLS, EVEN_COLS, False)
        weight_rows = weight + c.to(tl.int64) * stride_wv
        x = product(
            hidden_rows, weight_rows, D, stride_hd, stride_wd, ROWS, COLS, DEPTH, EVEN_DEPTH, ACC, OPERAND,
            PRECISION,
        )  # fmt: skip
        highest, total, at_target, smooth, weights = add_tile(
            x, bias, class_weight, c, inside, at, target, highest, total, at_target, smooth, weights,
            INNER, OUTER, CAPPED, SMOOTH, EVEN_COLS,
        )  # fmt: skip
    _store_parts(
        part_max, part_sum, part_target, part_smooth, part_weight, split, N, place, kept, highest, total, at_target,
        smooth, weights, SMOOTH,
    )  # fmt: skip


@triton.jit
def _store_parts(
    part_max, part_sum, part_target, part_smooth, part_weight, split, N, place, kept, highest, total, at_target,
    smooth, weights, SMOOTH: tl.constexpr,
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
            for tile in range(split * tiles, tl.minimum((split + 1) * tiles, tl.cdiv(V, COLS))):
                c, inside, at = columns(tile, None, V, COLS, EVEN_COLS, False)
                x = tma_product(a, b, block * ROWS, tile * COLS, D, ROWS, COLS, DEPTH, ACC, OPERAND, PRECISION)
                highest, total, at_target, smooth, weights = add_tile(
                    x, bias, class_weight, c, inside, at, target, highest, total, at_target, smooth, weights,
                    INNER, OUTER, CAPPED, SMOOTH, EVEN_COLS,
                )  # fmt: skip
            _store_parts(
                part_max, part_sum, part_target, part_smooth, part_weight, split, N, place, kept, highest, total,
                at_target, smooth, weights, SMOOTH,
            )  # fmt: skip


@triton.jit
def _join(
    target,
    index,
    state,
    part_max,  # (splits, N)
    part_sum,
    part_target,
    part_smooth,
    part_weight,  # (splits,)
    total_weight,  # (1,) or None
    out_nll,  # (N,), or None where not STATS
    out_lse,  # (N,), or None where not STATS
    out_max,  # (N,)
    out_sum,
    out_target,  # (N,), or None where STATS
    out_smooth,
    N,
    splits,
    ignore_index,
    IGNORE: tl.constexpr,
    SKIP: tl.constexpr,
    SMOOTH: tl.constexpr,
    STATS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count = tl.load(state)
    if tl.program_id(0) * BLOCK >= count:
        return
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = place < count
    row = tl.load(index + place, mask=kept, other=0)
    highest = tl.full((BLOCK,), float("-inf"), dtype=ACC)
    for split in range(0, splits):
        highest = tl.maximum(
            highest, tl.load(part_max + split * tl.full((), N, tl.int64) + place, mask=kept, other=0.0)
        )
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    total = tl.zeros((BLOCK,), dtype=ACC)
    at_target = tl.zeros((BLOCK,), dtype=ACC)
    smooth = tl.zeros((BLOCK,), dtype=ACC)
    weights = tl.zeros((1,), dtype=ACC)
    for split in range(0, splits):
        at = split * tl.full((), N, tl.int64) + place
        part = tl.load(part_max + at, mask=kept, other=0.0)
        total += tl.load(part_sum + at, mask=kept, other=0.0) * tl.exp(part - shift)
        at_target += tl.load(part_target + at, mask=kept, other=0.0)
        if SMOOTH:
            w = tl.load(part_weight + split + tl.arange(0, 1))
            part = tl.where(part == float("-inf"), 0.0, part)
            smooth += tl.load(part_smooth + at, mask=kept, other=0.0) + w * (part - shift)
            weights += w
    if STATS:
        log_total = tl.log(total)
        # The differences first: lse - z_t would cancel the leading digits of two large numbers.
        nll = (highest - at_target) + log_total
        lse = tl.where(highest == float("inf"), highest, shift + log_total)
        if SMOOTH:
            smooth = tl.load(total_weight + tl.arange(0, 1)) * log_total - smooth
        if IGNORE:
            ignored = tl.load(target + row, mask=kept, other=0) == ignore_index
            nll = tl.where(ignored, 0.0, nll)
            smooth = tl.where(ignored, 0.0, smooth)
            if SKIP:
                lse = tl.where(ignored, 0.0, lse)
                highest = tl.where(ignored, 0.0, highest)
                total = tl.where(ignored, 0.0, total)
        tl.store(out_nll + row, nll, mask=kept)
        tl.store(out_lse + row, lse, mask=kept)
    else:
        smooth += weights * shift
        tl.store(out_target + row, at_target, mask=kept)
    tl.store(out_max + row, highest, mask=kept)
    tl.store(out_sum + row, total, mask=kept)
    if SMOOTH:
        tl.store(out_smooth + row, smooth, mask=kept)


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
        return _empty(head, kind)
    rows = select(head.problem)
    return _join_parts(head, rows, _parts(head, rows), kind)


def _empty(head: Head, kind: type[Sums]) -> Sums:
    """Stats or Partials with the zeros that rows not computed keep."""
    sizes = dict.fromkeys(kind._fields, head.n) | {"smooth": head.n if head.problem.smooth else 0}
    return kind(**{n: torch.zeros(s, dtype=head.dtype, device=head.problem.hidden.device) for n, s in sizes.items()})


def _parts(head: Head, rows: Rows) -> list[Tensor | None]:
    problem, t = head.problem, head.config.sweep
    tiles = cdiv(head.v, t.cols)
    splits = splits_of(head)
    per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, per_split)
    shape = (splits, head.n)
    device = problem.hidden.device
    parts: list[Tensor | None] = [torch.empty(shape, dtype=head.dtype, device=device) for _ in range(3)]
    parts.append(torch.empty(shape, dtype=head.dtype, device=device) if problem.smooth else None)
    # Zeros, as a count of 0 leaves them unwritten.
    parts.append(torch.zeros(splits, dtype=head.dtype, device=device) if problem.smooth else None)
    blocks = cdiv(head.n, t.rows)
    shared = {
        "part_max": parts[0],
        "part_sum": parts[1],
        "part_target": parts[2],
        "part_smooth": parts[3],
        "part_weight": parts[4],
        "N": head.n,
        "blocks": blocks,
        "splits": splits,
        "tiles": per_split,
        "GROUP": head.group(t.rows),
        "SMOOTH": problem.smooth,
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


def join(head: Head, rows: Rows, parts: list[Tensor | None]) -> Stats:
    """Stats (N,) from the parts of the vocabulary (parts, N), added in their order."""
    return _join_parts(head, rows, parts, Stats)


def _join_parts(head: Head, rows: Rows, parts: list[Tensor | None], kind: type[Sums]) -> Sums:
    out = _empty(head, kind)
    p, stats = head.problem, kind is Stats
    total = None
    if stats and p.smooth:
        weight = total_weight(p)
        total = (
            weight.to(head.dtype).reshape(1)
            if isinstance(weight, Tensor)
            else torch.full((1,), weight, dtype=head.dtype, device=p.hidden.device)
        )
    assert parts[0] is not None
    launch(
        p.hidden.device,
        _join,
        (cdiv(head.n, 128),),
        {"num_warps": 4},
        target=p.target.contiguous(),
        index=rows.index,
        state=rows.state,
        part_max=parts[0],
        part_sum=parts[1],
        part_target=parts[2],
        part_smooth=parts[3],
        part_weight=parts[4],
        total_weight=total,
        out_nll=getattr(out, "nll", None),
        out_lse=getattr(out, "lse", None),
        out_max=out.max,
        out_sum=out.sumexp,
        out_target=getattr(out, "target_logit", None),
        out_smooth=out.smooth if p.smooth else None,
        N=head.n,
        splits=parts[0].shape[0],
        ignore_index=p.ignore_index if p.ignore_index is not None else 0,
        IGNORE=p.ignore_index is not None,
        SKIP=p.skip_ignored,
        SMOOTH=p.smooth,
        STATS=stats,
        ACC=head.args(rows)["ACC"],
        BLOCK=128,
    )
    return out
