# SPDX-License-Identifier: Apache-2.0
"""The torch.library operators `cce::*`: schema, device dispatch, fake, autograd and autocast.

Two differentiable operators stand for a language-model head with its loss:

`cce::linear_cross_entropy`
    per-token statistics (nll, lse, smooth). Saves hidden, weight and two numbers a row; the backward recomputes the
    logits tile by tile (8NDV flop in all). Right for every use of the statistics.
`cce::linear_cross_entropy_with_grads`
    a weighted sum of those statistics, whose weights are known beforehand. The gradients are made in the forward, while
    each tile of logits is at hand, and the backward only scales them (6NDV flop). Right for scalar training losses.

Everything else (reductions, class weights, label smoothing, z-loss) is ordinary arithmetic on N-sized tensors around
them: see `cce_fx.functional`. Source: Cut Cross-Entropy, arXiv 2411.09009; the maths is in `kernels/spec.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ._torch import (
    DispatchKey,
    DispatchKeySet,
    ExcludeDispatchKeyGuard,
    OpOverload,
    disable_dynamo,
    dispatch_key_for_device,
    profiler_enabled,
)
from ._torch import check as check_condition
from .kernels.choose import choose
from .kernels.combine import statistics_dtype
from .kernels.spec import Epilogue, Grads, Needs, Norm, Problem, RowGrads, Stats

# The arguments that describe the head, in the order of every operator's schema.
HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, int? ignore_index, "
    "bool skip_ignored, bool smooth, float scale, float? softcap, float post_scale, bool autocast, int? workspace, "
    "float? filter_eps, bool tune, bool top"
)
HEAD_ARGS = HEAD.count(",") + 1
LIBRARY = torch.library.Library("cce", "FRAGMENT")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_NO_RANGE = contextlib.nullcontext()


def _range(what: str, problem: Problem) -> AbstractContextManager[Any]:
    """A range in profiles around a kernel, with its sizes: `cce_fx::forward` N=... D=... V=... Nothing where no profiler runs."""
    if not profiler_enabled():
        return _NO_RANGE
    (rows, width), classes = problem.hidden.shape, problem.weight.shape[0]
    return torch.profiler.record_function(f"cce_fx::{what}", f"N={rows} D={width} V={classes}")


def problem_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    ignore_index: int | None,
    skip_ignored: bool,
    smooth: bool,
    scale: float,
    softcap: float | None,
    post_scale: float,
    autocast: bool,
    workspace: int | None,
    filter_eps: float | None,
    tune: bool,
    top: bool,
) -> Problem:
    return Problem(
        hidden=hidden,
        weight=weight,
        bias=bias,
        target=target,
        epilogue=Epilogue(scale, softcap, post_scale),
        ignore_index=ignore_index,
        skip_ignored=skip_ignored,
        smooth=smooth,
        class_weight=class_weight,
        workspace=workspace,
        filter_eps=filter_eps,
        tune=tune,
        top=top,
    )


def check(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None) -> None:
    """Raise on what no kernel accepts; shapes may be symbolic."""
    if hidden.dim() != 2 or weight.dim() != 2 or target.dim() != 1:
        raise ValueError(
            "cce::linear_cross_entropy takes hidden (N, D), weight (V, D) and target (N,), not "
            f"{tuple(hidden.shape)}, {tuple(weight.shape)} and {tuple(target.shape)}"
        )
    for name, t in (("weight", weight), ("bias", bias), ("target", target), ("class_weight", class_weight)):
        if t is not None and t.device != hidden.device:
            raise RuntimeError(f"hidden is on {hidden.device} and {name} on {t.device}; they must be on one device")
    _check_equal(hidden.shape[1], weight.shape[1], "hidden size {} is not {}")
    _check_equal(hidden.shape[0], target.shape[0], "{} rows, {} targets")
    exact = statistics_dtype(hidden.dtype)
    if hidden.dtype != weight.dtype or hidden.dtype not in DTYPES:
        raise TypeError(f"hidden and weight must share one floating dtype, not {hidden.dtype} and {weight.dtype}")
    if bias is not None and bias.dtype not in (hidden.dtype, exact):
        raise TypeError(f"bias must have the dtype of hidden or {exact}, not {bias.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64 class indices, not {target.dtype}")
    for name, t in (("bias", bias), ("class_weight", class_weight)):
        if t is not None:
            _check_per_class(name, t, weight)


def _check_per_class(name: str, values: Tensor, weight: Tensor) -> None:
    if values.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, not {tuple(values.shape)}")
    _check_equal(values.shape[0], weight.shape[0], f"{name} has {{}} entries for {{}} classes")


def _check_equal(a: Any, b: Any, text: str) -> None:
    """Raise RuntimeError where two sizes differ. Torch's own check alone takes longer than all else here."""
    if type(a) is not int or type(b) is not int or a != b:
        check_condition(a == b, lambda: text.format(a, b))


def some(grads: Grads, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Operators return tensors: an unwanted gradient is an empty one."""
    h, w, b = (hidden.new_empty(0) if g is None else g for g in grads)
    return h, w, b


def _top(stats: Stats, hidden: Tensor) -> Tensor:
    return hidden.new_empty(0, dtype=torch.int64) if stats.top is None else stats.top


def _fake_stats(hidden: Tensor, smooth: bool, top: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, dtype = hidden.shape[0], statistics_dtype(hidden.dtype)
    nll, lse = (hidden.new_empty(rows, dtype=dtype) for _ in range(2))
    best = hidden.new_empty(rows if top else 0, dtype=torch.int64)
    return nll, lse, hidden.new_empty(rows if smooth else 0, dtype=dtype), best


def fake_grads(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, need_hidden: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        bias.new_empty(bias.shape) if need_bias and bias is not None else hidden.new_empty(0),
    )


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> OpOverload:
    """Define cce::`name` and return it.

    What `torch.library.custom_op` does, less its look at every result's memory in every call: no kernel returns an input or
    one piece of memory twice, which the tests ask `torch.library.opcheck`.
    """
    LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, disable_dynamo(kernel), "CompositeExplicitAutograd")
    torch.library.register_fake(f"cce::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.cce, name).default


# --- per-token statistics -------------------------------------------------------------------------------------------


def _stats(hidden, weight, bias, target, class_weight, *rest):  # type: ignore[no-untyped-def]
    """Per-token statistics of hidden (N, D) @ weight.T (D, V): nll (N,), lse (N,), smooth (N,) or (0,), and of what
    the backward needs: max (N,), the largest logit, and sumexp (N,) relative to it, both without a gradient. Then
    top (N,) int64 or (0,), the class of the largest logit, -1 for a row that is not computed.

    dtypes: float32 (float64 for float64 inputs). Raises ValueError on shapes, TypeError on dtypes, IndexError on a
    target outside [0, V) that is not ignore_index.
    """
    check(hidden, weight, bias, target, class_weight)
    problem = problem_of(hidden, weight, bias, target, class_weight, *rest)
    with _range("forward", problem):
        stats = choose(problem).forward(problem)
    return (*stats[:5], _top(stats, hidden))


def _stats_fake(hidden, weight, bias, target, class_weight, *rest):  # type: ignore[no-untyped-def]
    check(hidden, weight, bias, target, class_weight)
    nll, lse, smooth, top = _fake_stats(hidden, rest[2], rest[-1])
    return nll, lse, smooth, torch.empty_like(nll), torch.empty_like(nll), top


linear_cross_entropy: OpOverload = define(
    "linear_cross_entropy",
    f"({HEAD}) -> (Tensor nll, Tensor lse, Tensor smooth, Tensor max, Tensor sumexp, Tensor top)",
    _stats,
    _stats_fake,
)


def _stats_grads(*args):  # type: ignore[no-untyped-def]
    """Gradients of `cce::linear_cross_entropy`; one that is not needed comes back empty."""
    problem = problem_of(*args[:HEAD_ARGS])
    highest, sumexp, grad_nll, grad_lse, grad_smooth, *needs = args[HEAD_ARGS:]
    rows = RowGrads(torch.zeros_like(highest) if grad_nll is None else grad_nll, grad_lse, grad_smooth)
    with _range("backward", problem):
        grads = choose(problem).backward(problem, Norm(highest, sumexp), rows, Needs(*needs))
    return some(grads, problem.hidden)


def _stats_grads_fake(*args):  # type: ignore[no-untyped-def]
    return fake_grads(*args[:3], *args[-3:])


linear_cross_entropy_backward: OpOverload = define(
    "linear_cross_entropy_backward",
    f"({HEAD}, Tensor max, Tensor sumexp, Tensor? grad_nll, Tensor? grad_lse, Tensor? grad_smooth, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    _stats_grads,
    _stats_grads_fake,
)


_TWICE = (
    "the gradients of cut cross-entropy cannot be differentiated twice. Compute the loss without cce_fx where you need a "
    "second derivative."
)


def _differentiated_twice(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(_TWICE)


torch.library.register_autograd(linear_cross_entropy_backward, _differentiated_twice, lib=LIBRARY)


def _stats_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, target, class_weight, *ctx.rest = inputs
    ctx.save_for_backward(hidden, weight, bias, target, class_weight, *output[3:5])
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _stats_backward(
    ctx: Any, grad_nll: Tensor | None, grad_lse: Tensor | None, grad_smooth: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, target, class_weight, *norm = ctx.saved_tensors
    needs = tuple(bool(n) for n in ctx.needs_input_grad[:3])
    if not ctx.rest[2]:
        grad_smooth = None
    grads = linear_cross_entropy_backward(
        hidden, weight, bias, target, class_weight, *ctx.rest, *norm, grad_nll, grad_lse, grad_smooth, *needs
    )
    return _wanted(grads, needs) + (None,) * (HEAD_ARGS - 3)


def _wanted(grads: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


torch.library.register_autograd(linear_cross_entropy, _stats_backward, setup_context=_stats_setup, lib=LIBRARY)


# --- weighted sum with gradients in the forward -----------------------------------------------------------------------


def _sum(hidden, weight, bias, target, class_weight, *rest):  # type: ignore[no-untyped-def]
    """total = sum(weight_nll * nll) + sum(weight_lse * lse) + sum(weight_smooth * smooth), and its gradients.

    The row weights are (N,) in the statistics' dtype and constants: no gradient flows into them. Only `total` () is
    differentiable; differentiating twice raises. Statistics and `top` as of `cce::linear_cross_entropy`.
    """
    check(hidden, weight, bias, target, class_weight)
    head, (w_nll, w_lse, w_smooth, *needs) = rest[: HEAD_ARGS - 5], rest[HEAD_ARGS - 5 :]
    problem = problem_of(hidden, weight, bias, target, class_weight, *head)
    weights = RowGrads(w_nll, w_lse, w_smooth)
    with _range("forward_backward", problem):
        stats, grads = choose(problem).forward_backward(problem, weights, Needs(*needs))
    total = torch.dot(w_nll, stats.nll)
    for given, values in ((w_lse, stats.lse), (w_smooth, stats.smooth)):
        if given is not None:
            total = total + torch.dot(given, values)
    return (total, stats.nll, stats.lse, stats.smooth, _top(stats, hidden), *some(grads, hidden))


def _sum_fake(hidden, weight, bias, target, class_weight, *rest):  # type: ignore[no-untyped-def]
    check(hidden, weight, bias, target, class_weight)
    total = hidden.new_empty((), dtype=statistics_dtype(hidden.dtype))
    return (total, *_fake_stats(hidden, rest[2], rest[HEAD_ARGS - 6]), *fake_grads(hidden, weight, bias, *rest[-3:]))


linear_cross_entropy_with_grads: OpOverload = define(
    "linear_cross_entropy_with_grads",
    f"({HEAD}, Tensor weight_nll, Tensor? weight_lse, Tensor? weight_smooth, bool need_hidden, bool need_weight, "
    "bool need_bias) -> (Tensor total, Tensor nll, Tensor lse, Tensor smooth, Tensor top, Tensor d_hidden, "
    "Tensor d_weight, Tensor d_bias)",
    _sum,
    _sum_fake,
)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.needs = tuple(bool(n) for n in inputs[-3:])
    ctx.save_for_backward(*output[5:], *inputs[:3])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _sum_backward(ctx: Any, grad_total: Tensor | None, *unused: Tensor | None) -> tuple[Tensor | None, ...]:
    tail = (None,) * (HEAD_ARGS - 3 + 6)
    if grad_total is None:
        return (None, None, None, *tail)
    made = [need and wanted for need, wanted in zip(ctx.needs, ctx.needs_input_grad, strict=False)]
    # In float32 before the one rounding: grad_total may carry a loss scale that float16 cannot hold.
    saved, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
    grads = tuple(g * grad_total.to(g.dtype) if m else g for g, m in zip(saved, made, strict=True))
    if torch.is_grad_enabled():
        grads = once(grads, inputs)
    return (*_wanted(grads, tuple(made)), *tail)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, *values: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if g is None else g.view_as(g) for g in values[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(_TWICE)


def once(grads: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients made as constants in a forward, tied to the inputs that they depend on, so that differentiating them raises
    instead of quietly giving zero."""
    return _Once.apply(len(grads), *grads, *inputs)  # type: ignore[no-any-return]


torch.library.register_autograd(linear_cross_entropy_with_grads, _sum_backward, setup_context=_sum_setup, lib=LIBRARY)


# --- the likeliest class -----------------------------------------------------------------------------------------------


def _argmax(hidden, weight, bias, scale, softcap, post_scale, workspace):  # type: ignore[no-untyped-def]
    """The class (N,) int64 of the largest logit of each row of hidden (N, D); no gradient."""
    target = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    check(hidden, weight, bias, target, None)
    epilogue = Epilogue(scale, softcap, post_scale)
    problem = Problem(hidden, weight, bias, target, epilogue, ignore_index=None, workspace=workspace, top=True)
    with _range("argmax", problem):
        return choose(problem).forward(problem).top


def _argmax_fake(hidden, weight, bias, scale, softcap, post_scale, workspace):  # type: ignore[no-untyped-def]
    return hidden.new_empty(hidden.shape[0], dtype=torch.int64)


linear_argmax: OpOverload = define(
    "linear_argmax",
    "(Tensor hidden, Tensor weight, Tensor? bias, float scale, float? softcap, float post_scale, int? workspace) -> Tensor",
    _argmax,
    _argmax_fake,
)


# --- autocast -----------------------------------------------------------------------------------------------------------


def _register_autocast(op: OpOverload, device_type: str) -> None:
    """As F.linear: hidden, weight and bias go to autocast's dtype, and nothing else does.

    `torch.library.register_autocast` casts every floating argument, row and class weights among them, to a dtype fixed
    at registration, so the rule is written out. A caller that has already settled the dtypes passes autocast=False.
    """
    key = getattr(DispatchKey, "Autocast" + dispatch_key_for_device(device_type))
    where = [a.name for a in op._schema.arguments].index("autocast")

    def rule(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Any:
        with ExcludeDispatchKeyGuard(DispatchKeySet(key)):
            if rest[where - 3] and hidden.dtype != torch.float64:
                dtype = torch.get_autocast_dtype(device_type)
                hidden, weight = hidden.to(dtype), weight.to(dtype)
                bias = None if bias is None else bias.to(dtype)
            return op(hidden, weight, bias, *rest)

    LIBRARY.impl(op._schema.name.split("::")[1], rule, key.name)


for _device in ("cpu", "cuda", "xpu"):
    for _op in (linear_cross_entropy, linear_cross_entropy_with_grads):
        _register_autocast(_op, _device)
