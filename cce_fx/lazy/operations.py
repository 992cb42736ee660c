# SPDX-License-Identifier: Apache-2.0
"""Which operations on `LazyLogits` stay lazy, which run block by block, and which are losses to be cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._torch import DisableTorchFunctionSubclass
from .passes.canonical import CASTS, canonical_callable, is_inplace_callable

if TYPE_CHECKING:
    from .lazy import LazyLogits

_GET = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_sparse",
        "is_quantized", "is_meta", "is_mps", "is_xpu", "itemsize", "nbytes", "is_nested", "is_mkldnn", "is_vulkan")  # fmt: skip
_ASK = ("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size",
        "storage_offset", "get_device", "is_inference", "__len__", "ndimension", "is_signed", "is_same_size")  # fmt: skip
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _GET if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _ASK),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}

IS_LEAF: Any = Tensor.is_leaf.__get__  # the stand-in is one to autograd, the logits are not
BASE: Any = Tensor._base.__get__  # type: ignore[attr-defined]
REGISTER_HOOK: Any = Tensor.register_hook
IS_VIEW: Any = Tensor._is_view
DETACH_: tuple[Any, ...] = (Tensor.detach_, torch.detach_)

# Operations by canonical name that stay lazy: they move rows about, cast, or scale.
_VIEWS = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t",
          "getitem", "narrow", "select", "detach"}  # fmt: skip
_VALUES = {*CASTS, "contiguous", "mul", "div", "neg", "exp", "log_softmax", "softmax", "log"}
_ROWS = {"index_select"}
_REDUCTIONS = {"argmax", "max", "topk", "logsumexp", "argmin", "min", "amax", "sum", "mean"}
_LOSSES = {"cross_entropy", "nll_loss", "gather", "take_along_dim", "logsumexp", "sum", "mean"}
_PIECES = {"split", "chunk", "unbind"}


@dataclass(frozen=True)
class Op:
    """A function and its arguments other than the tensor itself."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def apply(self, x: Tensor) -> Any:
        return self.func(x, *self.args, **dict(self.kwargs))

    @property
    def detaches(self) -> bool:
        return self.name == "detach"

    @property
    def is_alias(self) -> bool:
        return self.name in _VIEWS


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument in place."""
    return is_inplace_callable(func) or kwargs.get("out") is not None or kwargs.get("inplace") is True


def stay_lazy(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that need not read the logits, or NotImplemented."""
    from .lazy import LazyLogits

    name = canonical_callable(func)
    if not isinstance(name, str) or not args:
        return NotImplemented
    if name == "mul" and not isinstance(args[0], LazyLogits) and len(args) == 2:
        args = (args[1], args[0])
    lazy = args[0]
    if not isinstance(lazy, LazyLogits) or lazy.chain is None:
        return NotImplemented
    if name in _LOSSES:
        from .lazy_loss import cut_loss

        found = cut_loss(lazy, func, args[1:], kwargs)
        if found is not NotImplemented or name not in _REDUCTIONS:
            return found
    if name in _PIECES:
        return _pieces(lazy, name, args[1:], kwargs)
    if any(isinstance(a, LazyLogits) for a in (*args[1:], *kwargs.values())):
        return _product(lazy, func, args[1:]) if name == "mul" and len(args) == 2 and not kwargs else NotImplemented
    if name == "getitem" and isinstance(args[1], Tensor):
        return _rows_chosen(lazy, args[1])
    if name in _REDUCTIONS:
        return _by_blocks(lazy, name, func, args[1:], kwargs)
    if name not in _VIEWS | _VALUES | _ROWS:
        return NotImplemented
    return _lazily(lazy, name, func, args[1:], kwargs)


def _on_meta(lazy: LazyLogits, dtype: torch.dtype | None = None) -> Tensor:
    """Shape and strides without memory."""
    with DisableTorchFunctionSubclass():
        return torch.empty_strided(lazy.size(), lazy.stride(), dtype=dtype or lazy.dtype, device="meta")


def _lazily(lazy: LazyLogits, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if not _harmless(name, lazy, args, kwargs):
        return NotImplemented
    like = _on_meta(lazy)
    if name == "to":
        here = lazy.device
        args_on_meta = tuple(a.dtype if isinstance(a, Tensor) else a for a in args if not _is_device(a))
        if any(_is_device(a) and torch.device(a) != here for a in (*args, kwargs.get("device", here))):
            return NotImplemented
        kwargs_on_meta = {k: v for k, v in kwargs.items() if k != "device"}
        made = func(like, *args_on_meta, **kwargs_on_meta) if args_on_meta or kwargs_on_meta else like
    elif name == "index_select":
        made = func(like, args[0], args[1].to("meta"))
    elif name == "type_as":
        made = like.to(args[0].dtype)
    else:
        made = func(like, *args, **kwargs)
    if not isinstance(made, Tensor) or not made.dtype.is_floating_point:
        return NotImplemented
    if made is like and name in (*CASTS, "contiguous"):
        return lazy
    return lazy._derive(Op(name, func, tuple(args), tuple(kwargs.items())), made)


def _product(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """One tensor times another of the same rows, as p log p in an entropy."""
    other = args[0]
    if other.chain is None or _source(lazy) is not _source(other) or lazy.shape != other.shape:
        return NotImplemented
    like = _on_meta(lazy, torch.promote_types(lazy.dtype, other.dtype))
    return lazy._derive(Op("mul", func, args, ()), like)


def _pieces(lazy: LazyLogits, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """split, chunk and unbind along rows, as slices that stay lazy."""
    like = _on_meta(lazy)
    dim = kwargs.get("dim", args[-1] if len(args) > (name != "unbind") else 0) % like.dim()
    made = getattr(torch, name)(like, *args, **kwargs)
    if dim == like.dim() - 1:
        return NotImplemented
    if name == "unbind":
        return tuple(lazy.select(dim, at) for at in range(len(made)))
    sizes = [piece.size(dim) for piece in made]
    return tuple(lazy.narrow(dim, sum(sizes[:at]), size) for at, size in enumerate(sizes))


def _rows_chosen(lazy: LazyLogits, index: Tensor) -> Any:
    """`lazy[mask]` and `lazy[positions]` where whole rows are chosen; the one look at the mask is eager's own."""
    if index.device != lazy.device or type(index) is not Tensor:
        return NotImplemented
    if index.dtype == torch.int64 and index.dim() == 1 and lazy.dim() > 1:
        return torch.index_select(lazy, 0, torch.where(index < 0, index + lazy.size(0), index))
    if index.dtype != torch.bool or not 1 <= index.dim() < lazy.dim() or index.shape != lazy.shape[: index.dim()]:
        return NotImplemented
    return torch.index_select(lazy.flatten(0, index.dim() - 1), 0, index.flatten().nonzero()[:, 0])


def _is_device(value: Any) -> bool:
    return isinstance(value, (torch.device, str))


def _harmless(name: str, lazy: LazyLogits, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments are ones under which the operation only moves, casts or scales."""
    if name in ("mul", "div"):
        number = len(args) == 1 and isinstance(args[0], (int, float)) and not isinstance(args[0], bool)
        return number and args[0] != 0 and not kwargs
    if name == "getitem":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
    if name == "log":  # of probabilities; of anything else it would have to look
        return bool(lazy.ops) and lazy.ops[-1].name == "softmax"
    if name in ("softmax", "log_softmax"):
        dim = kwargs.get("dim", args[0] if args else None)
        return isinstance(dim, int) and kwargs.get("dtype") is None
    if name == "index_select":
        return len(args) == 2 and args[0] in range(lazy.dim() - 1) and args[1].dim() == 1 and not kwargs
    if name == "type_as":
        return isinstance(args[0], Tensor) and args[0].device == lazy.device
    if name == "type":
        return bool(args) and isinstance(args[0], torch.dtype)
    if name == "view":
        return not any(isinstance(a, torch.dtype) for a in args)
    return not any(isinstance(a, Tensor) for a in (*args, *kwargs.values())) or name == "to"


def _by_blocks(lazy: LazyLogits, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A reduction over the vocabulary of whole rows, block by block; NotImplemented where it is something else.

    With a gradient to keep, the logits are read instead: only indices (argmax, argmin) never have one.
    """
    from .lazy_loss import row_source

    if lazy._requires_grad() and torch.is_grad_enabled() and name not in ("argmax", "argmin"):
        return NotImplemented
    at = 1 if name == "topk" else 0
    dim = kwargs.get("dim", args[at] if len(args) > at else None)
    if name == "topk" and dim is None:
        dim = -1
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    base = _source(lazy)
    found = row_source(base)
    if found is None:
        return NotImplemented
    (hidden, logits), parts = found, []
    last = [-1] * (len(args) > at)
    named = {**kwargs, "dim": -1} if "dim" in kwargs else kwargs
    with torch.no_grad(), torch.autocast(lazy.device.type, enabled=False):
        for rows in hidden.split(_rows_of_a_block(lazy)):
            block = _evaluate(lazy, base, logits(rows))
            parts.append(func(block, *args[:at], *last, *args[at + 1 :], **named))
    return _joined(parts, tuple(lazy.shape[:-1]))


def _rows_of_a_block(lazy: LazyLogits) -> int:
    """A sixteenth of the logits, but 1 to 16 MiB."""
    row = max(1, lazy.size(-1) * lazy.element_size())
    size = min(max(lazy.numel() * lazy.element_size() // 16, 1 << 20), 16 << 20)
    return max(1, size // row)


def _source(lazy: LazyLogits) -> LazyLogits:
    """The tensor of the same shape that `lazy` is made of by operations on each row of classes alone."""
    while lazy._state.op is not None and _is_within_rows(lazy._state.op, lazy):
        lazy = lazy._state.base  # type: ignore[assignment]
    return lazy


def _is_within_rows(op: Op, lazy: LazyLogits) -> bool:
    if op.name in ("softmax", "log_softmax"):
        return dict(op.kwargs).get("dim", op.args[0] if op.args else None) in (-1, lazy.dim() - 1)
    return op.name in _VALUES or op.name == "detach"


def _evaluate(lazy: LazyLogits, base: LazyLogits, block: Tensor) -> Tensor:
    """Rows (R, V) of `lazy` from the same rows `block` of its source."""
    if lazy is base:
        return block
    op = lazy._state.op
    assert op is not None and lazy._state.base is not None
    value = _evaluate(lazy._state.base, base, block)
    if op.name in ("softmax", "log_softmax"):
        return getattr(torch, op.name)(value, -1)
    args = (_evaluate(a, base, block) if type(a) is type(lazy) else a for a in op.args)
    return op.func(value, *args, **dict(op.kwargs))


def _joined(parts: list[Any], rows: tuple[int, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        whole = torch.cat(parts)
        return whole.view(*rows, *whole.shape[1:])
    return type(parts[0])([_joined(list(column), rows) for column in zip(*parts, strict=True)])


__all__ = ["METADATA", "Op", "stay_lazy", "writes"]
