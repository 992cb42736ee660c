# SPDX-License-Identifier: Apache-2.0
"""The backward through scratch memory: a piece of the logits' gradient at a time, and one product per output.

Pieces are spans of the vocabulary. The sum of d_weight runs over all rows within one piece, so it is made in registers
and rounded once; the sum of d_hidden runs over the pieces, in a fp32 buffer where the output is half precision. Where
that buffer is not affordable, d_hidden is made in a pass of its own over spans of rows, for one more product.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..spec import Grads, Needs, Stats
from .cost import Plan
from .filtering import Filter
from .head import Head, cdiv
from .join import join
from .products import into_hidden, into_weight
from .rows import Rows
from .stored import RELEASE_ROWS, hold, release
from .tiles import Scratch, make_scratch, write_gradient


def chunked(head: Head, rows: Rows, needs: Needs, plan: Plan, found: Filter | None = None) -> Grads:
    """Gradients through pieces of `plan.width` classes; a filter's dropped mass goes into `found`."""
    d_hidden, d_weight, d_bias = _outputs(head, needs)
    together = d_hidden is not None and not plan.height
    if d_hidden is not None and plan.height:
        _hidden_by_rows(head, rows, plan, found, d_hidden)
    if not (together or needs.weight or d_bias is not None):
        return Grads(d_hidden, None, None)
    s = make_scratch(head, head.n, plan.width, plan.blas, d_bias is not None, found)
    spans = [(v, min(v + plan.width, head.v)) for v in range(0, head.v, plan.width)]
    sums = _sums(head, d_hidden, len(spans)) if together else None
    for i, (start, stop) in enumerate(spans):
        write_gradient(head, rows, s, found, 0, start, stop)
        last = i == len(spans) - 1
        if together:
            assert d_hidden is not None and sums is not None
            into_hidden(head, rows, s, found, (0, start, stop), sums if i else None, d_hidden if last else sums, last)
        if d_weight is not None:
            into_weight(head, rows, s, found, start, stop, d_weight)
        _per_class(head, rows, s, found, start, stop, d_bias, rows_too=together or not needs.hidden)
    return Grads(d_hidden, d_weight, d_bias)


def stored(head: Head, rows: Rows, needs: Needs, plan: Plan) -> tuple[Stats, Grads]:
    """Stats and gradients with all tiles in scratch memory, so that each is computed once. Needs no cap, no filter."""
    # The sums of a tile take registers beside the tile.
    head = replace(head, config=replace(head.config, logits=head.config.heavy))
    d_hidden, d_weight, d_bias = _outputs(head, needs)
    s = make_scratch(head, head.n, plan.width, plan.blas, d_bias is not None, None, RELEASE_ROWS)
    parts = hold(head, rows, s)
    stats = join(head, rows, parts, Stats)
    release(head, rows, s, parts.part_max, stats.norm)
    if d_hidden is not None:
        into_hidden(head, rows, s, None, (0, 0, head.v), None, d_hidden, True)
    if d_weight is not None:
        into_weight(head, rows, s, None, 0, head.v, d_weight)
    _per_class(head, rows, s, None, 0, head.v, d_bias, rows_too=False)
    return stats, Grads(d_hidden, d_weight, d_bias)


def _hidden_by_rows(head: Head, rows: Rows, plan: Plan, found: Filter | None, d_hidden: Tensor) -> None:
    width = cdiv(head.v, head.config.logits.cols) * head.config.logits.cols
    s = make_scratch(head, plan.height, width, False, False, found)
    for place in range(0, head.n, plan.height):
        write_gradient(head, rows, s, found, place, 0, head.v)
        into_hidden(head, rows, s, found, (place, 0, head.v), None, d_hidden, True)
    if found is not None and s.lost_rows is not None:
        found.rows.add_(_scaled(s.lost_rows.sum(0), rows))


def _outputs(head: Head, needs: Needs) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    p = head.problem
    device, dtype = p.hidden.device, p.hidden.dtype
    return (
        # Rows that are not computed keep these zeros.
        torch.zeros(p.hidden.shape, dtype=dtype, device=device) if needs.hidden else None,
        torch.empty(p.weight.shape, dtype=dtype, device=device) if needs.weight else None,
        torch.empty(p.bias.shape, dtype=p.bias.dtype, device=device) if needs.bias and p.bias is not None else None,
    )


def _sums(head: Head, d_hidden: Tensor | None, pieces: int) -> Tensor | None:
    """Where d_hidden is summed over pieces: in itself where it has the dtype for that, or is complete after one."""
    if d_hidden is None or pieces == 1 or d_hidden.dtype == head.dtype:
        return d_hidden
    return torch.zeros(d_hidden.shape, dtype=head.dtype, device=d_hidden.device)


def _per_class(
    head: Head, rows: Rows, s: Scratch, found: Filter | None, start: int, stop: int, d_bias: Tensor | None,
    rows_too: bool,
) -> None:  # fmt: skip
    """d_bias and the filter's sums of classes [start, stop), from the sums over each block of rows."""
    width = stop - start
    at = None if found is None else found.order[start:stop].long()
    if d_bias is not None:
        assert s.bias is not None
        sums = _scaled(s.bias[:, :width].sum(0), rows).to(d_bias.dtype)
        if at is None:
            d_bias[start:stop].copy_(sums)
        else:
            d_bias.index_copy_(0, at, sums)
    if found is not None and at is not None:
        assert s.lost_rows is not None and s.lost_columns is not None
        found.columns.index_copy_(0, at, _scaled(s.lost_columns[:, :width].sum(0), rows))
        if rows_too:
            tiles = cdiv(width, head.config.logits.cols)
            found.rows.add_(_scaled(s.lost_rows[:tiles].sum(0), rows))


def _scaled(sums: Tensor, rows: Rows) -> Tensor:
    return sums if rows.unit is None else sums * rows.unit
