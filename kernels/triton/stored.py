# SPDX-License-Identifier: Apache-2.0
"""All tiles of the logits in scratch memory, each computed once: for problems whose logits fit there.

`hold` writes exp(z - max) with the tile's own maximum, so that rounding to the inputs' dtype costs a relative 2^-9 and not
the absolute error of a rounded logit; `release` turns that into the gradient when the norm is known.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..spec import Norm
from .device import launch
from .head import Head, cdiv
from .join import Parts, make_parts
from .machines import Tile
from .rows import Rows
from .tile import columns, likeliest, logits, narrow, product, rows_at, swizzle
from .tiles import Scratch

RELEASE_ROWS = 32  # rows to a block of `release`


@triton.jit
def _hold(
    hidden,
    weight,
    bias,
    class_weight,
    index,
    column,
    state,
    scratch,  # (N, width)
    part_max,  # (tiles, N)
    part_sum,
    part_target,
    part_smooth,
    part_weight,  # (tiles,)
    part_top,  # (tiles, N)
    N,
    V,
    D,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    width,
    blocks,
    tiles,
    GROUP,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SMOOTH: tl.constexpr,
    TOP: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    block, tile = swizzle(tl.program_id(0), blocks, tiles, GROUP)
    count = tl.load(state)
    if block * ROWS >= count:
        return
    place = block * ROWS + tl.arange(0, ROWS)
    kept = place < count
    row = tl.load(index + place, mask=kept, other=0)
    target = tl.load(column + place, mask=kept, other=-1)
    c, inside, at = columns(tile, None, V, COLS, EVEN_COLS, False)
    hidden_rows = hidden + row.to(tl.int64) * stride_hn
    weight_rows = weight + c.to(tl.int64) * stride_wv
    x = product(
        hidden_rows, weight_rows, D, stride_hd, stride_wd, ROWS, COLS, DEPTH, EVEN_DEPTH, ACC, OPERAND, PRECISION
    )
    z, _ = logits(x, bias, c[None, :], INNER, OUTER, CAPPED)
    at_target = tl.sum(tl.where(at[None, :] == target[:, None], z, 0.0), 1)
    z = tl.where(inside[None, :], z, float("-inf"))
    highest = tl.max(z, 1)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    e = tl.exp(z - shift[:, None])
    part = tile * tl.full((), N, tl.int64) + place
    tl.store(part_max + part, highest, mask=kept)
    tl.store(part_sum + part, tl.sum(e, 1), mask=kept)
    tl.store(part_target + part, at_target, mask=kept)
    if TOP:
        tl.store(part_top + part, likeliest(z, highest, at), mask=kept)
    if SMOOTH:
        if class_weight is not None:
            w = tl.load(class_weight + c, mask=inside, other=0.0)
        else:
            w = inside.to(ACC)
        spread = tl.where(inside[None, :], (z - shift[:, None]) * w[None, :], 0.0)
        tl.store(part_smooth + part, tl.sum(spread, 1), mask=kept)
        tl.store(part_weight + tile + tl.arange(0, 1), tl.sum(w, 0)[None])
    line = row if BY_ROW else place
    out = scratch + line.to(tl.int64)[:, None] * width + at[None, :]
    tl.store(out, narrow(e, scratch.dtype.element_ty, OPERAND), mask=kept[:, None] & inside[None, :])


@triton.jit
def _release(
    class_weight,
    index,
    column,
    state,
    row_max,  # (N,) by row
    row_sumexp,
    prob,
    hit,
    uniform,
    scratch,  # (N, width)
    part_max,  # (tiles, N)
    bias_parts,  # (blocks, width) or None
    N,
    V,
    width,
    pieces,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    TILE: tl.constexpr,  # classes that share a maximum, a multiple of COLS
    EVEN_COLS: tl.constexpr,
):
    block, piece = tl.program_id(0) // pieces, tl.program_id(0) % pieces
    count = tl.load(state)
    if block * ROWS >= count:
        return
    place = block * ROWS + tl.arange(0, ROWS)
    kept = place < count
    row, target, _, p, h, u = rows_at(place, kept, index, column, hit, prob, hit, uniform)
    tile = piece * COLS // TILE
    highest = tl.load(part_max + tile * tl.full((), N, tl.int64) + place, mask=kept, other=0.0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    scale = tl.exp(highest - tl.load(row_max + row, mask=kept, other=0.0)) * p
    scale /= tl.load(row_sumexp + row, mask=kept, other=1.0)
    c, inside, at = columns(piece, None, V, COLS, EVEN_COLS, False)
    line = row if BY_ROW else place
    mask = kept[:, None] & inside[None, :]
    out = scratch + line.to(tl.int64)[:, None] * width + at[None, :]
    dx = tl.load(out, mask=mask, other=0.0).to(ACC) * scale[:, None]
    dx = tl.where(at[None, :] == target[:, None], dx - h[:, None], dx)
    if uniform is not None:
        if class_weight is not None:
            dx -= u[:, None] * tl.load(class_weight + c)[None, :]
        else:
            dx -= u[:, None]
    dx = tl.where(mask, dx, 0.0)
    if bias_parts is not None:
        tl.store(bias_parts + block * tl.full((), width, tl.int64) + at, tl.sum(dx, 0), mask=inside)
    tl.store(out, narrow(dx, scratch.dtype.element_ty, OPERAND), mask=mask)


def hold(head: Head, rows: Rows, s: Scratch) -> Parts:
    """Fill `s` (N, V) with exp(z - max); returns the parts of each tile for `join.join`."""
    p, t = head.problem, head.config.logits
    blocks, tiles = cdiv(head.n, t.rows), cdiv(head.v, t.cols)
    parts = make_parts(head, tiles)
    launch(
        p.hidden.device,
        _hold,
        (blocks * tiles,),
        t.options,
        **head.args(rows),
        scratch=s.tile,
        width=s.tile.shape[1],
        **parts._asdict(),
        N=head.n,
        blocks=blocks,
        tiles=tiles,
        GROUP=head.group(t.rows),
        SMOOTH=p.smooth,
        TOP=p.top,
        BY_ROW=s.by_row,
        ROWS=t.rows,
        COLS=t.cols,
        DEPTH=t.depth,
        EVEN_COLS=head.v % t.cols == 0,
        EVEN_DEPTH=head.d % t.depth == 0,
    )
    return parts


def release(head: Head, rows: Rows, s: Scratch, part_max: Tensor, norm: Norm) -> None:
    """Turn what `hold` left in `s` into the gradient, with the norm (N,)."""
    args, tile = head.args(rows), head.config.logits.cols
    r = Tile(RELEASE_ROWS, min(64, tile), 0, 4, 1)
    blocks, pieces = cdiv(head.n, r.rows), cdiv(head.v, r.cols)
    shared = ("class_weight", "index", "column", "state", "V", "ACC", "OPERAND")
    launch(
        head.problem.hidden.device,
        _release,
        (blocks * pieces,),
        {"num_warps": r.warps},
        **{name: args[name] for name in shared},
        row_max=norm.max,
        row_sumexp=norm.sumexp,
        prob=rows.prob,
        hit=rows.hit,
        uniform=rows.uniform,
        scratch=s.tile,
        part_max=part_max,
        bias_parts=s.bias,
        N=head.n,
        width=s.tile.shape[1],
        pieces=pieces,
        BY_ROW=s.by_row,
        ROWS=r.rows,
        COLS=r.cols,
        TILE=tile,
        EVEN_COLS=head.v % r.cols == 0,
    )
