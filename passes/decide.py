# SPDX-License-Identifier: Apache-2.0
"""Decide: what may be rewritten, and what is worth it.

Legality comes first and needs nothing but the candidate. What it is worth is counted in bytes by `memory`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch.fx import Node

from .._torch import FakeTensor
from ..functional import DTYPES, makes_grads_in_forward
from .memory import D, N, V, bytes_needed, bytes_saved
from .policy import Policy
from .sharded import has_divided_classes, has_sharded_head, is_sharded, refusal
from .values import Candidate, Decline, LogitsView, LossSite, Reason, Result, example_size, same, value_of

_SMALLEST_VOCAB = 32


def decide(candidate: Candidate, policy: Policy, needed: Collection[Node] = ()) -> LossSite | Decline:
    """A site that may be rewritten, or the reason why not; `needed` are views that stay, whatever is rewritten."""
    view = candidate.view
    refused = _illegal(candidate)
    if refused is not None:
        return refused
    if example_size(view.classes) < least_classes(view, policy):
        return Decline(Reason.SMALL, candidate.anchor, f"{view.classes} classes, hidden size {view.hidden_size}")
    if candidate.result is not Result.LOSS and any(n in needed for n in view.path):
        return Decline(Reason.USED, candidate.anchor)
    needs = _needs(candidate, policy)
    saved, held = bytes_saved(candidate), bytes_needed(candidate, needs, policy)
    sizes = {N: row_count(view), V: view.classes, D: view.hidden_size}
    known = all(isinstance(size, int) for size in sizes.values())
    return LossSite(
        candidate, needs, saved, int(saved.subs(sizes)) if known else None, held, sizes[N] if known else None
    )


def least_classes(view: LogitsView, policy: Policy) -> int:
    """How many classes a head has at least that is worth it."""
    if policy.min_vocab is not None:
        return policy.min_vocab
    return max(example_size(view.hidden_size), _SMALLEST_VOCAB) + 1


def illegal_head(view: LogitsView) -> Decline | None:
    """Why a head cannot be computed by the kernels, or None."""
    if view.dtype not in DTYPES:
        return Decline(Reason.DTYPE, view.linear, str(view.dtype))
    for operand in view.operands:
        for node in operand.nodes:
            value = value_of(node)
            if isinstance(value, torch.Tensor) and not _is_dense(value) and not is_sharded(value):
                return Decline(Reason.SUBCLASS, node, type(value).__name__)
    return None


def _illegal(candidate: Candidate) -> Decline | None:
    view = candidate.view
    refused = illegal_head(view)
    if refused is not None:
        return refused
    misplaced = refusal(candidate) if has_sharded_head(view) else None
    if misplaced is not None:
        return Decline(Reason.SUBCLASS, view.linear, f"DTensor, {misplaced}")
    if candidate.result is not Result.LOSS:
        return None
    target, rows = value_of(candidate.target), view.row_shape
    # Sizes that are symbols may be equal without our knowing; the operator then checks them when it runs.
    if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in zip(target.shape, rows, strict=True)):
        return Decline(Reason.TARGET, candidate.anchor, f"targets {tuple(target.shape)} for rows {rows}")
    weight = candidate.class_weight
    if weight is not None and value_of(weight).dim() != 1:
        return Decline(Reason.OPTION, candidate.anchor, "class weights that are not one per class")
    if weight is not None and not same(value_of(weight).shape[0], view.classes):
        fixed = isinstance(view.classes, int) and isinstance(value_of(weight).shape[0], int)
        reason = Reason.OPTION if fixed else Reason.DYNAMIC
        return Decline(reason, candidate.anchor, "class weights that are not one per class")
    return None


def _is_dense(value: Any) -> bool:
    plain = type(value) in (torch.Tensor, torch.nn.Parameter, FakeTensor)
    return plain and value.layout == torch.strided and not value.is_quantized and not value.is_complex()


def row_count(view: LogitsView) -> Any:
    """N, an int or a SymInt."""
    total: Any = 1
    for size in view.row_shape:
        total = total * size
    return total


def _needs(candidate: Candidate, policy: Policy) -> tuple[bool, bool, bool] | None:
    view, anchor = candidate.view, value_of(candidate.anchor)
    if candidate.result is not Result.LOSS or not anchor.requires_grad:
        return None
    if not makes_grads_in_forward(policy.strategy, candidate.loss.reduction, view.dtype):
        return None
    if has_divided_classes(view):
        return None  # no process knows a row's sum over all classes while it has a tile at hand
    bias = view.bias is not None and view.bias.requires_grad
    found = (view.hidden.requires_grad, view.weight.requires_grad, bias)
    return found if any(found) else None
