# SPDX-License-Identifier: Apache-2.0
"""From the sums of each part of the vocabulary, of `sweep.py` or `stored.py`, to the statistics of the rows."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine import total_weight
from ..spec import Partials, Stats
from .device import launch
from .head import Head, cdiv
from .rows import Rows

Sums = TypeVar("Sums", Partials, Stats)


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
    part_top,  # (splits, N), or None
    total_weight,  # (1,) or None
    out_nll,  # (N,), or None where not STATS
    out_lse,  # (N,), or None where not STATS
    out_max,  # (N,)
    out_sum,
    out_target,  # (N,), or None where STATS
    out_smooth,
    out_top,  # (N,), or None where not wanted
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
    best = tl.zeros((BLOCK,), dtype=tl.int32)
    for split in range(0, splits):
        at = split * tl.full((), N, tl.int64) + place
        part = tl.load(part_max + at, mask=kept, other=0.0)
        if out_top is not None:
            best = tl.where(part > highest, tl.load(part_top + at, mask=kept, other=0), best)
        highest = tl.maximum(highest, part)
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
                best = tl.where(ignored, -1, best)
        tl.store(out_nll + row, nll, mask=kept)
        tl.store(out_lse + row, lse, mask=kept)
        if out_top is not None:
            tl.store(out_top + row, best.to(tl.int64), mask=kept)
    else:
        smooth += weights * shift
        tl.store(out_target + row, at_target, mask=kept)
    tl.store(out_max + row, highest, mask=kept)
    tl.store(out_sum + row, total, mask=kept)
    if SMOOTH:
        tl.store(out_smooth + row, smooth, mask=kept)


def nothing(head: Head, kind: type[Sums]) -> Sums:
    """Stats or Partials with what rows not computed keep: zeros, and -1 for the likeliest class."""
    p, fields = head.problem, kind._fields[:-1]
    sizes = dict.fromkeys(fields, head.n) | {"smooth": head.n if p.smooth else 0}
    top = torch.full((head.n,), -1, device=p.hidden.device) if p.top and kind is Stats else None
    return kind(**{n: torch.zeros(s, dtype=head.dtype, device=p.hidden.device) for n, s in sizes.items()}, top=top)


class Parts(NamedTuple):
    """Sums of parts of the vocabulary (parts, N), under the names of the kernels' arguments; None where not wanted."""

    part_max: Tensor
    part_sum: Tensor
    part_target: Tensor
    part_smooth: Tensor | None
    part_weight: Tensor | None  # (parts,)
    part_top: Tensor | None


def make_parts(head: Head, count: int) -> Parts:
    """Memory for the sums of so many parts."""
    p, device = head.problem, head.problem.hidden.device
    new = lambda dtype: torch.empty(count, head.n, dtype=dtype, device=device)  # noqa: E731
    return Parts(
        *(new(head.dtype) for _ in range(3)),
        new(head.dtype) if p.smooth else None,
        # Zeros, as a count of 0 leaves them unwritten.
        torch.zeros(count, dtype=head.dtype, device=device) if p.smooth else None,
        new(torch.int32) if p.top else None,
    )


def join(head: Head, rows: Rows, parts: Parts, kind: type[Sums]) -> Sums:
    """Stats or Partials (N,) from the sums of the parts, added in their order."""
    out = nothing(head, kind)
    p, stats = head.problem, kind is Stats
    total = None
    if stats and p.smooth:
        weight = total_weight(p)
        total = (
            weight.to(head.dtype).reshape(1)
            if isinstance(weight, Tensor)
            else torch.full((1,), weight, dtype=head.dtype, device=p.hidden.device)
        )
    launch(
        p.hidden.device,
        _join,
        (cdiv(head.n, 128),),
        {"num_warps": 4},
        target=p.target.contiguous(),
        index=rows.index,
        state=rows.state,
        **parts._asdict(),
        total_weight=total,
        out_nll=getattr(out, "nll", None),
        out_lse=getattr(out, "lse", None),
        out_max=out.max,
        out_sum=out.sumexp,
        out_target=getattr(out, "target_logit", None),
        out_smooth=out.smooth if p.smooth else None,
        out_top=out.top,
        N=head.n,
        splits=len(parts.part_max),
        ignore_index=p.ignore_index if p.ignore_index is not None else 0,
        IGNORE=p.ignore_index is not None,
        SKIP=p.skip_ignored,
        SMOOTH=p.smooth,
        STATS=stats,
        ACC=head.args(rows)["ACC"],
        BLOCK=128,
    )
    return out
