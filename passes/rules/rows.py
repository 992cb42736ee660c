# SPDX-License-Identifier: Apache-2.0
"""Operations that move rows about: replayed on hidden, where a row is D long and not V."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..canonical import canonical
from ..registry import WHOLE, Call, Outcome, rule
from ..values import Form, LogitsView, Reason, same, value_of
from .loss import nll_of_pair
from .pick import max_values, picked_by_index


def _piece(call: Call) -> Outcome:
    """One of the tensors that split, chunk or unbind make of logits."""
    pieces, which = call.arg(0, "self"), call.arg(1, "key")
    inner = Call(pieces, call.values)
    view, parts, name = inner.view(), value_of(pieces), canonical(pieces)
    if view is None or not isinstance(which, int):
        return None
    dim = inner.arg(1, "dim", 0) if name == "unbind" else inner.arg(2, "dim", 0)
    dim, view = dim % len(view.shape), view.at(pieces)
    if name == "unbind":
        if dim == view.class_dim:
            return call.decline(Reason.CLASS_MIXED, "the vocabulary is unbound")
        return view.rows(
            call.node, "select", torch.select, dim, which, class_dim=view.class_dim - (dim < view.class_dim)
        )
    sizes = [p.shape[dim] for p in parts]
    if not all(isinstance(size, int) for size in sizes):
        return call.decline(Reason.NO_RULE, "pieces of unknown size")
    start = sum(sizes[: which % len(sizes)])
    if dim == view.class_dim:
        return _cut(call, view, slice(start, start + sizes[which]))
    return view.rows(call.node, "narrow", torch.narrow, dim, start, sizes[which], class_dim=view.class_dim)


# Operations that return several tensors, and what taking one of them is.
_PAIRS = {
    "max": max_values,
    "nll_loss_forward": nll_of_pair,
    "nll_loss2d_forward": nll_of_pair,
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes", "unbind"), _piece),
}


def _product(sizes: Any) -> Any:
    total: Any = 1
    for size in sizes:
        total = total * size
    return total


def _class_dim_after(view: LogitsView, shape: tuple[Any, ...]) -> int | None:
    """Where the class dimension is after a reshape to `shape`, or None where it does not survive whole."""
    before = view.shape[: view.class_dim]
    after = view.shape[view.class_dim + 1 :]
    for dim, size in enumerate(shape):
        if not same(size, view.classes):
            continue
        if not after and dim == len(shape) - 1:
            return dim
        if (
            after
            and same(_product(shape[:dim]), _product(before))
            and same(_product(shape[dim + 1 :]), _product(after))
        ):
            return dim
    return None


@rule("view", "reshape", "flatten", "unflatten", "reshape_as")
def reshape(call: Call) -> Outcome:
    """Any change of shape that leaves the class dimension whole: hidden is reshaped to the result's own shape."""
    view, result = call.view(), call.result
    if view is None or not isinstance(result, torch.Tensor):
        return None
    shape = tuple(result.shape)
    if result.dtype != value_of(call.node.args[0]).dtype:
        return call.decline(Reason.NO_RULE, "a view as another dtype")
    dim = _class_dim_after(view, shape)
    if dim is None:
        return call.decline(Reason.CLASS_MIXED, f"{tuple(view.shape)} becomes {shape}")
    fixed = isinstance(view.hidden_size, int)
    sizes = _sizes(call, shape, dim, view.hidden_size if fixed else 1)
    if sizes is None:
        return call.decline(Reason.NO_RULE, "a reshape to several symbolic sizes")
    if fixed:
        return view.rows(call.node, "reshape", torch.reshape, sizes, class_dim=dim)
    return view.rows(call.node, "reshape", _reshaped, sizes, dim, view.class_dim, class_dim=dim)


def _reshaped(hidden: Any, sizes: tuple[Any, ...], dim: int, hidden_dim: int) -> Any:
    """A hidden state with other rows: its D, at `hidden_dim`, comes to `dim`."""
    return torch.reshape(hidden, (*sizes[:dim], hidden.size(hidden_dim), *sizes[dim + 1 :]))


def _sizes(call: Call, shape: tuple[Any, ...], dim: int, hidden_size: int) -> tuple[Any, ...] | None:
    """The result's sizes as integers and graph nodes, the hidden size in place of the class dimension.

    One symbolic size may stand as -1; more of them have to be named in the call itself. None where they are not.
    """
    named = call.sizes(1, "shape") if canonical(call.node) in ("view", "reshape") else ()
    sizes = list(named if len(named) == len(shape) else shape)
    sizes[dim] = hidden_size
    symbolic = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
    if len(symbolic) > 1 or (symbolic and any(isinstance(s, int) and s == -1 for s in sizes)):
        return None
    for i in symbolic:
        sizes[i] = -1
    return tuple(sizes)


@rule("unsqueeze")
def unsqueeze(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    dim = call.arg(1, "dim") % (len(view.shape) + 1)
    moved = view.class_dim + (dim <= view.class_dim)
    return view.rows(call.node, "unsqueeze", torch.unsqueeze, dim, class_dim=moved)


@rule("squeeze")
def squeeze(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    rank, dims = len(view.shape), call.sizes(1, "dim")
    asked = {d % rank for d in dims} if dims and dims[0] is not None and dims != ((),) else set(range(rank))
    gone = tuple(d for d in sorted(asked) if same(view.shape[d], 1))
    if view.class_dim in gone or len(call.result.shape) != rank - len(gone):
        return call.decline(Reason.CLASS_MIXED, "the vocabulary dimension is squeezed")
    moved = view.class_dim - sum(d < view.class_dim for d in gone)
    return view.rows(call.node, "squeeze", torch.squeeze, gone, class_dim=moved)


@rule("transpose")
def transpose(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    rank = len(view.shape)
    a, b = (d % rank for d in (call.arg(1, "dim0"), call.arg(2, "dim1")))
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return _permuted(call, view, order)


@rule("t")
def t(call: Call) -> Outcome:
    view = call.view()
    return view and (_permuted(call, view, [1, 0]) if len(view.shape) == 2 else view.at(call.node))


@rule("T", "mT", "H", "mH")
def attribute(call: Call) -> Outcome:
    """x.T and x.mT, as Dynamo writes them."""
    view, name = call.view(), canonical(call.node)
    if view is None or (name in ("T", "H") and len(view.shape) != 2):
        return None
    rank = len(view.shape)
    return _permuted(call, view, [*range(rank - 2), rank - 1, rank - 2])


@rule("permute")
def permute(call: Call) -> Outcome:
    view = call.view()
    return view and _permuted(call, view, [d % len(view.shape) for d in call.sizes(1, "dims")])


@rule("movedim")
def movedim(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    source, target = call.arg(1, "source"), call.arg(2, "destination")
    # Sizes that tell the dimensions apart, so that torch itself says where each one goes.
    moved = torch.empty(tuple(range(2, 2 + len(view.shape))), device="meta").movedim(source, target)
    return _permuted(call, view, [size - 2 for size in moved.shape])


def _permuted(call: Call, view: LogitsView, order: list[int]) -> LogitsView:
    return view.rows(call.node, "permute", torch.permute, tuple(order), class_dim=order.index(view.class_dim))


@rule("narrow")
def narrow(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    dim, start, length = (call.arg(i, n) for i, n in ((1, "dim"), (2, "start"), (3, "length")))
    dim = dim % len(view.shape)
    if dim == view.class_dim:
        return _cut(call, view, slice(start, start + length) if isinstance(start, int) else None)
    return view.rows(call.node, "narrow", torch.narrow, dim, start, length, class_dim=view.class_dim)


@rule("slice")
def slice_(call: Call) -> Outcome:
    """aten.slice(x, dim, start, end, step)."""
    view = call.view()
    if view is None:
        return None
    dim = call.arg(1, "dim", 0) % len(view.shape)
    index = [slice(None)] * len(view.shape)
    index[dim] = slice(call.arg(2, "start"), call.arg(3, "end"), call.arg(4, "step", 1))
    return _indexed(call, view, tuple(index))


@rule("select")
def select(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    index: list[Any] = [slice(None)] * len(view.shape)
    index[call.arg(1, "dim") % len(view.shape)] = call.arg(2, "index")
    return _indexed(call, view, tuple(index))


@rule("index_select")
def index_select(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    dim, index = call.arg(1, "dim") % len(view.shape), call.arg(2, "index")
    if dim == view.class_dim:
        return call.decline(Reason.CLASS_MIXED, "classes are selected by index")
    return view.rows(call.node, "index_select", torch.index_select, dim, index, class_dim=view.class_dim)


@rule("roll")
def roll(call: Call) -> Outcome:
    view = call.view()
    if view is None:
        return None
    shifts, dims = call.arg(1, "shifts"), call.arg(2, "dims", ())
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if not dims or any(not isinstance(d, int) or d % len(view.shape) == view.class_dim for d in dims):
        return call.decline(Reason.CLASS_MIXED, "the vocabulary is rolled")
    dims = tuple(d % len(view.shape) for d in dims)
    return view.rows(call.node, "roll", torch.roll, shifts, dims, class_dim=view.class_dim)


def _cut(call: Call, view: LogitsView, wanted: slice | None) -> Outcome:
    """Classes start..stop alone: rows of the weight. Of a softmax it would no longer be one."""
    numbers = wanted is not None and all(
        x is None or isinstance(x, int) for x in (wanted.start, wanted.stop, wanted.step)
    )
    if not numbers or view.form is not Form.LOGITS or not isinstance(view.classes, int):
        return call.decline(Reason.CLASS_MIXED, "an index into the vocabulary dimension")
    start, stop, step = wanted.indices(view.classes)
    if step != 1 or stop <= start:
        return call.decline(Reason.CLASS_MIXED, "every other class, or none")
    return view.cut(call.node, start, stop).at(call.node)


@rule("getitem", begins=True)
def getitem(call: Call) -> Outcome:
    source, index = call.arg(0, "self"), call.arg(1, "key")
    if isinstance(source, Node) and canonical(source) in _PAIRS:
        return _PAIRS[canonical(source)](call)
    return _taken(call, index if isinstance(index, tuple) else (index,))


@rule("index")
def index(call: Call) -> Outcome:
    """aten.index.Tensor(x, indices)."""
    return _taken(call, tuple(slice(None) if i is None else i for i in call.arg(1, "indices")))


def _taken(call: Call, index: tuple[Any, ...]) -> Outcome:
    """One class of each row, which any form has, or whole rows."""
    view = call.view(forms=tuple(Form))
    if view is None:
        return None
    found = picked_by_index(call, view, index)
    return found if found is not None or view.form not in WHOLE else _indexed(call, view, index)


def _indexed(call: Call, view: LogitsView, index: tuple[Any, ...]) -> Outcome:
    """Basic indexing, or one tensor (a mask or positions), that takes the class dimension whole."""
    full = _expanded(view, index)
    if full is None:
        return call.decline(Reason.NO_RULE, "an index that is not understood")
    at, dim, tensors = 0, 0, 0
    class_dim: int | None = None
    cut: slice | None = None
    replay: list[Any] = []
    for item in full:
        span, made = _consumes(item)
        tensors += isinstance(item, Node) and isinstance(value_of(item), torch.Tensor)
        if at <= view.class_dim < at + span:
            if not isinstance(item, slice):
                return call.decline(Reason.CLASS_MIXED, "an index into the vocabulary dimension")
            cut = None if _is_whole(item, view.classes) else item
            class_dim, item = dim, slice(None)
        replay.append(item)
        at, dim = at + span, dim + made
    scalars = any(isinstance(i, int) and not isinstance(i, bool) for i in full)
    if class_dim is None or tensors > 1 or (tensors and scalars):
        return call.decline(Reason.NO_RULE, "an index with several tensors")
    if cut is not None:
        view = _cut(call, view, cut)
        if not isinstance(view, LogitsView):
            return view
        if all(i == slice(None) for i in replay if not isinstance(i, Node)) and not tensors:
            return view
    return view.rows(call.node, "index", _index, tuple(replay), class_dim=class_dim)


def _index(hidden: Any, index: tuple[Any, ...]) -> Any:
    return hidden[index]


def _expanded(view: LogitsView, index: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The index with an ellipsis written out, one entry per dimension or new axis; None where not understood."""
    if not all(isinstance(i, (int, slice, Node)) or i is None or i is Ellipsis for i in index):
        return None
    if any(isinstance(i, bool) for i in index):
        return None
    if any(isinstance(i, Node) and not isinstance(value_of(i), (torch.Tensor, torch.SymInt, int)) for i in index):
        return None
    spans = sum(_consumes(i)[0] for i in index if i is not Ellipsis)
    missing = (slice(None),) * (len(view.shape) - spans)
    if Ellipsis in [i for i in index if not isinstance(i, Node)]:
        where = next(n for n, i in enumerate(index) if i is Ellipsis)
        return (*index[:where], *missing, *index[where + 1 :])
    return (*index, *missing)


def _consumes(item: Any) -> tuple[int, int]:
    """(dimensions that an index entry takes, dimensions that it makes)."""
    if item is None:
        return 0, 1
    if isinstance(item, slice):
        return 1, 1
    value = value_of(item)
    if isinstance(value, torch.Tensor):
        return (value.dim(), 1) if value.dtype in (torch.bool, torch.uint8) else (1, value.dim())
    return 1, 0


def _is_whole(item: slice, size: Any) -> bool:
    """Whether a slice takes a dimension of `size` whole, for certain."""
    if any(isinstance(x, Node) for x in (item.start, item.stop, item.step)):
        return False
    if item.start not in (None, 0) or item.step not in (None, 1):
        return False
    if item.stop is None or (isinstance(item.stop, int) and item.stop >= 2**62):
        return True
    return isinstance(item.stop, int) and isinstance(size, int) and item.stop >= size
