# SPDX-License-Identifier: Apache-2.0
"""Elementwise operations on logits: casts, scales, the softcap, a bias added afterwards, log-softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ...functional import statistics_dtype
from ..canonical import CASTS, canonical
from ..registry import WHOLE, Call, Outcome, is_constant, rule
from ..values import Form, LogitsView, Operand, Reason, constant, same, value_of
from .heads import low_rank
from .pick import one_hot_target

_SMALLEST = 1e-30  # factor of logits; float32 holds it and its inverse


@rule(*CASTS)
def cast(call: Call) -> Outcome:
    """A cast to a floating dtype on the same device is rounding; the kernel's statistics are float32 or better."""
    view, result, given = call.view(forms=(*WHOLE, Form.SHIFTED, Form.EXP)), call.result, call.value(0, "self")
    if view is None or not isinstance(result, torch.Tensor):
        return None
    if not result.dtype.is_floating_point or result.device != given.device:
        return call.decline(Reason.NO_RULE, f"a cast to {result.dtype} on {result.device}")
    return view.at(call.node)


@rule("contiguous")
def same_value(call: Call) -> Outcome:
    view = call.view()
    return view and view.at(call.node)


@rule("register_hook")
def register_hook(call: Call) -> Outcome:
    """Dynamo's form of `logits.register_hook(f)`; the method itself is found among the users of a path."""
    return call.decline(Reason.HOOK) if call.view() is not None else None


@rule("detach")
def detach(call: Call) -> Outcome:
    view = call.view()
    return view and detached(view).at(call.node)


def detached(view: LogitsView) -> LogitsView:
    """The view with no gradient to hidden, weight or bias."""
    bias = None if view.bias is None else view.bias.then("detach", torch.detach)
    return replace(
        view,
        hidden=view.hidden.then("detach", torch.detach),
        weight=view.weight.then("detach", torch.detach),
        bias=bias,
    )


def _scaled(call: Call, view: LogitsView, factor: float) -> Outcome:
    if view.form is not Form.LOGITS:
        return call.decline(Reason.NO_RULE, "probabilities are scaled before the loss")
    e = view.epilogue
    name = "scale" if e.softcap is None else "post_scale"
    product = getattr(e, name) * factor
    # One product of two factors is not their product in turn where one of those leaves float32's range.
    if not all(_SMALLEST < abs(number) < 1 / _SMALLEST for number in (factor, product)):
        return call.decline(Reason.OPTION, f"logits are scaled by {factor}")
    return view.at(call.node, epilogue=replace(e, **{name: product}))


@rule("mul")
def mul(call: Call) -> Outcome:
    for at in (0, 1):
        name = ("input", "other")[at]
        factor = constant(call.arg(1 - at, ("other", "input")[at]))
        view = call.view(at, name, forms=(*WHOLE, Form.SHIFTED))
        target = one_hot_target(factor)
        if view is not None and target is not None and view.class_dim == len(view.shape) - 1:
            if len(value_of(factor).shape) == len(view.shape) and all(map(same, value_of(factor).shape, view.shape)):
                return view.at(call.node, form=Form.PICKED, picked=target, picked_from=view.form)
        view = call.view(at, name)
        if view is not None and is_constant(factor):
            return _scaled(call, view, float(factor))
        if view is not None and _is_row_factor(view, factor):
            return _row_scaled(call, view, factor, torch.mul)
    return _no_rule(call, "logits are multiplied by a tensor with an entry for each class")


@rule("div")
def div(call: Call) -> Outcome:
    view, divisor = call.view(), constant(call.arg(1, "other"))
    if view is not None and is_constant(divisor) and divisor != 0 and call.node.kwargs.get("rounding_mode") is None:
        return _scaled(call, view, 1.0 / float(divisor))
    if view is not None and _is_row_factor(view, divisor) and call.node.kwargs.get("rounding_mode") is None:
        return _row_scaled(call, view, divisor, torch.div)
    return _no_rule(call, "logits are divided by a tensor with an entry for each class")


def _is_row_factor(view: LogitsView, other: Any) -> bool:
    """Whether a tensor has one number for each row, or one in all, and multiplies plain products; or a number that is a symbol."""
    value = value_of(other)
    plain = view.form is Form.LOGITS and view.epilogue.softcap is None
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return plain
    if not isinstance(other, Node) or not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point:
        return False
    plain = plain and view.bias is None
    from_right = len(view.shape) - view.class_dim
    fits = value.dim() <= len(view.shape) and (value.dim() < from_right or same(value.shape[-from_right], 1))
    return plain and fits and torch.promote_types(value.dtype, view.dtype) == view.dtype


def _row_scaled(call: Call, view: LogitsView, factor: Node, apply: Any) -> Outcome:
    """A factor for each row (a temperature, say) goes onto hidden: (h / t) W^T = (h W^T) / t."""
    if tuple(call.result.shape) != tuple(value_of(view.path[-1]).shape):
        return call.decline(Reason.NO_RULE, "logits are broadcast")
    if view.dtype.itemsize < 4:
        return call.decline(Reason.NO_RULE, "a scale in a tensor, in half precision: hidden would be rounded once more")
    bias = None if view.bias is None else view.bias.then(apply.__name__, apply, factor)
    return replace(view.rows(call.node, apply.__name__, apply, factor, class_dim=view.class_dim), bias=bias)


def _no_rule(call: Call, detail: str) -> Outcome:
    if call.view(0) is None and call.view(1, "other") is None:
        return None
    return call.decline(Reason.NO_RULE, detail)


@rule("neg")
def neg(call: Call) -> Outcome:
    """-logits is a scale; -log_softmax is what some label smoothing is written with."""
    view = call.view()
    if view is None:
        return None
    flipped = {Form.LOG_SOFTMAX: Form.NEG_LOG_SOFTMAX, Form.NEG_LOG_SOFTMAX: Form.LOG_SOFTMAX}
    if view.form in flipped:
        return view.at(call.node, form=flipped[view.form])
    return _scaled(call, view, -1.0)


@rule("tanh")
def tanh(call: Call) -> Outcome:
    """tanh(x) is a softcap at 1; the multiplication that follows it becomes the scale after the cap."""
    view = call.view()
    if view is None:
        return None
    if view.form is not Form.LOGITS or view.epilogue.softcap is not None:
        return call.decline(Reason.NO_RULE, "a second tanh")
    return view.at(call.node, epilogue=replace(view.epilogue, softcap=1.0))


@rule("add")
def add(call: Call) -> Outcome:
    """logits + bias, where the bias has one entry per class and comes before any scale or cap."""
    for at in (0, 1):
        view, other = call.view(at, ("input", "other")[at]), call.arg(1 - at, ("other", "input")[at])
        if view is None:
            continue
        if call.node.kwargs.get("alpha", 1) != 1:
            return call.decline(Reason.NO_RULE, "an addition with alpha")
        second = call.view(1 - at, ("other", "input")[at])
        if second is not None:
            return low_rank(call, view, second) or call.decline(Reason.NO_RULE, "two heads are added")
        if view.form is Form.LOGITS and view.epilogue.softcap is None and _is_class_bias(view, other):
            return view.at(call.node, bias=_with_bias(view, Operand(other).then("flatten", torch.flatten)))
        return call.decline(Reason.NO_RULE, "something other than a plain bias is added to the logits")
    return None


def _with_bias(view: LogitsView, added: Operand) -> Operand:
    """The bias after `added` is added to scaled logits: scale (x + b) + a = scale (x + b + a / scale)."""
    scale = view.epilogue.scale * view.epilogue.post_scale
    if scale != 1.0:
        added = added.then("to", _to, statistics_dtype(view.dtype)).then("div", torch.div, scale)
    return added if view.bias is None else added.then("add", torch.add, view.bias)


def _to(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype)


@rule("masked_fill")
def masked_fill(call: Call) -> Outcome:
    """logits.masked_fill(mask (V,), -inf), for classes that do not exist: a bias of -inf, which has no gradient either."""
    view, mask, value = call.view(), call.arg(1, "mask"), call.value(2, "value")
    if view is None:
        return None
    if isinstance(value, torch.Tensor) or value != -math.inf:
        return call.decline(Reason.NO_RULE, "logits are replaced by a finite value")
    if view.form is not Form.LOGITS or view.epilogue.softcap is not None or not _is_class_bias(view, mask, torch.bool):
        return call.decline(Reason.NO_RULE, "a mask that differs from row to row")
    dtype = view.dtype
    fill = Operand(mask).then("flatten", torch.flatten).then("mask_to_bias", _mask_to_bias, dtype)
    if view.epilogue.scale * view.epilogue.post_scale < 0:
        return call.decline(Reason.NO_RULE, "a mask after a negative scale")
    return view.at(call.node, bias=_with_bias(view, fill))


def _mask_to_bias(mask: Any, dtype: torch.dtype) -> Any:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _is_class_bias(view: LogitsView, other: Any, dtype: torch.dtype | None = None) -> bool:
    value = value_of(other)
    if not isinstance(other, Node) or not isinstance(value, torch.Tensor) or value.dtype != (dtype or view.dtype):
        return False
    # Aligned from the right, as broadcasting aligns: only the class dimension may be longer than one.
    from_right = len(view.shape) - view.class_dim
    shape = [1] * (len(view.shape) - value.dim()) + list(value.shape)
    if value.dim() > len(view.shape) or value.dim() < from_right:
        return False
    return all(same(size, view.classes if dim == view.class_dim else 1) for dim, size in enumerate(shape))


@rule("log_softmax")
def log_softmax(call: Call) -> Outcome:
    return _normalised(call, Form.LOG_SOFTMAX)


@rule("softmax")
def softmax(call: Call) -> Outcome:
    return _normalised(call, Form.SOFTMAX)


def _normalised(call: Call, form: Form) -> Outcome:
    """A shift of each row changes neither; a log-softmax is its own log-softmax."""
    view, dim = call.view(forms=(Form.LOGITS, Form.SHIFTED, Form.LOG_SOFTMAX)), call.arg(1, "dim")
    if view is None:
        return None
    facing = view.facing(dim) if isinstance(dim, int) else None
    if facing is None:
        return call.decline(Reason.CLASS_DIM, f"{canonical(call.node)} over dim {dim} of {len(view.shape)}")
    return facing.at(call.node, form=form, shift=None)


@rule("log")
def log(call: Call) -> Outcome:
    view = call.view(forms=(Form.SOFTMAX,))
    return view and view.at(call.node, form=Form.LOG_SOFTMAX)


@rule("exp")
def exp(call: Call) -> Outcome:
    view = call.view(forms=(Form.LOGITS, Form.SHIFTED, Form.LOG_SOFTMAX))
    if view is None:
        return None
    if view.shift is not None and value_of(view.shift).dtype.itemsize < 4:
        return call.decline(Reason.NO_RULE, "a shift in half precision: it is not rounded as the kernel's logits are")
    return view.at(call.node, form=Form.SOFTMAX if view.form is Form.LOG_SOFTMAX else Form.EXP)


@rule("sub")
def sub(call: Call) -> Outcome:
    """logits less one number a row: their largest, or their logsumexp."""
    view, shift = call.view(forms=(Form.LOGITS,)), call.arg(1, "other")
    if view is None:
        return _no_rule(call, "something is subtracted from logits, or they from it")
    value = value_of(shift)
    wanted = [1 if d == view.class_dim else size for d, size in enumerate(view.shape)]
    plain = isinstance(shift, Node) and isinstance(value, torch.Tensor) and call.node.kwargs.get("alpha", 1) == 1
    if not plain or len(value.shape) != len(wanted) or not all(map(same, value.shape, wanted)):
        return call.decline(
            Reason.NO_RULE, "something other than one number for each row is subtracted from the logits"
        )
    if torch.promote_types(value.dtype, value_of(view.path[-1]).dtype) != value_of(view.path[-1]).dtype:
        return call.decline(Reason.NO_RULE, f"{value.dtype} is subtracted from the logits")
    return view.at(call.node, form=Form.SHIFTED, shift=shift)
