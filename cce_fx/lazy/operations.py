# SPDX-License-Identifier: Apache-2.0
"""Which operations on `LazyLogits` stay lazy, which run block by block, and which are losses to be cut."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._torch import DisableTorchFunctionSubclass, tree_iter, tree_map
from ..passes.autocast import autocast_of, under
from ..passes.canonical import CASTS, canonical_callable
from .functions import BASE, DETACH_, IS_VIEW, REGISTER_HOOK, WATCH, Op, writes
from .graph import cut_loss, read_rows, row_source
from .state import State, owned
from .tensor import HANDLERS, LazyLogits, base_of

# Operations by canonical name that stay lazy: they move rows about, cast, scale, or work on each row of classes alone.
_MOVES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t",
          "getitem", "narrow", "select", "detach"}  # fmt: skip
_CALCULATIONS = {"exp", "log_softmax", "softmax", "log"}
_VALUES = {*CASTS, "contiguous", "mul", "div", "neg", *_CALCULATIONS}
_ROWS = {"index_select"}
_REDUCTIONS = {"argmax", "max", "topk", "logsumexp", "argmin", "min", "amax", "sum", "mean"}
_LOSSES = {"cross_entropy", "nll_loss", "gather", "take_along_dim", "logsumexp", "sum", "mean"}
_PIECES = {"split", "chunk", "unbind"}


def about_the_tensor(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is asked of a lazy tensor as an object, and can be answered or done without its values; or NotImplemented."""
    lazy = args[0] if args else None
    if not isinstance(lazy, LazyLogits):
        return NotImplemented
    if func in DETACH_ and lazy.state.detach():
        with DisableTorchFunctionSubclass():
            return lazy.detach_()
    if func is REGISTER_HOOK and lazy.state.put_off(args[1]):
        return None
    if func in WATCH and lazy.state.root.passed_by:
        raise RuntimeError(_TOO_LATE)
    if lazy.state.value is None and func is IS_VIEW:
        return lazy.state.viewed() is not lazy.state
    if lazy.state.value is None and func == BASE:
        return base_of(lazy)
    return NotImplemented


_TOO_LATE = (
    "a loss or some rows of these lazy logits were computed without them, so not all of their gradient would be seen. Ask for "
    "it before that, or compile with options={'logits': 'keep'}."
)


def stay_lazy(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that need not read the logits, or NotImplemented."""
    name = canonical_callable(func)
    if not isinstance(name, str) or not args:
        return NotImplemented
    if name == "mul" and not isinstance(args[0], LazyLogits) and len(args) == 2:
        args = (args[1], args[0])
    lazy = args[0]
    if not isinstance(lazy, LazyLogits) or lazy.chain is None or kwargs.get("out") is not None:
        return NotImplemented
    if name in _LOSSES:
        found = cut_loss(lazy.state, func, args[1:], kwargs)
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
    if name not in _MOVES | _VALUES | _ROWS:
        return NotImplemented
    return _lazily(lazy, name, func, args[1:], kwargs)


def read_a_part(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result for a few rows, read without the others; NotImplemented where it could share memory with them."""
    lazies = [x for x in tree_iter((args, kwargs)) if isinstance(x, LazyLogits)]
    if writes(func, kwargs) or func in _OF_ONE_TENSOR or not all(_read_part(x.state) for x in lazies):
        return NotImplemented
    args, kwargs = tree_map(_part, (args, kwargs))
    found = func(*args, **kwargs)
    parts = {x.state.part.untyped_storage().data_ptr() for x in lazies}  # type: ignore[union-attr]
    return NotImplemented if any(_shares(x, parts) for x in tree_iter(found)) else found


def _read_part(state: State) -> bool:
    """Read a tensor of at most half as many values as the logits by itself; whether that was possible."""
    if state.unread is None or 2 * state.like.numel() > state.root.like.numel():
        return False
    if state.part is None:
        rows = read_rows(state)
        if rows is not NotImplemented:
            state.part = rows
        elif state.base is not None and state.op is not None and _read_part(state.base):
            if all(_read_part(a) for a in state.op.args if isinstance(a, State)):
                state.part = state.computed(lambda base: base.part)
    # What is made of it is laid out as it is.
    return state.part is not None and state.part.stride() == torch.empty_like(state.like).stride()


def _part(x: Any) -> Any:
    return x.state.part if isinstance(x, LazyLogits) else x


def _shares(value: Any, memory: set[int]) -> bool:
    """Whether a result may show a part's memory: a tensor in it, or anything that is no number or text."""
    if isinstance(value, Tensor):
        return value.layout != torch.strided or value.untyped_storage().data_ptr() in memory
    return not isinstance(value, (bool, int, float, complex, str, type(None)))


# They show a tensor's memory, or belong to one tensor and not to its values.
_OF_ONE_TENSOR = {Tensor.data_ptr, *WATCH, Tensor.grad.__get__, Tensor.grad.__set__, Tensor.grad_fn.__get__}


def _on_meta(lazy: LazyLogits, dtype: torch.dtype | None = None) -> Tensor:
    """Shape and strides without memory."""
    like = lazy.state.like
    return torch.empty_strided(like.shape, like.stride(), dtype=dtype or like.dtype, device="meta")


def _lazily(lazy: LazyLogits, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    if not _harmless(name, lazy, args, kwargs):
        return NotImplemented
    if name in ("to", "type_as"):
        # Of another tensor its dtype alone is kept, and of devices none: it is the lazy tensor's own.
        func, args = Tensor.to, tuple(a.dtype if isinstance(a, Tensor) else a for a in args if not _is_device(a))
        kwargs = {k: v for k, v in kwargs.items() if k != "device"}
        if not args and not kwargs:
            return lazy
    if name == "index_select":
        args = (args[0], args[1].clone())  # the program may change its own
    like, autocast = _on_meta(lazy), autocast_of(lazy.device)
    if autocast is not None and name in _CALCULATIONS:
        like = like.to(
            _cast_by_autocast(func, like.dtype, like.dim(), lazy.device, autocast, args, tuple(kwargs.items()))
        )
    made = func(like, *(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
    if not isinstance(made, Tensor) or not made.dtype.is_floating_point:
        return NotImplemented
    if made is like and name in (*CASTS, "contiguous"):
        return lazy
    is_alias = made.untyped_storage()._cdata == like.untyped_storage()._cdata
    return lazy.derive(Op(name, func, tuple(args), tuple(kwargs.items()), is_alias, autocast), made)


@functools.cache
def _cast_by_autocast(
    func: Callable[..., Any],
    dtype: torch.dtype,
    dim: int,
    device: torch.device,
    autocast: torch.dtype,
    args: Any,
    kwargs: Any,
) -> torch.dtype:
    """The dtype that autocast, which knows no meta tensors, has an operation calculate in."""
    with under(device, autocast), torch.no_grad():
        return func(torch.ones((1,) * dim, dtype=dtype, device=device), *args, **dict(kwargs)).dtype


def _product(lazy: LazyLogits, func: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """One tensor times another of the same rows, as p log p in an entropy."""
    other = args[0]
    if other.chain is None or _source(lazy.state) is not _source(other.state) or lazy.shape != other.shape:
        return NotImplemented
    like = _on_meta(lazy, torch.promote_types(lazy.dtype, other.dtype))
    return lazy.derive(Op("mul", func, (other.state,), (), False), like)


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
    if index.device != lazy.device or type(index) is not Tensor or not lazy.state.like.is_contiguous():
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
        return bool(lazy.state.ops) and lazy.state.ops[-1].name == "softmax"
    if name in ("softmax", "log_softmax"):
        dim = kwargs.get("dim", args[0] if args else None)
        return isinstance(dim, int) and kwargs.get("dtype") is None
    if name == "index_select":
        return len(args) == 2 and args[0] in range(lazy.dim() - 1) and args[1].dim() == 1 and not kwargs
    if name in ("to", "type_as"):
        devices = [a.device if isinstance(a, Tensor) else torch.device(a) for a in (*args, *kwargs.values())
                   if isinstance(a, Tensor) or _is_device(a)]  # fmt: skip
        return all(device == lazy.device for device in devices) and not kwargs.get("copy")
    if name == "type":
        return bool(args) and isinstance(args[0], torch.dtype)
    if name == "view":
        return not any(isinstance(a, torch.dtype) for a in args)
    return not any(isinstance(a, Tensor) for a in (*args, *kwargs.values()))


def _by_blocks(lazy: LazyLogits, name: str, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """A reduction over the vocabulary of whole rows, block by block; NotImplemented where it is something else.

    With a gradient to keep, the logits are read instead: only indices (argmax, argmin) never have one.
    """
    if lazy.requires_grad and torch.is_grad_enabled() and name not in ("argmax", "argmin"):
        return NotImplemented
    at = 1 if name == "topk" else 0
    dim = kwargs.get("dim", args[at] if len(args) > at else None)
    if name == "topk" and dim is None:
        dim = -1
    if isinstance(dim, (tuple, list)) and len(dim) == 1:
        dim = dim[0]
    if not isinstance(dim, int) or dim not in (-1, lazy.dim() - 1):
        return NotImplemented
    base = _source(lazy.state)
    found = row_source(base)
    if found is None:
        return NotImplemented
    (hidden, logits), parts = found, []
    last = [-1] * (len(args) > at)
    named = {**kwargs, "dim": -1} if "dim" in kwargs else kwargs
    with torch.no_grad():
        for rows in hidden.split(_rows_of_a_block(lazy.state.like)):
            with under(hidden.device, None):
                block = logits(rows)
            block = _evaluate(lazy.state, base, block)
            parts.append(func(block, *args[:at], *last, *args[at + 1 :], **named))
    return _joined(parts, tuple(lazy.shape[:-1]))


def _rows_of_a_block(like: Tensor) -> int:
    """A sixteenth of the logits, but 1 to 16 MiB."""
    row = max(1, like.size(-1) * like.element_size())
    size = min(max(like.numel() * like.element_size() // 16, 1 << 20), 16 << 20)
    return max(1, size // row)


def _source(state: State) -> State:
    """The state of the same shape that this one is made of by operations on each row of classes alone."""
    while state.base is not None and state.op is not None and _is_within_rows(state.op, state.like):
        state = state.base
    return state


def _is_within_rows(op: Op, like: Tensor) -> bool:
    if op.name in ("softmax", "log_softmax"):
        return dict(op.kwargs).get("dim", op.args[0] if op.args else None) in (-1, like.dim() - 1)
    return op.name in _VALUES or op.name == "detach"


def _evaluate(state: State, base: State, block: Tensor) -> Tensor:
    """Rows (R, V) of a state from the same rows `block` of its source."""
    if state is base:
        return block
    op = state.op
    assert op is not None and state.base is not None
    value = _evaluate(state.base, base, block)
    args = [_evaluate(a, base, block) if isinstance(a, State) else a for a in op.args]
    with under(block.device, op.autocast):
        if op.name in ("softmax", "log_softmax"):
            return getattr(torch, op.name)(value, -1)
        return op.func(value, *args, **dict(op.kwargs))


def _joined(parts: list[Any], rows: tuple[int, ...]) -> Any:
    if isinstance(parts[0], Tensor):
        whole = torch.cat(parts)
        return owned(whole.view((*rows, *whole.shape[1:])))
    return type(parts[0])([_joined(list(column), rows) for column in zip(*parts, strict=True)])


HANDLERS.extend([about_the_tensor, stay_lazy, read_a_part])
