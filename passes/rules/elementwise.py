"""Elementwise operations on logits: casts, scales, the softcap, a bias added afterwards, log-softmax."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..registry import Call, Outcome, is_constant, rule
from ..values import LogitsView, Operand, Reason, value_of


@rule("float", "double", "half", "bfloat16", "to", "type", "type_as")
def cast(call: Call) -> Outcome:
    """A cast to a floating dtype on the same device is rounding; the kernel's statistics are float32 or better."""
    view, result, given = call.view(), call.result, call.value(0, "self")
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
    if view.log:
        return call.decline(Reason.NO_RULE, "log-probabilities are scaled before the loss")
    if factor == 0 or not math.isfinite(factor):
        return call.decline(Reason.OPTION, f"logits are scaled by {factor}")
    e = view.epilogue
    if e.softcap is None:
        return view.at(call.node, epilogue=replace(e, scale=e.scale * factor))
    return view.at(call.node, epilogue=replace(e, post_scale=e.post_scale * factor))


@rule("mul")
def mul(call: Call) -> Outcome:
    for at in (0, 1):
        view, factor = call.view(at, ("input", "other")[at]), call.arg(1 - at, ("other", "input")[at])
        if view is not None and is_constant(factor):
            return _scaled(call, view, float(factor))
    return _no_rule(call, "logits are multiplied by a tensor")


@rule("div")
def div(call: Call) -> Outcome:
    view, divisor = call.view(), call.arg(1, "other")
    if view is not None and is_constant(divisor) and divisor != 0 and call.node.kwargs.get("rounding_mode") is None:
        return _scaled(call, view, 1.0 / float(divisor))
    return _no_rule(call, "logits are divided by a tensor")


def _no_rule(call: Call, detail: str) -> Outcome:
    if call.view(0) is None and call.view(1, "other") is None:
        return None
    return call.decline(Reason.NO_RULE, detail)


@rule("tanh")
def tanh(call: Call) -> Outcome:
    """tanh(x) is a softcap at 1; the multiplication that follows it becomes the scale after the cap."""
    view = call.view()
    if view is None:
        return None
    if view.log or view.epilogue.softcap is not None:
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
        plain = view.epilogue.scale == 1.0 and view.epilogue.softcap is None and view.bias is None and not view.log
        if plain and _is_class_bias(view, other):
            return view.at(call.node, bias=Operand(other).then("flatten", torch.flatten))
        return call.decline(Reason.NO_RULE, "something other than a plain bias is added to the logits")
    return None


def _is_class_bias(view: LogitsView, other: Any) -> bool:
    value = value_of(other)
    if not isinstance(other, Node) or not isinstance(value, torch.Tensor) or value.dtype != view.dtype:
        return False
    # Aligned from the right, as broadcasting aligns: only the class dimension may be longer than one.
    from_right = len(view.shape) - view.class_dim
    shape = [1] * (len(view.shape) - value.dim()) + list(value.shape)
    if value.dim() > len(view.shape) or value.dim() < from_right:
        return False
    return all(size == (view.classes if dim == view.class_dim else 1) for dim, size in enumerate(shape))


@rule("log_softmax")
def log_softmax(call: Call) -> Outcome:
    view, dim = call.view(), call.arg(1, "dim")
    if view is None:
        return None
    if not isinstance(dim, int) or dim % len(view.shape) != view.class_dim:
        return call.decline(Reason.CLASS_DIM, f"log_softmax over dim {dim} of {len(view.shape)}")
    return view.at(call.node, log=True)
