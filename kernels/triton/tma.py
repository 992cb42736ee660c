# SPDX-License-Identifier: Apache-2.0
"""Loading tiles through tensor descriptors, which the copy engine of Hopper and Blackwell (TMA) fills without threads.

A descriptor takes rows that follow each other at one stride, so the kept rows of hidden are packed first. The kernels
run as a persistent grid: a fixed number of programs, each of which makes its descriptors once and takes one tile after
another. Which tiles are loaded so stands in `machines`; no machine's are by default.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .head import Head
from .rows import Rows

_ARGS = (
    "weight", "bias", "class_weight", "column", "state", "V", "D", "stride_wv", "INNER", "OUTER", "CAPPED", "ACC",
    "OPERAND", "PRECISION",
)  # fmt: skip


def pack(head: Head, rows: Rows) -> Rows:
    """`rows` with their hidden states one after another; with hidden itself where all are kept and it may be described."""
    hidden = head.problem.hidden
    # What follows the kept rows is row 0 again and again: `select` leaves zeros there.
    return replace(rows, packed=hidden.index_select(0, rows.index) if head.packed_bytes else hidden)


def tma_args(head: Head, rows: Rows) -> dict[str, Any]:
    """Arguments that every kernel with tensor descriptors takes, for rows that `pack` gave."""
    assert rows.packed is not None
    args = head.args(rows)
    return {name: args[name] for name in _ARGS} | {"packed": rows.packed, "stride_pn": rows.packed.stride(0)}
