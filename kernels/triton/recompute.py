# SPDX-License-Identifier: Apache-2.0
"""The backward without scratch memory: each program recomputes the tiles of logits that its piece of the answer needs.

Two kernels, each owning its output, so there are no locks, no atomics, and one rounding of a fp32 sum:

* the gradient of hidden: a program owns (rows, `group` columns of D) and walks through the vocabulary;
* the gradients of weight and bias: a program owns (classes, `group` columns of D) and walks through the rows.

The price is flops: the sum over D of a tile is needed for every group of the output, so with g = ceil(D / group) the
backward costs 2 (g + 1) products of N D V multiply-adds, where Apple's kernel (arXiv 2411.09009, section 4.2) costs 3
and adds into global memory under locks, in the dtype of the inputs. See `cost` for when that is worth it: small D.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..spec import Grads, Needs
from .device import launch
from .filtering import Filter
from .head import Head, cdiv
from .rows import Rows
from .tile import columns, gradient, narrow, negligible, product, rows_at, swizzle


@triton.jit
def _hidden_gradient(
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
    unit,
    order,
    d_hidden,  # (N, D) contiguous
    dropped,  # (N,) or None
    eps,
    V,
    D,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    blocks,
    groups,
    GROUP,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    ORDERED: tl.constexpr,
):
    block, part = swizzle(tl.program_id(0), blocks, groups, GROUP)
    count = tl.load(state)
    if block * OWN >= count:
        return
    place = block * OWN + tl.arange(0, OWN)
    kept = place < count
    row, target, row_top, p, h, u = rows_at(place, kept, index, column, highest, prob, hit, uniform)
    hidden_rows = hidden + row.to(tl.int64) * stride_hn
    d = part * WIDTH + tl.arange(0, WIDTH)
    out = tl.zeros((OWN, WIDTH), dtype=ACC)
    lost = tl.zeros((OWN,), dtype=ACC)
    for tile in range(0, tl.cdiv(V, OTHER)):
        c, inside, _ = columns(tile, order, V, OTHER, EVEN_COLS, ORDERED)
        weight_rows = weight + c.to(tl.int64) * stride_wv
        x = product(
            hidden_rows, weight_rows, D, stride_hd, stride_wd, OWN, OTHER, DEPTH, EVEN_DEPTH, ACC, OPERAND, PRECISION
        )
        dx = gradient(
            x, bias, class_weight, c[None, :], target[:, None], row_top[:, None], p[:, None], h[:, None], u[:, None],
            None if EVEN_COLS else inside[None, :], INNER, OUTER, CAPPED, uniform is not None,
        )  # fmt: skip
        at = weight_rows[:, None] + (d.to(tl.int64) * stride_wd)[None, :]
        if dropped is not None:
            if negligible(dx, p, h, eps / tl.cdiv(V, OTHER), 1):
                lost += tl.sum(tl.abs(dx), 1)
            else:
                w = tl.load(at, mask=d[None, :] < D, other=0.0)
                out = tl.dot(
                    narrow(dx, w.dtype, OPERAND).to(OPERAND),
                    w.to(OPERAND),
                    out,
                    input_precision=PRECISION,
                    out_dtype=ACC,
                )
        else:
            w = tl.load(at, mask=d[None, :] < D, other=0.0)
            out = tl.dot(
                narrow(dx, w.dtype, OPERAND).to(OPERAND), w.to(OPERAND), out, input_precision=PRECISION, out_dtype=ACC
            )
    if unit is not None:
        scale = tl.load(unit)
        out *= scale
        lost *= scale
    at = d_hidden + row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(at, narrow(out, d_hidden.dtype.element_ty, OPERAND), mask=kept[:, None] & (d[None, :] < D))
    if dropped is not None:
        if part == 0:
            tl.store(dropped + row, lost, mask=kept)


@triton.jit
def _weight_gradient(
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
    unit,
    order,
    d_weight,  # (V, D) contiguous, or None
    d_bias,  # (V,) or None
    dropped,  # (V,) or None
    eps,
    V,
    D,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    blocks,
    groups,
    GROUP,
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    CAPPED: tl.constexpr,
    ACC: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    OWN: tl.constexpr,
    OTHER: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    EVEN_COLS: tl.constexpr,
    EVEN_DEPTH: tl.constexpr,
    ORDERED: tl.constexpr,
):
    block, part = swizzle(tl.program_id(0), blocks, groups, GROUP)
    count = tl.load(state)
    c, inside, _ = columns(block, order, V, OWN, EVEN_COLS, ORDERED)
    weight_rows = weight + c.to(tl.int64) * stride_wv
    d = part * WIDTH + tl.arange(0, WIDTH)
    out = tl.zeros((OWN, WIDTH), dtype=ACC)
    out_bias = tl.zeros((OWN,), dtype=ACC)
    lost = tl.zeros((OWN,), dtype=ACC)
    for start in range(0, count, OTHER):
        place = start + tl.arange(0, OTHER)
        kept = place < count
        row, target, row_top, p, h, u = rows_at(place, kept, index, column, highest, prob, hit, uniform)
        hidden_rows = hidden + row.to(tl.int64) * stride_hn
        x = product(
            weight_rows, hidden_rows, D, stride_wd, stride_hd, OWN, OTHER, DEPTH, EVEN_DEPTH, ACC, OPERAND, PRECISION
        )
        dx = gradient(
            x, bias, class_weight, c[:, None], target[None, :], row_top[None, :], p[None, :], h[None, :], u[None, :],
            None if EVEN_COLS else inside[:, None], INNER, OUTER, CAPPED, uniform is not None,
        )  # fmt: skip
        keep = True
        if dropped is not None:
            keep = negligible(dx, p, h, eps / tl.cdiv(V, OWN), 0) == 0
        if keep:
            if d_bias is not None:
                out_bias += tl.sum(dx, 1)
            if d_weight is not None:
                at = hidden_rows[:, None] + (d.to(tl.int64) * stride_hd)[None, :]
                value = tl.load(at, mask=d[None, :] < D, other=0.0)
                out = tl.dot(
                    narrow(dx, value.dtype, OPERAND).to(OPERAND),
                    value.to(OPERAND),
                    out,
                    input_precision=PRECISION,
                    out_dtype=ACC,
                )
        else:
            lost += tl.sum(tl.abs(dx), 1)
    if unit is not None:
        scale = tl.load(unit)
        out *= scale
        out_bias *= scale
        lost *= scale
    if d_weight is not None:
        at = d_weight + c.to(tl.int64)[:, None] * D + d[None, :]
        tl.store(at, narrow(out, d_weight.dtype.element_ty, OPERAND), mask=inside[:, None] & (d[None, :] < D))
    if part == 0:
        if d_bias is not None:
            tl.store(d_bias + c, narrow(out_bias, d_bias.dtype.element_ty, OPERAND), mask=inside)
        if dropped is not None:
            tl.store(dropped + c, lost, mask=inside)


def recompute(head: Head, rows: Rows, needs: Needs, found: Filter | None = None) -> Grads:
    """Gradients, with no memory beyond them; see the module's text. A filter's dropped mass goes into `found`."""
    p = head.problem
    d_hidden = d_weight = d_bias = None
    if needs.hidden:
        # Rows that are not computed keep these zeros.
        d_hidden = torch.zeros(p.hidden.shape, dtype=p.hidden.dtype, device=p.hidden.device)
        dropped = {"d_hidden": d_hidden, "dropped": None if found is None else found.rows}
        _launch(head, rows, found, _hidden_gradient, head.n, head.d, **dropped)
    if needs.weight or needs.bias:
        if needs.weight:
            d_weight = torch.empty(p.weight.shape, dtype=p.weight.dtype, device=p.weight.device)
        if needs.bias and p.bias is not None:
            d_bias = torch.empty(p.bias.shape, dtype=p.bias.dtype, device=p.bias.device)
        outputs = {"d_weight": d_weight, "d_bias": d_bias, "dropped": None if found is None else found.columns}
        _launch(head, rows, found, _weight_gradient, head.v, head.d if needs.weight else 1, **outputs)
    return Grads(d_hidden, d_weight, d_bias)


def _launch(
    head: Head, rows: Rows, found: Filter | None, kernel: Any, owned: int, width: int, **outputs: Tensor | None
) -> None:
    f = head.config.fused
    blocks, groups = cdiv(owned, f.own), cdiv(width, f.group)
    cols = f.other if kernel is _hidden_gradient else f.own
    launch(
        head.problem.hidden.device,
        kernel,
        (blocks * groups,),
        f.options,
        **head.args(rows),
        **outputs,
        highest=rows.max,
        prob=rows.prob,
        hit=rows.hit,
        uniform=rows.uniform,
        unit=rows.unit,
        order=None if found is None else found.order,
        eps=0.0 if found is None else found.eps,
        blocks=blocks,
        groups=groups,
        GROUP=head.group(f.own),
        OWN=f.own,
        OTHER=f.other,
        DEPTH=f.depth,
        WIDTH=f.group,
        EVEN_COLS=head.v % cols == 0,
        EVEN_DEPTH=head.d % f.depth == 0,
        ORDERED=found is not None,
    )
