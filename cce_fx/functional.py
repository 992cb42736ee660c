# SPDX-License-Identifier: Apache-2.0
"""Losses out of the operators: the same arithmetic for tensors and for the nodes of a graph under construction.

`linear_cross_entropy` is the public function; `site_loss` is the arithmetic itself, which `cce_fx.passes` also runs on
`torch.fx.Proxy` values to write a loss into a graph. It therefore branches on Python values only, never on tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor

from .held import is_held, note
from .kernels.choose import prepare as prepare
from .kernels.choose import workspace as workspace
from .kernels.combine import statistics_dtype
from .kernels.spec import Epilogue, Needs
from .kernels.spec import Sizes as Sizes
from .op import DTYPES as DTYPES  # importing it registers the operators
from .op import HEAD_ARGS
from .row_op import HELD as HELD
from .row_op import rows as rows_operator
from .row_op import rows_wanted as rows_wanted
from .row_op import rows_with_grads as rows_with_grads
from .row_program import OWN_GRADIENT as OWN_GRADIENT
from .row_program import Output as Output
from .row_program import RowProgram as RowProgram

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class LossSpec:
    """The arguments of `F.cross_entropy` that are Python values, and those of the head before it."""

    reduction: Reduction = "mean"
    ignore_index: int = -100
    label_smoothing: float = 0.0
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction is 'mean', 'sum' or 'none', not {self.reduction!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing is within [0, 1], not {self.label_smoothing}")
        e = self.epilogue
        if e.softcap is not None and not 0 < e.softcap < math.inf:
            raise ValueError(f"softcap is positive and finite, not {e.softcap}")
        if not (math.isfinite(e.scale) and math.isfinite(e.post_scale)):
            raise ValueError(f"scale and post_scale are finite, not {e.scale} and {e.post_scale}")


Read = Literal["top", "mean"]  # the likeliest class, the mean logit


@dataclass(frozen=True)
class KernelSpec:
    """How to compute it, as against what."""

    needs: Needs | None = None  # gradients to make in the forward; None is the per-token operator
    autocast: bool = True
    workspace: int | None = None
    filter_eps: float | None = None
    tune: bool = False
    reads: frozenset[Read] = frozenset()  # what is wanted of each row besides


class Division(Protocol):
    """How a loss is divided among processes; see `cce_fx.distributed.vocab`."""

    def over_rows(self, total: Tensor) -> Tensor:
        """A constant () summed over the processes that hold other rows."""

    def statistics(self, *values: Any) -> tuple[Tensor, ...]:
        """`cce::linear_cross_entropy` of this process's rows over the whole vocabulary."""


def head_args(loss: LossSpec, kernel: KernelSpec, *, skip_ignored: bool, smooth: bool) -> tuple[Any, ...]:
    """The operators' arguments from `ignore_index` on."""
    e = loss.epilogue
    return (
        loss.ignore_index,
        skip_ignored,
        smooth,
        float(e.scale),
        e.softcap,
        float(e.post_scale),
        kernel.autocast,
        kernel.workspace,
        kernel.filter_eps,
        kernel.tune,
        "top" in kernel.reads,
    )


def site_loss(
    hidden: Any,  # (N, D)
    weight: Any,  # (V, D)
    bias: Any,  # (V,) or None
    target: Any,  # (N,) int64
    class_weight: Any,  # (V,) or None
    classes: Any,  # V
    dtype: torch.dtype,  # of the statistics
    loss: LossSpec,
    kernel: KernelSpec,
    division: Division | None = None,
) -> tuple[Any, dict[Read, Any]]:
    """The loss, () or (N,) in `dtype`, of tensors or of `torch.fx.Proxy` values, and what `kernel.reads` names of each row (N,),
    whether its target is ignored or not, without a gradient.

    With a `division` the arguments are what this process holds, but for class_weight, which is whole, and `classes`; and
    the loss is its own rows' part of a mean or sum, so that those of all processes add up to the whole.

    Normalisation is `F.cross_entropy`'s: a mean divides by the sum of the targets' class weights over the rows not
    ignored, for the smoothed part too; with every row ignored it is NaN, and the gradients are zero because a kernel
    leaves ignored rows alone whatever their weight.
    """
    smoothing = loss.label_smoothing
    smooth = smoothing > 0
    valid = target != loss.ignore_index
    if class_weight is None:
        row_weight = valid.to(dtype)
    else:
        row_weight = class_weight.to(dtype)[torch.where(valid, target, 0)] * valid
    w_nll = row_weight * (1 - smoothing) if smooth else row_weight
    w_smooth = valid.to(dtype) * (smoothing / classes) if smooth else None
    denominator: Any = None
    if loss.reduction == "mean":
        denominator = row_weight.sum() if division is None else division.over_rows(row_weight.sum())
        w_nll = w_nll / denominator
        w_smooth = w_smooth / denominator if smooth else None
    summed = smooth or "mean" in kernel.reads
    head = head_args(loss, kernel, skip_ignored=True, smooth=summed)
    smooth_class_weight = class_weight.to(dtype) if smooth and class_weight is not None else None
    values = (hidden, weight, bias, target, smooth_class_weight, *head)
    if kernel.needs is not None and loss.reduction != "none":
        found = torch.ops.cce.linear_cross_entropy_with_grads.default(*values, w_nll, None, w_smooth, *kernel.needs)
        read = _read_rows(found[2], found[3], found[4], values, classes, loss, kernel) if kernel.reads else {}
        return _mean_of_none(found[0], denominator), read
    statistics = torch.ops.cce.linear_cross_entropy.default if division is None else division.statistics
    found = statistics(*values)
    nll, lse, smooth_nll = _unpack(found)
    read = _read_rows(lse, smooth_nll, found[5], values, classes, loss, kernel) if kernel.reads else {}
    # `w_nll` may be NaN (0 / 0) on ignored rows, whose nll is 0: the product is eager's NaN.
    rows = w_nll * nll
    if smooth:
        rows = rows + w_smooth * smooth_nll
    return rows if loss.reduction == "none" else _mean_of_none(rows.sum(), denominator), read


# The operators that can tell the likeliest class of each row, and where among their results.
LIKELIEST = {
    torch.ops.cce.linear_cross_entropy.default: 5,
    torch.ops.cce.linear_cross_entropy_with_grads.default: 4,
}


def tells_likeliest(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of one of those operators, asked for it."""
    return (*args[: HEAD_ARGS - 1], True, *args[HEAD_ARGS:])


def _read_rows(
    lse: Any, smooth: Any, top: Any, values: tuple[Any, ...], classes: Any, loss: LossSpec, kernel: KernelSpec
) -> dict[Read, Any]:
    """What is read of each row, from the statistics of those whose target counts; the others are computed here."""
    hidden, weight, bias, target = (None if t is None else t.detach() for t in values[:4])
    ignored: Any = target == loss.ignore_index
    chosen = torch.where(ignored, 0, -100)
    head = head_args(replace(loss, ignore_index=-100), kernel, skip_ignored=True, smooth="mean" in kernel.reads)
    others = torch.ops.cce.linear_cross_entropy.default(hidden, weight, bias, chosen, None, *head)
    read: dict[Read, Any] = {}
    if "top" in kernel.reads:
        read["top"] = torch.where(ignored, others[5], top)
    if "mean" in kernel.reads:  # smooth is the sum of lse - z
        lse, smooth = lse.detach(), smooth.detach()  # no gradient flows on the way to the readings
        lse, smooth = torch.where(ignored, others[1], lse), torch.where(ignored, others[2], smooth)
        read["mean"] = lse - smooth / classes
    return read


def row_statistics(
    hidden: Any,  # (N, D)
    weight: Any,  # (V, D)
    bias: Any,  # (V,) or None
    target: Any,  # (N,) int64
    loss: LossSpec,
    kernel: KernelSpec,
    smooth: bool = False,
) -> tuple[Any, Any, Any]:
    """nll (N,), lse (N,) and, where wanted, smooth (N,) of tensors or of proxies; every row counts."""
    everything = replace(loss, ignore_index=None)  # type: ignore[arg-type]
    head = head_args(everything, kernel, skip_ignored=False, smooth=smooth)
    return _unpack(torch.ops.cce.linear_cross_entropy.default(hidden, weight, bias, target, None, *head))


def target_logit(hidden: Any, weight: Any, bias: Any, target: Any, epilogue: Epilogue, dtype: torch.dtype) -> Any:
    """z_t (N,) in `dtype`: one product of D numbers a row, whatever the vocabulary."""
    z = (hidden.to(dtype) * weight[target].to(dtype)).sum(-1)
    if bias is not None:
        z = z + bias[target].to(dtype)
    z = z * epilogue.scale
    if epilogue.softcap is not None:
        z = epilogue.softcap * torch.tanh(z / epilogue.softcap)
    return z * epilogue.post_scale


def top_class(hidden: Any, weight: Any, bias: Any, epilogue: Epilogue, workspace: int | None) -> Any:
    """The likeliest class (N,) of each row, without gradient."""
    bias = None if bias is None else bias.detach()
    e = (float(epilogue.scale), epilogue.softcap, float(epilogue.post_scale))
    return torch.ops.cce.linear_argmax.default(hidden.detach(), weight.detach(), bias, *e, workspace)


def _mean_of_none(total: Any, denominator: Any) -> Any:
    """A mean over no rows is NaN, even where there is no row to carry it, and passes no gradient on."""
    return total if denominator is None else torch.where(denominator == 0, math.nan, total)


def _unpack(stats: Any) -> tuple[Any, Any, Any]:
    return stats[0], stats[1], stats[2]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    post_scale: float = 1.0,
    strategy: Literal["auto", "grads_in_forward", "recompute"] = "auto",
    workspace: int | None = None,
    filter_eps: float | Literal["auto"] | None = None,
) -> Tensor:
    """`F.cross_entropy(post_scale * cap(scale * F.linear(hidden, weight, bias)), target)` without the logits.

    Args:
        hidden: (..., D) floating.
        weight: (V, D), the dtype of hidden. Under autocast hidden, weight and bias are cast as `F.linear` casts them.
        target: (...) int64 class indices in [0, V), or ignore_index.
        bias: (V,), optional.
        class_weight: (V,) rescaling weight of each class (`weight` of `F.cross_entropy`), optional; has no gradient.
        reduction: "mean" (over the rows not ignored, weighted by their class weights), "sum" or "none".
        ignore_index: rows with this target have loss 0 and no gradient.
        label_smoothing: in [0, 1].
        scale: a factor of the logits, before the cap.
        softcap: cap(x) = softcap * tanh(x / softcap), or x where it is None.
        post_scale: a factor of the capped logits.
        strategy: "grads_in_forward" makes the gradients while the tiles of logits are at hand (scalar reductions);
            "recompute" makes the tiles again in the backward; "auto" chooses: in the forward, unless another loss holds a
            gradient of the weight that waits for its backward.
        workspace: bytes the kernel may hold beyond its results; None is the kernel's default.
        filter_eps: None is exact; otherwise the largest part of a row's softmax that gradients may leave out, in [0, 1):
            tiles of classes that carry less are not multiplied. "auto" keeps the bound on the error below the rounding
            of the dtype. For GPUs; on a CPU gradients are exact whatever it is.

    Returns:
        float32 (float64 for float64 inputs): () for "mean" and "sum", the shape of target for "none".

    Raises:
        ValueError: shapes that do not fit, or an argument outside its range.
        TypeError: dtypes that do not fit.
        IndexError: a target outside [0, V) that is not ignore_index (on CPU).

    Source: Cut Cross-Entropy, arXiv 2411.09009. `F.linear_cross_entropy` of torch 2.13 names the same arguments
    `input, linear_weight, target, linear_bias, weight`.
    """
    _check_tensors(hidden=hidden, weight=weight, target=target, bias=bias, class_weight=class_weight)
    check_shapes(hidden, weight, target)
    check_class_weight(class_weight, weight.shape[0])
    _check_numbers(scale=scale, softcap=softcap, post_scale=post_scale, label_smoothing=label_smoothing)
    for name, value in (("ignore_index", ignore_index), ("workspace", workspace)):
        if type(value) is not int and (value is not None or name == "ignore_index"):
            raise TypeError(f"{name} is an int{' or None' if name == 'workspace' else ''}, not {value!r}")
    loss = LossSpec(reduction, ignore_index, label_smoothing, Epilogue(scale, softcap, post_scale))
    low = autocast_dtype(hidden) or hidden.dtype
    needs = None
    if strategy not in ("auto", "grads_in_forward", "recompute"):
        raise ValueError(f"strategy is 'auto', 'grads_in_forward' or 'recompute', not {strategy!r}")
    early = torch.is_grad_enabled() and makes_grads_in_forward(strategy, reduction, low)
    if early and not (strategy == "auto" and is_held([weight])):
        found = Needs(*(t is not None and t.requires_grad for t in (hidden, weight, bias)))
        needs = found if any(found) else None
    kernel = KernelSpec(needs, autocast=True, workspace=workspace, filter_eps=filter_bound(filter_eps, low))
    rows = hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])
    dtype = statistics_dtype(hidden.dtype)
    out, _ = site_loss(rows, weight, bias, target.reshape(-1), class_weight, weight.shape[0], dtype, loss, kernel)
    if needs is not None:
        note(out, [weight])
    return out.view(target.shape) if reduction == "none" else out


def autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    """What `F.linear` would cast a hidden state to; None where autocast is off or leaves its dtype alone."""
    device = hidden.device.type
    # meta has no autocast, and says so by an error
    if device == "meta" or hidden.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def filter_bound(filter_eps: float | Literal["auto"] | None, dtype: torch.dtype) -> float | None:
    """What a kernel is told of the option for a head in `dtype`. Raises ValueError for a value outside its range."""
    if filter_eps == "auto":
        # As much again is put in the place of what is left out, and rounding is half of eps.
        return torch.finfo(dtype).eps / 4
    if not is_filter(filter_eps):
        raise ValueError(f"filter_eps is None, 'auto' or a number in [0, 1), not {filter_eps!r}")
    return filter_eps


def is_filter(filter_eps: object) -> bool:
    if filter_eps is None or filter_eps == "auto":
        return True
    return _is_number(filter_eps) and 0 <= filter_eps < 1


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def makes_grads_in_forward(strategy: str, reduction: str, dtype: torch.dtype) -> bool:
    """Whether a training loss uses the with-grads operator.

    Not in float16: gradients made before the loss scale is known would underflow.
    """
    if reduction == "none" or strategy == "recompute":
        return False
    return strategy == "grads_in_forward" or dtype != torch.float16


def _check_tensors(**tensors: Tensor | None) -> None:
    """Raise TypeError on what is not a plain dense tensor; `bias` and `class_weight` may be None."""
    for name, t in tensors.items():
        if t is None and name in ("bias", "class_weight"):
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} is a tensor, not {type(t).__name__}")
        if t.layout != torch.strided or t.is_quantized or t.is_nested:
            kind = "quantised" if t.is_quantized else "nested" if t.is_nested else str(t.layout).removeprefix("torch.")
            raise TypeError(f"{name} is a dense tensor, not a {kind} one; `{name}.to_dense()` or the like makes it one")


def _check_numbers(**values: float | None) -> None:
    """Raise TypeError on what is not a Python number: a tensor's gradient would be lost without a word."""
    for name, value in values.items():
        if not _is_number(value) and (value is not None or name != "softcap"):
            raise TypeError(f"{name} is a number, not {value!r}")


def check_shapes(hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    if hidden.dim() < 1 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"hidden is (..., D) and weight (V, D), not {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has the shape of hidden without D, {tuple(hidden.shape[:-1])}, not {tuple(target.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no classes")


def check_class_weight(class_weight: Tensor | None, classes: int) -> None:
    if class_weight is None:
        return
    if class_weight.shape != (classes,):
        raise ValueError(f"class_weight is ({classes},), one entry per class, not {tuple(class_weight.shape)}")
    if class_weight.requires_grad:
        raise ValueError("class_weight has no gradient, here as in F.cross_entropy; pass it detached")


__all__ = ["KernelSpec", "LossSpec", "linear_cross_entropy", "site_loss"]


def run_rows(
    hidden: list[Any],
    weight: list[Any],
    rows: list[Any],
    shared: list[Any],
    program: RowProgram,
    workspace: int | None,
    compiled: bool,
) -> Any:
    """What a row program returns for each row, tensors or proxies: a list of (N, *shape). See `cce::rows`."""
    return rows_operator(hidden, weight, rows, shared, program.text(), workspace, compiled)
