# SPDX-License-Identifier: Apache-2.0
"""Anchors: the calls that turn logits and targets into a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..._torch import OpOverload
from ...functional import LossSpec
from ..registry import Call, Outcome, rule
from ..values import Candidate, Form, LogitsView, Reason, constant, value_of

_REDUCTIONS = {0: "none", 1: "mean", 2: "sum", "none": "none", "mean": "mean", "sum": "sum"}


def _legacy_reduction(size_average: Any, reduce: Any) -> str:
    """torch's deprecated pair of arguments."""
    if reduce is False:
        return "none"
    return "sum" if size_average is False else "mean"


@rule("cross_entropy")
def cross_entropy(call: Call) -> Outcome:
    """F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing), or
    aten.cross_entropy_loss(self, target, weight, reduction, ignore_index, label_smoothing)."""
    # A shift of each row and a log-softmax are both undone by the log-softmax in the loss.
    view = call.view(forms=(Form.LOGITS, Form.SHIFTED, Form.LOG_SOFTMAX))
    if view is None:
        return None
    if isinstance(call.node.target, OpOverload):
        options = [(3, "reduction", 1), (4, "ignore_index", -100), (5, "label_smoothing", 0.0)]
        return _loss(call, view, *(call.arg(*o) for o in options))
    options = [(6, "reduction", "mean"), (4, "ignore_index", -100), (7, "label_smoothing", 0.0)]
    reduction, ignore_index, smoothing = (call.arg(*o) for o in options)
    return _loss(call, view, _reduction(call, reduction), ignore_index, smoothing)


@rule("nll_loss")
def nll_loss(call: Call) -> Outcome:
    """F.nll_loss(log_softmax(logits), target, weight, size_average, ignore_index, reduce, reduction), or aten's."""
    view = call.view()
    if view is None:
        return None
    if view.form is not Form.LOG_SOFTMAX:
        return call.decline(Reason.NO_RULE, "nll_loss of logits that were not normalised")
    if isinstance(call.node.target, OpOverload):
        return _loss(call, view, call.arg(3, "reduction", 1), call.arg(4, "ignore_index", -100), 0.0)
    reduction, ignore_index = call.arg(6, "reduction", "mean"), call.arg(4, "ignore_index", -100)
    return _loss(call, view, _reduction(call, reduction), ignore_index, 0.0)


def nll_of_pair(call: Call) -> Outcome:
    """The loss of aten.nll_loss_forward(self, target, weight, reduction, ignore_index), which also returns a weight."""
    pair, which = call.arg(0, "self"), call.arg(1, "key")
    inner = Call(pair, call.values)
    view = inner.view(forms=(Form.LOG_SOFTMAX,))
    if view is None or which != 0:
        return None
    if any(u is not call.node and u.users for u in pair.users):
        return call.decline(Reason.NO_RULE, "the total weight of nll_loss_forward is used")
    found = _loss(inner, view.at(pair), inner.arg(3, "reduction", 1), inner.arg(4, "ignore_index", -100), 0.0)
    if not isinstance(found, Candidate):
        return found
    return replace(found, anchor=call.node, view=found.view.at(call.node))


def _reduction(call: Call, reduction: Any) -> Any:
    size_average, reduce = call.arg(3, "size_average"), call.arg(5, "reduce")
    if size_average is None and reduce is None:
        return reduction
    return _legacy_reduction(size_average, reduce)


def _loss(call: Call, view: LogitsView, reduction: Any, ignore_index: Any, smoothing: Any) -> Outcome:
    target, class_weight = call.arg(1, "target"), call.arg(2, "weight")
    ignore_index, smoothing = constant(ignore_index), constant(smoothing)
    if reduction not in _REDUCTIONS or not isinstance(ignore_index, int) or not isinstance(smoothing, (int, float)):
        return call.decline(Reason.OPTION, f"reduction {reduction}, ignore_index {ignore_index}, smoothing {smoothing}")
    if not 0 <= smoothing <= 1:
        return call.decline(Reason.OPTION, f"label_smoothing {smoothing}")
    rank = len(view.shape)
    facing = view.facing(min(1, rank - 1))
    if facing is None:
        return call.decline(Reason.CLASS_DIM, f"the vocabulary is dim {view.class_dim} of {rank}")
    view = facing
    refused = _target_refusal(call, view, target)
    if refused is not None:
        return refused
    if class_weight is not None and value_of(class_weight).requires_grad:
        return call.decline(Reason.CLASS_WEIGHT_GRAD)
    loss = LossSpec(_REDUCTIONS[reduction], ignore_index, float(smoothing), view.epilogue)  # type: ignore[arg-type]
    return Candidate(call.node, view.at(call.node), target, class_weight, loss)


def _target_refusal(call: Call, view: LogitsView, target: Any) -> Outcome:
    value = value_of(target)
    if not isinstance(target, Node) or not isinstance(value, torch.Tensor):
        return call.decline(Reason.TARGET, "the target is not a tensor")
    if value.dtype.is_floating_point:
        return call.decline(Reason.PROBABILITIES)
    if value.dtype != torch.int64 or value.dim() != len(view.row_shape):
        return call.decline(Reason.TARGET, f"{value.dtype} of {value.dim()} dimensions")
    return None
