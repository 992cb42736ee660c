# SPDX-License-Identifier: Apache-2.0
"""How many bytes, and products, a loss takes as it was written and as it is rewritten: sympy expressions in N, D and V.

Of a head of DTensors, N and V are those of all processes and bytes those of one. Under dynamic shapes N stays a symbol, and no guard is added.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch

from ..functional import HELD, Sizes, rows_wanted, statistics_dtype, workspace
from .policy import Policy
from .sharded import division, has_divided_classes
from .values import Candidate, Operand, value_of

N, D, V = sympy.symbols("N D V", positive=True, integer=True)
# Sums, targets, coefficients and statistics of a row, in elements of the statistics' dtype, at the moment of the peak.
_PER_ROW = 10
# Numbers of a row that a process of a divided vocabulary sends, and gets from each.
_SENT = 3


def products_of(differentiable: bool, early: bool) -> int:
    """How many times the logits' product, 2NDV operations, a loss takes; `early` where gradients are made in the forward."""
    return 1 if not differentiable else 3 if early else 4


def bytes_saved(candidate: Candidate) -> sympy.Expr:
    """Bytes that eager holds at its peak for this loss, and a rewritten program does not, all in the loss's dtype.

    With a gradient that is the backward's: the log-softmax that was kept for it, and the gradient of each of log-softmax and
    logits. Torch's loss on divided classes (`loss_parallel`) makes one tensor more. Without, it is the logits and their
    log-softmax. Logits in another dtype are gone by then, unless the program itself keeps them.
    """
    value, copies = value_of(candidate.anchor), 2
    if value.requires_grad:
        copies = 3 + has_divided_classes(candidate.view)
    return _of_one_process(N * V * copies * value.dtype.itemsize, division(candidate.view))


def bytes_of_blocks(each: sympy.Expr | int, count: sympy.Expr, policy: Policy) -> sympy.Expr:
    """Bytes that a row program of `count` rows holds for a block, with `each` bytes of logits a row; its gradients are not counted."""
    return HELD * each * rows_wanted(count, each, policy.workspace, sympy.Min, sympy.Max)


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
    at_work = gradients + copies + _workspace(candidate, again, wanted, policy) + _PER_ROW * exact * N
    rows, classes = division(view)
    if classes > 1:
        at_work += _SENT * (classes + 1) * exact * N
    # A sum over processes is a tensor beside its parts: of d_hidden over the classes' processes, of d_weight over the rows'.
    summed = [item * N * D] * (classes > 1 and wanted[0]) + [item * V * D] * (rows > 1 and wanted[1])
    later = [gradients + more for more in ([cast] * bool(cast) + summed)]
    return _of_one_process(sympy.Max(at_work, *later), (rows, classes))


def _of_one_process(bytes: sympy.Expr, divided: tuple[int, int]) -> sympy.Expr:
    rows, classes = divided
    return bytes if divided == (1, 1) else bytes.subs({N: N / rows, V: V / classes}, simultaneous=True)


def _is_cast(operand: Operand, dtype: torch.dtype) -> bool:
    return value_of(operand.node).dtype != dtype


def _workspace(candidate: Candidate, again: bool, grads: list[bool], policy: Policy) -> sympy.Expr:
    """What the kernel takes of its workspace."""
    view, smooth = candidate.view, candidate.loss.label_smoothing > 0
    device = value_of(view.hidden.node).device
    flags = (view.epilogue.softcap is not None, smooth, smooth, *grads, *[False] * (3 - len(grads)), again)
    options = sum(flag << bit for bit, flag in enumerate(flags))
    where = _DEVICES.index(device.type) if device.type in _DEVICES else len(_DEVICES)
    return _Workspace(N, D, V, _DTYPES.index(view.dtype), where, options, policy.workspace or 0)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_DEVICES = ("cpu", "cuda")  # and others, which are alike


class _Workspace(sympy.Function):
    """Bytes that a loss of N rows, a hidden size D and V classes takes of the workspace, as its kernel plans it.

    The other arguments: the numbers of the dtype in `_DTYPES` and of the kind of device in `_DEVICES`; flags, bit by bit,
    those of `Sizes` and whether the logits are made again for gradients; and the bytes that the user allows, or 0.
    """

    @classmethod
    def eval(cls, *arguments: sympy.Expr) -> sympy.Expr | None:
        if not all(a.is_number for a in arguments):
            return None
        rows, width, classes, dtype, device, options, allowed = (int(sympy.ceiling(a)) for a in arguments)
        *flags, again = (bool(options >> bit & 1) for bit in range(7))
        sizes = Sizes(_DTYPES[dtype], rows, classes, width, *flags, allowed or None)
        return sympy.Integer(workspace(sizes, torch.device((*_DEVICES, "meta")[device]), again))


_Workspace.__name__ = "Workspace"  # as expressions show it
# The names in expressions that are read again.
NAMES: dict[str, Any] = {"N": N, "D": D, "V": V, "Workspace": _Workspace}


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
