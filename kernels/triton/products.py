# SPDX-License-Identifier: Apache-2.0
"""The two products of the chunked backward: scratch with weight into d_hidden, scratch with hidden into d_weight.

The Triton kernels skip rows that are not kept and tiles that the filter left out; BLAS does neither and needs no
gathers. Both accumulate in fp32 and have a fixed order of summation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import launch
from .filtering import Filter
from .head import Head, cdiv
from .rows import Rows
from .tile import narrow, swizzle
from .tiles import Scratch


@triton.jit
def _load(at, outer, inner, MASK_OUTER: tl.constexpr, MASK_INNER: tl.constexpr):
    """Entries (A, B) at the pointers `at`, 0 where outer (A,) or inner (B,) is false; a mask not asked for is not made."""
    if MASK_OUTER and MASK_INNER:
        return tl.load(at, mask=outer[:, None] & inner[None, :], other=0.0)
    elif MASK_OUTER:
        return tl.load(at, mask=outer[:, None], other=0.0)
    elif MASK_INNER:
        return tl.load(at, mask=inner[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _into_hidden(
    scratch,  # (height, width)
    weight,  # (V, D)
    order,
    index,
    state,
    flags,  # (row blocks, tiles) or None
    before,  # (N, D) sums so far, or None
    unit,  # (1,) or None
    out,  # (N, D)
    D,
    stride_wv,
    stride_wd,
    width,
    first_block,
    start,
    stop,
    tiles,
    blocks,
    groups,
    GROUP,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,  # classes that share a flag; DEPTH where there are none
    FLAG_ROWS: tl.constexpr,  # rows that share a flag
    EVEN_ROWS: tl.constexpr,  # the scratch holds whole blocks of rows; what is past the kept ones is not stored
    EVEN_COLS: tl.constexpr,  # D is a multiple of COLS
    EVEN_STEP: tl.constexpr,  # the classes are whole steps
):
    block, part = swizzle(tl.program_id(0), blocks, groups, GROUP)
    count = tl.load(state)
    line = block * ROWS + tl.arange(0, ROWS)
    place = first_block * ROWS + line
    if (first_block + block) * ROWS >= count:
        return
    kept = place < count
    row = tl.load(index + place, mask=kept, other=0)
    d = part * COLS + tl.arange(0, COLS)
    into = row.to(tl.int64)[:, None] * D + d[None, :]
    mask = kept[:, None] & (d[None, :] < D)
    total = tl.zeros((ROWS, COLS), dtype=ACC)
    k = tl.arange(0, DEPTH)
    lines = scratch + line.to(tl.int64)[:, None] * width
    d_offset = (d.to(tl.int64) * stride_wd)[None, :]
    for piece in range(0, tl.cdiv(stop - start, STEP)):
        wanted = True
        if flags is not None:
            wanted = tl.load(flags + block * ROWS // FLAG_ROWS * tiles + piece) != 0
        if wanted:
            for inner in range(0, STEP // DEPTH):
                at = piece * STEP + inner * DEPTH + k
                inside = at < stop - start
                c = start + at
                if ORDERED:
                    c = tl.load(order + c, mask=inside, other=0)
                a = _load(lines + at[None, :], kept, inside, not EVEN_ROWS, not EVEN_STEP)
                b = weight + c.to(tl.int64)[:, None] * stride_wv + d_offset
                b = _load(b, inside, d < D, not EVEN_STEP, not EVEN_COLS)
                total = tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)
    if before is not None:
        total += tl.load(before + into, mask=mask, other=0.0)
    if unit is not None:
        total *= tl.load(unit)
    tl.store(out + into, narrow(total, out.dtype.element_ty, OPERAND), mask=mask)


@triton.jit
def _add_rows(
    total, scratch, hidden, index, place, count, at, inside, d, D, width, stride_hn, d_offset,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, EVEN_ROWS: tl.constexpr,
    EVEN_COLS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """total + scratch.T @ hidden over the kept rows at `place`; TAIL where some may be at `count` or after."""
    kept = place < count
    if TAIL:
        row = tl.load(index + place, mask=kept, other=0)
    else:
        row = tl.load(index + place)
    a = _load(scratch + place.to(tl.int64)[:, None] * width + at[None, :], kept, inside, TAIL, not EVEN_ROWS)
    b = _load(hidden + row.to(tl.int64)[:, None] * stride_hn + d_offset, kept, d < D, TAIL, not EVEN_COLS)
    return tl.dot(tl.trans(a).to(OPERAND), b.to(OPERAND), total, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _into_weight(
    scratch,  # (height, width) in the order of the kept rows
    hidden,  # (N, D)
    order,
    index,
    state,
    flags,
    unit,
    out,  # (V, D) contiguous
    D,
    stride_hn,
    stride_hd,
    width,
    start,
    stop,
    tiles,
    blocks,
    groups,
    GROUP,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,  # rows that share a flag; DEPTH where there are none
    TILE: tl.constexpr,  # classes that share a flag
    EVEN_ROWS: tl.constexpr,  # the scratch holds whole blocks of classes; what is past the last is not stored
    EVEN_COLS: tl.constexpr,  # D is a multiple of COLS
):
    block, part = swizzle(tl.program_id(0), blocks, groups, GROUP)
    count = tl.load(state)
    at = block * ROWS + tl.arange(0, ROWS)
    inside = at < stop - start
    d = part * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), dtype=ACC)
    k = tl.arange(0, DEPTH)
    d_offset = (d.to(tl.int64) * stride_hd)[None, :]
    if flags is None:
        # Whole steps need no mask, which costs more instructions than the product.
        for start_row in range(0, count // DEPTH * DEPTH, DEPTH):
            total = _add_rows(
                total, scratch, hidden, index, start_row + k, count, at, inside, d, D, width, stride_hn, d_offset,
                OPERAND, PRECISION, ACC, EVEN_ROWS, EVEN_COLS, False,
            )  # fmt: skip
        if count % DEPTH != 0:
            total = _add_rows(
                total, scratch, hidden, index, count // DEPTH * DEPTH + k, count, at, inside, d, D, width, stride_hn,
                d_offset, OPERAND, PRECISION, ACC, EVEN_ROWS, EVEN_COLS, True,
            )  # fmt: skip
    else:
        for piece in range(0, tl.cdiv(count, STEP)):
            if tl.load(flags + piece * tiles + block * ROWS // TILE) != 0:
                for inner in range(0, STEP // DEPTH):
                    total = _add_rows(
                        total, scratch, hidden, index, piece * STEP + inner * DEPTH + k, count, at, inside, d, D,
                        width, stride_hn, d_offset, OPERAND, PRECISION, ACC, EVEN_ROWS, EVEN_COLS, True,
                    )  # fmt: skip
    if unit is not None:
        total *= tl.load(unit)
    c = start + at
    if ORDERED:
        c = tl.load(order + c, mask=inside, other=0)
    into = out + c.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(into, narrow(total, out.dtype.element_ty, OPERAND), mask=inside[:, None] & (d[None, :] < D))


def into_hidden(
    head: Head, rows: Rows, s: Scratch, found: Filter | None, span: tuple[int, int, int], before: Tensor | None,
    out: Tensor, last: bool,
) -> None:  # fmt: skip
    """out (N, D) = before + scratch @ weight, for kept rows from span[0] on and classes span[1]..span[2]."""
    p, t = head.problem, head.config.product
    place, start, stop = span
    if s.by_row:
        _blas_hidden(s.tile[:, : stop - start], p.weight[start:stop], before, out)
        return
    args = head.args(rows)
    blocks, groups = cdiv(min(s.tile.shape[0], head.n - place), t.rows), cdiv(head.d, t.cols)
    shared = ("weight", "index", "state", "D", "stride_wv", "stride_wd", "ACC", "OPERAND", "PRECISION")
    launch(
        p.hidden.device,
        _into_hidden,
        (blocks * groups,),
        t.options,
        **{name: args[name] for name in shared},
        scratch=s.tile,
        order=None if found is None else found.order,
        flags=s.flags,
        before=before,
        unit=rows.unit if last else None,
        out=out,
        width=s.tile.shape[1],
        first_block=place // t.rows,
        start=start,
        stop=stop,
        tiles=cdiv(stop - start, head.config.logits.cols),
        blocks=blocks,
        groups=groups,
        GROUP=8,
        ORDERED=found is not None,
        ROWS=t.rows,
        COLS=t.cols,
        DEPTH=t.depth,
        STEP=(step := t.depth if found is None else head.config.logits.cols),
        FLAG_ROWS=head.config.logits.rows,
        EVEN_ROWS=s.tile.shape[0] % t.rows == 0,
        EVEN_COLS=head.d % t.cols == 0,
        EVEN_STEP=(stop - start) % step == 0,
    )


def into_weight(
    head: Head, rows: Rows, s: Scratch, found: Filter | None, start: int, stop: int, d_weight: Tensor
) -> None:
    """Classes [start, stop) of d_weight (V, D) = scratch.T @ hidden, over all kept rows."""
    p, t = head.problem, head.config.product
    if s.by_row:
        _blas_weight(s.tile[:, : stop - start], p.hidden, d_weight[start:stop])
        return
    args = head.args(rows)
    blocks, groups = cdiv(stop - start, t.rows), cdiv(head.d, t.cols)
    shared = ("hidden", "index", "state", "D", "stride_hn", "stride_hd", "ACC", "OPERAND", "PRECISION")
    launch(
        p.hidden.device,
        _into_weight,
        (blocks * groups,),
        t.options,
        **{name: args[name] for name in shared},
        scratch=s.tile,
        order=None if found is None else found.order,
        flags=s.flags,
        unit=rows.unit,
        out=d_weight,
        width=s.tile.shape[1],
        start=start,
        stop=stop,
        tiles=cdiv(stop - start, head.config.logits.cols),
        blocks=blocks,
        groups=groups,
        GROUP=8,
        ORDERED=found is not None,
        ROWS=t.rows,
        COLS=t.cols,
        DEPTH=t.depth,
        STEP=t.depth if found is None else head.config.logits.rows,
        TILE=head.config.logits.cols,
        EVEN_ROWS=s.tile.shape[1] % t.rows == 0,
        EVEN_COLS=head.d % t.cols == 0,
    )


def _blas_hidden(tile: Tensor, weight: Tensor, before: Tensor | None, out: Tensor) -> None:
    sums = out if before is None else before
    if sums.dtype == tile.dtype:
        torch.addmm(sums, tile, weight, beta=0 if before is None else 1, out=sums)
    elif tile.device.type == "cpu":
        # BLAS for CPUs has no products of bf16 into fp32.
        sums.addmm_(tile.float(), weight.float(), beta=0 if before is None else 1)
    elif before is None:
        torch.mm(tile, weight, out_dtype=torch.float32, out=sums)
    else:
        torch.addmm(sums, tile, weight, out_dtype=torch.float32, out=sums)
    if sums is not out:
        out.copy_(sums)


def _blas_weight(tile: Tensor, hidden: Tensor, out: Tensor) -> None:
    if tile.device.type == "cpu" and tile.dtype in (torch.bfloat16, torch.float16):
        out.copy_(tile.float().T @ hidden.float())
    else:
        torch.mm(tile.T, hidden, out=out)
