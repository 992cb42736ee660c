# SPDX-License-Identifier: Apache-2.0
"""Tiles of the logits' gradient, recomputed from the norm into scratch memory for the two products of the chunked backward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launch
from .filtering import Filter
from .head import Head, cdiv
from .rows import Rows
from .tile import columns, gradient, narrow, negligible, product, rows_at, swizzle, tma_product
from .tma import tma_args


@dataclass(frozen=True)
class Scratch:
    """Memory for rows [row, row + height) of the kept rows by classes [col, col + width), reused for piece after piece.

    `by_row` says that tile rows lie at their original row number, with zeros for rows not kept, as BLAS needs them;
    else they lie in the order of the kept rows.
    """

    tile: Tensor  # (height, width) dtype of the inputs
    by_row: bool
    bias: Tensor | None  # (row blocks, width) sums over each row block, where the bias needs a gradient
    flags: Tensor | None  # (row blocks, tiles) int8, 1 where a tile was written; with a filter
    lost_rows: Tensor | None  # (tiles, N)
    lost_columns: Tensor | None  # (row blocks, width)


def make_scratch(
    head: Head, height: int, width: int, by_row: bool, bias: bool, found: Filter | None, block: int = 0
) -> Scratch:
    """Scratch for `height` rows (a multiple of the tile's, or all) and `width` classes (a multiple, so that rows
    are aligned); `block` rows to a sum for the bias, 0 for the tile's.
    """
    t, device, dtype = head.config.logits, head.problem.hidden.device, head.problem.hidden.dtype
    blocks, tiles = cdiv(height, t.rows), cdiv(width, t.cols)
    # Zeros, because blocks of ignored rows are never written.
    zeros = lambda *shape: torch.zeros(*shape, dtype=head.dtype, device=device)  # noqa: E731
    tile = (torch.zeros if by_row else torch.empty)(height, width, dtype=dtype, device=device)
    filtering = found is not None
    return Scratch(
        tile,
        by_row,
        zeros(cdiv(height, block or t.rows), width) if bias else None,
        torch.zeros(blocks, tiles, dtype=torch.int8, device=device) if filtering else None,
        zeros(tiles, head.n) if filtering else None,
        zeros(blocks, width) if filtering else None,
    )


@triton.jit
def _write_gradient(
    hidden,  # (N, D)
    weight,  # (V, D)
    bias,
    class_weight,
    index,
    column,
    state,
    highest,
    prob,
    hit,
    uniform,
    order,
    scratch,  # (height, width)
    bias_parts,  # (blocks, width) or None
    flags,  # (blocks, tiles) or None
    lost_rows,  # (tiles, N) or None
    lost_columns,  # (blocks, width) or None
    eps,
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
    first_block,
    first_tile,
    GROUP,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_ROW: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
):
    block, tile = swizzle(tl.program_id(0), blocks, tiles, GROUP)
    count = tl.load(state)
    start = (first_block + block) * ROWS
    if start >= count:
        return
    place = start + tl.arange(0, ROWS)
    kept = place < count
    c, inside, _ = columns(first_tile + tile, order, V, COLS, EVEN_COLS, ORDERED)
    hidden_rows = hidden + tl.load(index + place, mask=kept, other=0).to(tl.int64) * stride_hn
    weight_rows = weight + c.to(tl.int64) * stride_wv
    x = product(
        hidden_rows, weight_rows, D, stride_hd, stride_wd, ROWS, COLS, DEPTH, EVEN_DEPTH, ACC, OPERAND, PRECISION
    )
    _put_gradient(
        x, bias, class_weight, index, column, highest, prob, hit, uniform, scratch, bias_parts, flags, lost_rows,
        lost_columns, eps, N, V, width, block, tile, tiles, first_block, c, inside, place, kept,
        INNER, OUTER, CAPPED, OPERAND, BY_ROW, ROWS, COLS, EVEN_COLS,
    )  # fmt: skip


@triton.jit
def _put_gradient(
    x, bias, class_weight, index, column, highest, prob, hit, uniform, scratch, bias_parts, flags, lost_rows,
    lost_columns, eps, N, V, width, block, tile, tiles, first_block, c, inside, place, kept,
    INNER: tl.constexpr, OUTER: tl.constexpr, CAPPED: tl.constexpr, OPERAND: tl.constexpr, BY_ROW: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, EVEN_COLS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of a tile of products x (ROWS, COLS) of the rows at `place` and the classes c."""
    # The rows' numbers are loaded after the product, in whose loop they would take registers.
    row, target, row_top, p, h, u = rows_at(place, kept, index, column, highest, prob, hit, uniform)
    dx = gradient(
        x, bias, class_weight, c[None, :], target[:, None], row_top[:, None], p[:, None], h[:, None], u[:, None],
        None if EVEN_COLS else inside[None, :], INNER, OUTER, CAPPED, uniform is not None,
    )  # fmt: skip
    at = tile * COLS + tl.arange(0, COLS)
    if flags is not None:
        skip = negligible(dx, p, h, eps / tl.cdiv(V, COLS), 1)
        tl.store(flags + block * tiles + tile, (skip == 0).to(tl.int8))
        lost = tl.where(skip, tl.abs(dx), 0.0)
        dx = tl.where(skip, 0.0, dx)
        tl.store(lost_rows + tile * tl.full((), N, tl.int64) + row, tl.sum(lost, 1), mask=kept)
        tl.store(lost_columns + block * tl.full((), width, tl.int64) + at, tl.sum(lost, 0), mask=inside)
    if bias_parts is not None:
        tl.store(bias_parts + block * tl.full((), width, tl.int64) + at, tl.sum(dx, 0), mask=inside)
    line = row if BY_ROW else place - first_block * ROWS
    out = scratch + line.to(tl.int64)[:, None] * width + at[None, :]
    tl.store(out, narrow(dx, scratch.dtype.element_ty, OPERAND), mask=kept[:, None] & inside[None, :])


@triton.jit
def _write_gradient_tma(
    packed,  # (N, D), kept rows first
    weight,  # (V, D)
    bias,
    class_weight,
    index,
    column,
    state,
    highest,
    prob,
    hit,
    uniform,
    scratch,  # (height, width)
    bias_parts,  # (blocks, width) or None
    N,
    V,
    D,
    stride_pn,
    stride_wv,
    width,
    blocks,
    tiles,
    first_block,
    first_tile,
    GROUP,
    PROGRAMS,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
):
    """`_write_gradient` through tensor descriptors, without a filter, by programs that take one tile after another."""
    a = tl.make_tensor_descriptor(packed, [N, D], [stride_pn, 1], [ROWS, DEPTH])
    b = tl.make_tensor_descriptor(weight, [V, D], [stride_wv, 1], [COLS, DEPTH])
    count = tl.load(state)
    for at in range(tl.program_id(0), blocks * tiles, PROGRAMS):
        block, tile = swizzle(at, blocks, tiles, GROUP)
        start = (first_block + block) * ROWS
        if start < count:
            x = tma_product(a, b, start, (first_tile + tile) * COLS, D, ROWS, COLS, DEPTH, ACC, OPERAND, PRECISION)
            place = start + tl.arange(0, ROWS)
            c, inside, _ = columns(first_tile + tile, None, V, COLS, EVEN_COLS, False)
            _put_gradient(
                x, bias, class_weight, index, column, highest, prob, hit, uniform, scratch, bias_parts, None, None,
                None, 0.0, N, V, width, block, tile, tiles, first_block, c, inside, place, place < count,
                INNER, OUTER, CAPPED, OPERAND, BY_ROW, ROWS, COLS, EVEN_COLS,
            )  # fmt: skip


def write_gradient(head: Head, rows: Rows, s: Scratch, found: Filter | None, place: int, start: int, stop: int) -> None:
    """Fill `s` with the gradient of kept rows from `place` on and classes [start, stop) in the filter's order."""
    t, device = head.config.logits, head.problem.hidden.device
    height = min(s.tile.shape[0], head.n - place)
    blocks, tiles = cdiv(height, t.rows), cdiv(stop - start, t.cols)
    shared = {
        "index": rows.index,
        "highest": rows.max,
        "prob": rows.prob,
        "hit": rows.hit,
        "uniform": rows.uniform,
        "scratch": s.tile,
        "bias_parts": s.bias,
        "N": head.n,
        "width": s.tile.shape[1],
        "blocks": blocks,
        "tiles": tiles,
        "first_block": place // t.rows,
        "first_tile": start // t.cols,
        "GROUP": head.group(t.rows),
        "BY_ROW": s.by_row,
        "ROWS": t.rows,
        "COLS": t.cols,
        "DEPTH": t.depth,
        "EVEN_COLS": head.v % t.cols == 0,
    }
    if t.tma:
        programs = min(head.machine.processors, blocks * tiles)
        args = tma_args(head, rows)
        launch(device, _write_gradient_tma, (programs,), t.options, **args, **shared, PROGRAMS=programs)
        return
    launch(
        device,
        _write_gradient,
        (blocks * tiles,),
        t.options,
        **head.args(rows) | shared,
        order=None if found is None else found.order,
        flags=s.flags,
        lost_rows=s.lost_rows,
        lost_columns=s.lost_columns,
        eps=0.0 if found is None else found.eps,
        ORDERED=found is not None,
        EVEN_DEPTH=head.d % t.depth == 0,
    )
