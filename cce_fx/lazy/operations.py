# SPDX-License-Identifier: Apache-2.0
"""What is done with `LazyLogits`: what moves rows about is put off, what treats each row by itself is cut, the rest reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._torch import (
    DisableTorchFunctionSubclass,
    functorch_stack,
    tree_flatten,
    tree_iter,
    tree_map,
    tree_unflatten,
)
from ..passes.autocast import autocast_of
from ..passes.canonical import CASTS, canonical_callable
from .expression import Expression, NotWritten, is_moved, read_rows
from .functions import BASE, DETACH_, IS_VIEW, REGISTER_HOOK, WATCH, Op, writes
from .graph import row_by_row, run_without_logits
from .likeliest import known_top
from .state import State, owned
from .tensor import HANDLERS, LazyLogits, base_of

# Operations by canonical name that move rows about, or cast.
_MOVES = {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "movedim", "t",
          "getitem", "narrow", "select", "detach", "index_select"}  # fmt: skip
_CASTS = {*CASTS, "contiguous"}
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
    """The result of an operation that moves rows about or casts, which need not look at the logits; or NotImplemented."""
    name = canonical_callable(func)
    if not isinstance(name, str) or not args or kwargs.get("out") is not None:
        return NotImplemented
    lazy, rest = args[0], args[1:]
    if not isinstance(lazy, LazyLogits) or lazy.chain is None or _lazies((rest, kwargs)):
        return NotImplemented
    if name in _PIECES:
        return _pieces(lazy, name, rest, kwargs)
    if name == "getitem" and isinstance(args[1], Tensor):
        return _rows_chosen(lazy, args[1])
    if name not in _MOVES and name not in _CASTS:
        return NotImplemented
    return _lazily(lazy, name, func, rest, kwargs)


def known_beforehand(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An `argmax` of rows whose loss has told it; of those that the loss left out it is computed. Or NotImplemented."""
    lazy = args[0] if args else None
    if canonical_callable(func) != "argmax" or not isinstance(lazy, LazyLogits) or lazy.chain is None:
        return NotImplemented
    given = dict(zip(("dim", "keepdim"), args[1:], strict=False)) | kwargs
    dim, keepdim = given.pop("dim", None), given.pop("keepdim", False)
    if given or dim not in (-1, lazy.dim() - 1) or _is_transformed():
        return NotImplemented
    top = known_top(lazy.state)
    if top is None:
        return NotImplemented
    missing = top < 0
    if bool(missing.any()):
        rows = _rows_chosen(lazy, missing)
        rest = NotImplemented if rows is NotImplemented else by_rows(torch.argmax, (rows, -1), {})
        if rest is NotImplemented:
            return NotImplemented
        top = top.masked_scatter(missing, rest)
    return (top.unsqueeze(-1) if keepdim else top).clone()


def by_rows(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of an operation that treats each row of the logits by itself, or NotImplemented.

    What still has classes waits; what has none is computed for some rows at a time.
    """
    name = canonical_callable(func)
    name = name if isinstance(name, str) else getattr(func, "__name__", "")
    if name in ("__get__", "__set__") or writes(func, kwargs) or func in WATCH or _is_transformed():
        return NotImplemented
    if "device" in kwargs or any(isinstance(x, torch.device) for x in tree_iter(args)):
        return NotImplemented  # numbers would be made, and random ones drawn, in the place of shapes
    lazies = [x for x in _lazies((args, kwargs)) if x.chain is not None]
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and not any(x is z for z in lazies)]
    if not lazies or not all(_is_plain(t) for t in tensors):
        return NotImplemented
    try:
        made = _on_meta_tensors(func, args, kwargs)
    except Exception:  # whatever it is, it is raised again, of the logits
        return NotImplemented
    results = list(tree_iter(made))
    if not results or not all(isinstance(x, Tensor) for x in results):
        return NotImplemented
    small, most = _are_small(lazies), max(z.numel() for z in lazies) // 4
    if all(x.numel() <= most for x in results):
        return _without_logits(func, args, kwargs, made, lazies, small)
    waits = isinstance(made, Tensor) and not small and all(t.numel() <= most for t in tensors)
    return _waiting(func, name, args, kwargs, made, lazies) if waits else NotImplemented


def _without_logits(func: Any, args: Any, kwargs: Any, made: Any, lazies: list[LazyLogits], small: bool) -> Any:
    """A result without classes, of which `made` are the shapes."""
    expression = _expression(func, args, kwargs, lazies)
    if expression is None:
        return NotImplemented
    for lazy in lazies:
        lazy.state.check_fresh(wait=False)
    found = run_without_logits(expression, small)
    if found is NotImplemented:
        return NotImplemented
    wanted, spec = tree_flatten(made)
    if [tuple(x.shape) for x in found] != [tuple(x.shape) for x in wanted]:
        return NotImplemented
    found = [owned(x) for x in found]
    for lazy in lazies:
        for x in found:
            lazy.state.hook_up(x)
    return tree_unflatten(found, spec)


def _waiting(func: Any, name: str, args: Any, kwargs: Any, made: Tensor, lazies: list[LazyLogits]) -> Any:
    """A result with classes, of which `made` is the shape, as a lazy tensor."""
    expression = _expression(func, args, kwargs, lazies)
    known = None if expression is None else row_by_row(expression)
    if known is None:
        return NotImplemented
    dtype, in_order = known
    first, like = lazies[0], made if made.dtype == dtype else made.to(dtype)
    # The program may change its own tensors.
    args, kwargs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) and not isinstance(x, LazyLogits) else x,
                            (_as_states(args), _as_states(kwargs)))  # fmt: skip
    op = Op(name, func, tuple(args), tuple(kwargs.items()), False, first.device, autocast_of(first.device))
    lazy = first.derive(op, like)
    lazy.state.in_order = in_order
    return lazy


def _expression(func: Any, args: Any, kwargs: Any, lazies: list[LazyLogits]) -> Expression | None:
    """An operation on lazy tensors, written down; None where it cannot be."""
    device = lazies[0].device
    roots = [root for lazy in lazies for root in lazy.state.roots]
    grad = torch.is_grad_enabled() and any(root.grad for root in roots)
    expression = Expression(grad, device)
    with torch.set_grad_enabled(grad):
        try:
            expression.add(func, _as_states(args), _as_states(kwargs), autocast_of(device))
        except NotWritten:
            return None
    return expression


def _as_states(tree: Any) -> Any:
    return tree_map(
        lambda x: (x.state if x.chain is not None else x.state.value) if isinstance(x, LazyLogits) else x, tree
    )


def _lazies(tree: Any) -> list[LazyLogits]:
    return [x for x in tree_iter(tree) if isinstance(x, LazyLogits)]


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor beside lazy ones is one of no other kind."""
    return type(t) in (Tensor, Parameter) or (isinstance(t, LazyLogits) and t.chain is None)


def _is_transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is active."""
    return functorch_stack() is not None or forward_ad._current_level >= 0


# Logits of fewer bytes are read where no kernel knows what is asked of them.
_SMALLEST = 1 << 20


def _are_small(lazies: list[LazyLogits]) -> bool:
    roots = [root for lazy in lazies for root in lazy.state.roots]
    asked = [root.chain.policy.min_vocab for root in roots if root.chain is not None]
    return all(n is None for n in asked) and all(r.like.numel() * r.like.element_size() < _SMALLEST for r in roots)


def _on_meta_tensors(func: Any, args: Any, kwargs: Any) -> Any:
    """Shapes and strides of what an operation returns. Raises whatever it raises, also where it would show memory."""
    given: list[Tensor] = []

    def like(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        given.append(_on_meta(x) if isinstance(x, LazyLogits) else x.detach().to("meta"))
        return given[-1]

    with torch.no_grad():
        made = func(*tree_map(like, args), **tree_map(like, kwargs))
    memory = {x.untyped_storage()._cdata for x in given}
    if any(isinstance(x, Tensor) and x.untyped_storage()._cdata in memory for x in tree_iter(made)):
        raise ValueError("a view")
    return made


def read_a_part(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result for a few rows, read without the others; NotImplemented where it could share memory with them."""
    lazies = _lazies((args, kwargs))
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
        if is_moved(state):
            state.part = read_rows(state)
        elif state.made_of and all(_read_part(a) for a in state.made_of):
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


def _on_meta(lazy: LazyLogits) -> Tensor:
    """Shape and strides without memory."""
    like = lazy.state.like
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="meta")


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
    like = _on_meta(lazy)
    made = func(like, *(a.to("meta") if isinstance(a, Tensor) else a for a in args), **kwargs)
    if not isinstance(made, Tensor) or not made.dtype.is_floating_point:
        return NotImplemented
    if made is like and name in _CASTS:
        return lazy
    is_alias = made.untyped_storage()._cdata == like.untyped_storage()._cdata
    args = (lazy.state, *args)
    return lazy.derive(
        Op(name, func, args, tuple(kwargs.items()), is_alias, lazy.device, autocast_of(lazy.device)), made
    )


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
    """Whether the arguments are ones under which the operation only moves or casts."""
    if name == "getitem":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        return all(i is None or i is Ellipsis or type(i) in (int, slice) for i in index)
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


HANDLERS.extend([about_the_tensor, stay_lazy, known_beforehand, by_rows, read_a_part])
