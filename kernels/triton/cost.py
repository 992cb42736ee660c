# SPDX-License-Identifier: Apache-2.0
"""Which backward to run: a roofline model of each, in flops, bytes and launches.

Per strategy, for N rows, hidden size D, V classes, s bytes per input, and products of 2 N D V flops each:

    strategy      products                      memory traffic beyond reading weight        scratch memory
    recompute     (g + 1) per output            -                                           0
    chunked       1 + one per output            N V s written and read once per output      N width s (+ 4 N D)
      by rows     2 per output                  the same                                    the same, without 4 N D
    stored        one per output, lse included  the same, and once more read and written    N V s

where g = ceil(D / group) is how often `recompute` needs each tile, and 4 N D is the fp32 buffer of d_hidden. `recompute`
and `chunked` need lse beforehand; in `forward_backward` that costs one product more than `stored`.

No strategy adds into global memory with atomics or locks. By this model nothing would be gained: with tiles of 128 by
128 the locked additions of arXiv 2411.09009 move 4 D s bytes through the cache for 6 * 128 D flops, which takes longer
than the flops on every machine in `machines`, while `chunked` moves 3 s bytes per entry of the tile. So `deterministic`
has one implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..spec import Needs
from .head import Head, cdiv

LAUNCH = 4e-6  # seconds from one kernel to the next
DEFAULT_LEAST, DEFAULT_MOST = 16 << 20, 256 << 20


@dataclass(frozen=True)
class Plan:
    """How a backward is run."""

    strategy: str  # "recompute", "chunked" or "stored"
    width: int = 0  # classes to a piece
    height: int = 0  # rows to a piece, where d_hidden has a pass of its own; 0 is none
    blas: bool = False  # whether BLAS makes the products
    scratch: int = 0  # bytes held beyond the outputs
    seconds: float = 0.0  # by the model


def make_plan(
    head: Head, needs: Needs, strategy: str = "auto", with_stats: bool = False, products: str = "auto"
) -> Plan:
    """The fastest plan by the model within `Problem.workspace`.

    `strategy` is "auto", "recompute" or "chunked" (which includes "stored" where that is possible); `products` is "auto",
    "blas" or "triton". Raises ValueError for other names.
    """
    if strategy not in ("auto", "recompute", "chunked"):
        raise ValueError(f"strategy must be 'auto', 'recompute' or 'chunked', not {strategy!r}")
    if products not in ("auto", "blas", "triton"):
        raise ValueError(f"products must be 'auto', 'blas' or 'triton', not {products!r}")
    options = []
    if strategy != "chunked":
        options.append(recompute_plan(head, needs))
    if strategy != "recompute":
        blas = use_blas(head, products)
        options += chunked_plans(head, needs, blas, forced=strategy == "chunked", with_stats=with_stats)
    return min(options, key=lambda plan: plan.seconds)


def use_blas(head: Head, products: str) -> bool:
    """BLAS where neither a filter nor the scaling of fp16 needs our own products, and its fp32 output is at hand."""
    p = head.problem
    possible = (p.filter_eps is None and p.hidden.element_size() != 2) or str(p.hidden.dtype) == "torch.bfloat16"
    possible = possible and p.filter_eps is None
    return possible and (products == "blas" or (products == "auto" and head.machine.backend == "cuda"))


def scratch_limit(head: Head) -> int:
    """Bytes that a backward may hold beyond its outputs.

    By default an eighth of the logits' bytes, at least 16 MiB and at most 256 MiB, and the fp32 buffer of d_hidden.
    """
    if head.problem.workspace is not None:
        return head.problem.workspace
    return _default_limit(head.n, head.d, head.v, head.problem.hidden.element_size())


def _default_limit(n: Any, d: Any, v: Any, item: int, largest: Any = max, smallest: Any = min) -> Any:
    return _sums_bytes(n, d, item) + largest(DEFAULT_LEAST, smallest(DEFAULT_MOST, n * v * item // 8))


def default_scratch(n: Any, d: Any, v: Any, item: int, largest: Any = max, smallest: Any = min) -> Any:
    """What is held of the default `scratch_limit`: all logits, where they fit, in the dtype of the inputs.

    Sizes may be symbols, with the `largest` and `smallest` of two.
    """
    return smallest(n * v * item, _default_limit(n, d, v, item, largest, smallest))


def _sums_bytes(n: Any, d: Any, item: int) -> Any:
    return 4 * n * d if item == 2 else 0


def product_seconds(head: Head, count: float) -> float:
    """Time of `count` products of 2 N D V flops."""
    rate = head.machine.flops(head.problem.hidden.dtype, head.precision == "tf32")
    return count * 2.0 * head.n * head.d * head.v / rate


def traffic_seconds(head: Head, count: float) -> float:
    """Time to move `count` bytes."""
    return count / head.machine.memory_rate


def recompute_plan(head: Head, needs: Needs) -> Plan:
    f = head.config.fused
    groups = cdiv(head.d, f.group)
    each = [groups + 1] * (int(needs.hidden) + int(needs.weight))
    if needs.bias and not needs.weight:
        each.append(1)
    # With few rows, too few programs own a piece of d_hidden to fill the machine.
    busy = min(1.0, max(1, cdiv(head.n, f.own)) * groups / head.machine.processors)
    seconds = product_seconds(head, sum(each[1:]) if needs.hidden else sum(each))
    if needs.hidden:
        seconds += product_seconds(head, each[0]) / busy
    return Plan("recompute", seconds=seconds + LAUNCH * len(each))


def chunked_plans(head: Head, needs: Needs, blas: bool, forced: bool, with_stats: bool) -> list[Plan]:
    t, size = head.config.logits, head.problem.hidden.element_size()
    packed = head.packed_bytes if t.tma else 0  # held while tiles are written
    limit = scratch_limit(head) - packed
    outputs = int(needs.hidden) + int(needs.weight)
    entries = float(head.n) * head.v * size
    columns = cdiv(head.v, t.cols) * t.cols

    def widest(budget: int) -> int:
        """The most classes, in whole tiles, whose scratch memory fits."""
        return min(columns, budget // max(1, head.n * size) // t.cols * t.cols)

    plans = []
    if with_stats and head.problem.epilogue.softcap is None and head.problem.filter_eps is None:
        if head.n * columns * size <= limit + packed:
            seconds = product_seconds(head, outputs + 1) + traffic_seconds(head, entries * (outputs + 3))
            # lse comes out of the same product; the plans below are charged with one for it.
            plans.append(Plan("stored", columns, 0, blas, head.n * columns * size, seconds))
    lse = product_seconds(head, 1) if with_stats else 0.0
    sums = _sums_bytes(head.n, head.d, size) if needs.hidden else 0
    width = widest(limit)
    if width < columns:
        width = widest(limit - sums)
    if width >= t.cols or (forced and not sums):
        width = max(width, t.cols)
        pieces = cdiv(columns, width)
        adding = 8.0 * head.n * head.d * pieces if needs.hidden and pieces > 1 else 0.0
        seconds = lse + product_seconds(head, 1 + outputs) + traffic_seconds(head, entries * (1 + outputs) + adding)
        scratch = head.n * width * size + (sums if pieces > 1 else 0) + packed
        plans.append(Plan("chunked", width, 0, blas, scratch, seconds + 3 * LAUNCH * pieces))
    if needs.hidden and (not plans or plans[-1].strategy == "stored"):
        height = max(t.rows, limit // (columns * size) // t.rows * t.rows)
        width = max(t.cols, widest(limit))
        scratch = max(height * columns, head.n * width) * size + packed
        if scratch <= limit + packed or forced:
            pieces = cdiv(head.n, height) + cdiv(columns, width)
            seconds = lse + product_seconds(head, 2 * outputs) + traffic_seconds(head, entries * 2 * outputs)
            plans.append(Plan("chunked", width, height, blas, scratch, seconds + 2 * LAUNCH * pieces))
    return plans
