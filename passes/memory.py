# SPDX-License-Identifier: Apache-2.0
"""How many bytes a loss takes as it was written and as it is rewritten: sympy expressions in N, D and V.

Under dynamic shapes N stays a symbol, and no guard is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sympy
import torch

from ..functional import default_workspace, statistics_dtype
from .sharded import processes
from .values import Candidate, Operand, value_of

if TYPE_CHECKING:
    from .decide import Policy

N, D, V = sympy.symbols("N D V", positive=True, integer=True)
# Sums, targets, coefficients and statistics of a row, in elements of the statistics' dtype, at the moment of the peak.
_PER_ROW = 10


def bytes_saved(candidate: Candidate) -> sympy.Expr:
    """Bytes that eager holds at its peak for this loss, and a rewritten program does not.

    Eager keeps the logits, their log-softmax for the backward, and then the gradient of each; casts on the way keep a
    copy more. A loss without gradient keeps the logits and their log-softmax.
    """
    item = candidate.view.dtype.itemsize
    loss_item = value_of(candidate.anchor).dtype.itemsize
    copies = item + loss_item + (loss_item if loss_item != item else 0)
    if value_of(candidate.anchor).requires_grad:
        copies += loss_item
    return N * V * copies / processes(candidate)


def bytes_needed(candidate: Candidate, needs: tuple[bool, bool, bool] | None, policy: Policy) -> sympy.Expr:
    """Bytes that a rewritten loss holds at its peak beyond the program's own: its gradients, its copies of what it reads,
    sums for each row, and the kernel's workspace.

    Gradients in another dtype than the program's are cast when the workspace is free again.
    """
    view = candidate.view
    item, exact = view.dtype.itemsize, statistics_dtype(view.dtype).itemsize
    sizes = [(view.hidden, N * D), (view.weight, V * D), *([] if view.bias is None else [(view.bias, V)])]
    wanted = [value_of(candidate.anchor).requires_grad and operand.requires_grad for operand, _ in sizes]
    gradients = sum(item * size for (_, size), want in zip(sizes, wanted, strict=True) if want)
    copies = sum(item * size for operand, size in sizes if _is_cast(operand, view.dtype))
    cast = sum(
        value_of(operand.node).dtype.itemsize * size
        for (operand, size), want in zip(sizes, wanted, strict=True)
        if want and _is_cast(operand, view.dtype)
    )
    if view.hidden.steps and not _is_cast(view.hidden, view.dtype):
        copies += item * N * D
    again = any(wanted) and needs is None
    at_work = gradients + copies + _workspace(candidate, again, policy) + _PER_ROW * exact * N
    return sympy.Max(at_work, gradients + cast) if cast else at_work


def _is_cast(operand: Operand, dtype: torch.dtype) -> bool:
    return value_of(operand.node).dtype != dtype


def _workspace(candidate: Candidate, again: bool, policy: Policy) -> sympy.Expr:
    """What the kernel takes of its workspace: never more than the logits of all rows and what they are made from.

    A backward that makes the logits `again` also adds up its gradients there, where they are rounded at the end.
    """
    view = candidate.view
    exact = statistics_dtype(view.dtype).itemsize
    size = policy.workspace
    if size is None:
        device = value_of(view.hidden.node).device
        size = default_workspace(N, D, V, view.dtype, device, largest=sympy.Max, smallest=sympy.Min)
    converted = 0 if view.dtype.itemsize == exact else (2 if again else 1) * exact * (N + V) * D
    return sympy.Min(size, exact * N * V + converted)


def largest_rows(needed: sympy.Expr, memory: int) -> int:
    """The largest N for which `needed`, an expression in N that grows with it, is at most `memory`; 0 where none is."""

    def fits(rows: int) -> bool:
        return bool(needed.subs(N, rows) <= memory)

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
