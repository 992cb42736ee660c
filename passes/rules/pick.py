# SPDX-License-Identifier: Apache-2.0
"""Anchors that losses are written from by hand: one class picked from each row, and sums over the classes."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...functional import LossSpec, statistics_dtype
from ..canonical import CASTS, canonical
from ..registry import Call, Outcome, rule
from ..values import Candidate, Form, LogitsView, Reason, Result, same, value_of

_PICKED = {
    Form.LOGITS: Result.LOGIT,
    Form.SHIFTED: Result.LOGIT,
    Form.LOG_SOFTMAX: Result.LOG_PROB,
    Form.NEG_LOG_SOFTMAX: Result.LOG_PROB,
    Form.SOFTMAX: Result.PROB,
}

_LOGS = (Form.LOG_SOFTMAX, Form.NEG_LOG_SOFTMAX)


def _found(call: Call, view: LogitsView, result: Result, target: Node | None = None, **how: bool) -> Candidate:
    loss = LossSpec("none", ignore_index=-1, epilogue=view.epilogue)
    negated = Form.NEG_LOG_SOFTMAX in (view.form, view.picked_from)
    return Candidate(call.node, view.at(call.node), target, None, loss, result, negated=negated, **how)


def _is_class_dim(view: LogitsView, dim: Any) -> bool:
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return len(dims) == 1 and isinstance(dims[0], int) and dims[0] % len(view.shape) == view.class_dim


@rule("gather", "take_along_dim")
def gather(call: Call) -> Outcome:
    """x.gather(class dim, index) with one index a row; of take_along_dim(x, index, class dim) likewise."""
    view = call.view(forms=_PICKED)
    if view is None:
        return None
    first, second = call.arg(1, "dim"), call.arg(2, "index")
    if canonical(call.node) == "take_along_dim":
        first, second = call.arg(2, "dim"), call.arg(1, "indices")
    index = value_of(second)
    if not isinstance(second, Node) or not isinstance(index, torch.Tensor) or index.dtype != torch.int64:
        return call.decline(Reason.TARGET, "an index that is not an int64 tensor")
    facing = view.facing(first) if isinstance(first, int) else None
    if facing is None:
        return call.decline(Reason.CLASS_DIM, "gather over another dimension")
    view = facing
    wanted = [1 if d == view.class_dim else size for d, size in enumerate(view.shape)]
    fits = len(index.shape) == len(wanted) and same(index.shape[view.class_dim], 1)
    fewer = [d for d, size in enumerate(wanted) if fits and not same(index.shape[d], size)]
    if not fits or (fewer and (canonical(call.node) == "take_along_dim" or view.form is Form.SHIFTED)):
        return call.decline(Reason.TARGET, f"an index of shape {tuple(index.shape)}: not one class for each row")
    if fewer:
        view = view.first_rows(dict.fromkeys(fewer, second))
    return _found(call, view, _PICKED[view.form], second, keepdim=True)


def picked_by_index(call: Call, view: LogitsView, index: tuple[Any, ...]) -> Outcome:
    """x[arange(N), target] of x (N, V): the target of each row, for certain; None where it is something else."""
    if len(index) != 2 or len(view.shape) != 2 or view.class_dim != 1 or view.form not in _PICKED:
        return None
    rows, target = index
    value = value_of(target) if isinstance(target, Node) else None
    if not isinstance(value, torch.Tensor) or value.dtype != torch.int64 or value.dim() != 1:
        return None
    if not _counts_rows(rows, view.shape[0]) or not same(value.shape[0], view.shape[0]):
        return None
    return _found(call, view, _PICKED[view.form], target)


def _counts_rows(node: Any, rows: Any) -> bool:
    """Whether a node is arange(rows)."""
    if not isinstance(node, Node) or canonical(node) != "arange" or not same(value_of(node).shape[0], rows):
        return False
    bounds = [value_of(a) for a in node.args]
    if {"start", "end", "step"} & set(node.kwargs):
        return False
    return len(bounds) == 1 or (len(bounds) >= 2 and bounds[0] == 0 and (len(bounds) == 2 or bounds[2] == 1))


def one_hot_target(node: Any) -> Node | None:
    """The target of a one-hot tensor, seen through casts."""
    while isinstance(node, Node) and canonical(node) in CASTS:
        node = node.args[0]
    if not isinstance(node, Node) or canonical(node) != "one_hot":
        return None
    target = node.args[0] if node.args else node.kwargs.get("input", node.kwargs.get("self"))
    return target if isinstance(target, Node) else None


@rule("logsumexp")
def logsumexp(call: Call) -> Outcome:
    view = call.view(forms=(Form.LOGITS, Form.SHIFTED))
    if view is None:
        return None
    dim = call.arg(1, "dim")
    (dim,) = dim if isinstance(dim, (tuple, list)) and len(dim) == 1 else (dim,)
    facing = view.facing(dim) if isinstance(dim, int) else None
    if facing is None:
        return call.decline(Reason.CLASS_DIM, "logsumexp over another dimension")
    view = facing
    return _found(call, view, Result.LOG_SUM_EXP, keepdim=bool(call.arg(2, "keepdim", False)))


@rule("amax")
def amax(call: Call) -> Outcome:
    """The largest logit of each row, as hand-written softmaxes subtract it."""
    view = call.view(forms=(Form.LOGITS, Form.SHIFTED))
    if view is None:
        return None
    if not _is_class_dim(view, call.arg(1, "dim", ())):
        return call.decline(Reason.CLASS_DIM, "amax over another dimension")
    return _found(call, view, Result.MAX, keepdim=bool(call.arg(2, "keepdim", False)))


def max_values(call: Call) -> Outcome:
    """`x.max(dim)[0]` and `[1]`, which getitem of the pair is."""
    pair, which = call.arg(0, "self"), call.arg(1, "key")
    inner = Call(pair, call.values)
    view = inner.view(forms=(Form.LOGITS, Form.SHIFTED))
    if view is None or which not in (0, 1) or not _is_class_dim(view, inner.arg(1, "dim")):
        return None
    result = Result.TOP if which else Result.MAX
    return _found(call, view.at(pair), result, keepdim=bool(inner.arg(2, "keepdim", False)))


@rule("argmax")
def argmax(call: Call) -> Outcome:
    """The likeliest class of each row, which a softmax does not change."""
    view = call.view(forms=(Form.LOGITS, Form.SHIFTED, Form.LOG_SOFTMAX, Form.SOFTMAX))
    if view is None or not _is_class_dim(view, call.arg(1, "dim")):
        return None
    return _found(call, view, Result.TOP, keepdim=bool(call.arg(2, "keepdim", False)))


@rule("sum", "mean")
def total(call: Call) -> Outcome:
    """A sum over the classes of exp(z - shift), of log-softmax, or of what a one-hot has left; of the last also over all.
    Of logits a mean, over the classes or over all."""
    view = call.view(forms=(Form.EXP, Form.LOGITS, *_LOGS, Form.PICKED))
    if view is None or len(call.node.args) > 3:
        return None
    dtype = call.node.kwargs.get("dtype")
    if dtype is not None and (not dtype.is_floating_point or dtype.itemsize > statistics_dtype(view.dtype).itemsize):
        return call.decline(Reason.NO_RULE, f"a sum in {dtype}")
    name, dim, keepdim = canonical(call.node), call.arg(1, "dim"), bool(call.arg(2, "keepdim", False))
    if view.form is Form.LOGITS:
        every = dim in (None, (), []) or (
            isinstance(dim, (tuple, list)) and {d % len(view.shape) for d in dim} == set(range(len(view.shape)))
        )
        if name == "sum" or (keepdim and every) or not (every or _is_class_dim(view, dim)):
            return None
        return _found(call, view, Result.MEAN, keepdim=keepdim, total=every)
    if view.form is Form.PICKED and name == "sum" and dim in (None, (), []):
        return _found(call, view, _PICKED[view.picked_from], view.picked, total=True)
    if not _is_class_dim(view, dim):
        return None
    if view.form in _LOGS:
        return _found(call, view, Result.SUM_LOG if name == "sum" else Result.MEAN_LOG, keepdim=keepdim)
    if name == "mean":
        return call.decline(Reason.NO_RULE, "a mean over the classes")
    if view.form is Form.EXP:
        return _found(call, view, Result.SUM_EXP, keepdim=keepdim)
    return _found(call, view, _PICKED[view.picked_from], view.picked, keepdim=keepdim)
