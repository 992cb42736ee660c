# SPDX-License-Identifier: Apache-2.0
"""Reductions over everything, as one over each row and one over the rows: the first is the row program's, the second stays."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from ...functional import statistics_dtype
from ..canonical import canonical

_LOSSES = {
    getattr(F, name): name
    for name in (
        "cross_entropy", "nll_loss", "kl_div", "mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy",
        "binary_cross_entropy_with_logits", "poisson_nll_loss", "soft_margin_loss", "multi_margin_loss",
        "multilabel_margin_loss", "multilabel_soft_margin_loss",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """What a node computes, in two."""

    by_row: Callable[..., Any]  # of the node's arguments; keeps rows, and may keep more
    reduction: str  # "sum", "mean", "batchmean" or "weighted", over what `by_row` leaves
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any = None  # of "weighted": class indices, the class weights or None, and the index that is ignored
    weight: Any = None
    ignore_index: int = -100

    def tail(self, rows: Any, batch: Any, dtype: torch.dtype, proxy: Callable[[Any], Any]) -> Any:
        """The node's value, of the rows' values (`batch`, ...): tensors or proxies."""
        if self.reduction == "mean":
            return rows.mean().to(dtype)
        if self.reduction == "sum":
            return rows.sum().to(dtype)
        if self.reduction == "batchmean":
            return (rows.sum() / batch).to(dtype)
        target = proxy(self.target)
        counted = target != self.ignore_index
        if self.weight is None:
            count = counted.sum()
        else:
            weights = proxy(self.weight)[torch.where(counted, target, 0)]
            count = torch.where(counted, weights, 0).sum()
        return (rows / count).sum().to(dtype)  # so that a mean over no row gives none of them a gradient


def split_of(node: Node, value_of: Callable[[Any], Any]) -> Split | None:
    """A node in two; None where it is no such reduction."""
    name = canonical(node)
    if name in ("sum", "mean"):
        return _sum(node, str(name))
    if node.op != "call_function" or node.target not in _LOSSES:
        return None
    bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    given = bound.arguments
    reduction = given.get("reduction", "mean")
    if given.get("size_average") is not None or given.get("reduce") is not None:
        return None
    if reduction not in ("sum", "mean", "batchmean"):
        return None
    given["reduction"] = "none"
    split = Split(node.target, reduction, bound.args, bound.kwargs)  # type: ignore[arg-type]
    target = value_of(given.get("target"))
    indices = isinstance(target, Tensor) and not target.is_floating_point()
    if reduction == "mean" and _LOSSES[node.target] in ("cross_entropy", "nll_loss") and indices:
        ignored = given.get("ignore_index", -100)
        return Split(
            _without_ignored(node.target, ignored),
            "weighted",
            split.args,
            split.kwargs,
            given["target"],
            given.get("weight"),
            ignored,
        )
    return split


def _without_ignored(loss: Any, ignored: int) -> Callable[..., Tensor]:
    """A loss of each row that is zero with its gradient where the target is ignored, whatever a mean over none of them divides by."""

    def by_row(input: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return loss(input, target, *args, **kwargs).masked_fill(target == ignored, 0)  # type: ignore[no-any-return]

    return by_row


def _sum(node: Node, name: str) -> Split | None:
    if len(node.args) != 1 or set(node.kwargs) - {"input", "dtype"}:
        return None

    def same(x: Tensor) -> Tensor:
        return x if node.kwargs.get("dtype") is None else x.to(node.kwargs["dtype"])  # type: ignore[arg-type]

    return Split(same, name, node.args, {})


def reduced(rows: Tensor, over: list[int], reduction: str) -> Tensor:
    """What is left of each row before the rows are reduced: sums and means in the dtype that their sum is made in."""
    exact = statistics_dtype(rows.dtype) if rows.is_floating_point() else None
    rows = rows if exact is None else rows.to(exact)
    if reduction == "mean" and over:
        return rows.mean(over)
    return rows.sum(over) if over else rows
