# SPDX-License-Identifier: Apache-2.0
"""What each aten operation does to the axes of its arguments: one rule for each kind.

A rule joins the dimensions that the operation takes side by side, mixes those in which a place of the result depends on
several places of an argument, and returns the results with their dimensions. There are few kinds, because operations are
recorded after torch's own decompositions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..._torch import OpOverload
from .axes import Dim, NotByRows, fresh, join, mix, regrouped, resolved, rows_in, size_of
from .call import Call, signature
from .record import PRODUCTS
from .value import Aligned, At, Chosen, Made, Order, Places, Product, Shape, Value

RULES: dict[str, Callable[[Call], list[Value]]] = {}
_ALSO_POINTWISE = {"where", "masked_fill", "clamp", "lerp", "_to_copy", "isin", "nan_to_num", "heaviside"}


def is_pointwise(func: OpOverload) -> bool:
    """Whether every place of an operation's result depends on the same places of its arguments, broadcast."""
    return torch.Tag.pointwise in func.tags or signature(func).name in _ALSO_POINTWISE


def _rule(*names: str) -> Callable[[Callable[[Call], list[Value]]], Callable[[Call], list[Value]]]:
    def register(function: Callable[[Call], list[Value]]) -> Callable[[Call], list[Value]]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _broadcast(values: Sequence[Value]) -> list[Dim]:
    """The dimensions of what broadcasting makes of several values."""
    rank = max((len(v.dims) for v in values), default=0)
    found: list[Dim] = []
    for at in range(-rank, 0):
        here = [v.dims[at] for v in values if len(v.dims) >= -at and v.dims[at]]
        for other in here[1:]:
            join(here[0], other)
        found.append(here[0] if here else ())
    return found


def _join_broadcast(dims: Sequence[Dim], wanted: Sequence[Dim]) -> None:
    """Note that dimensions are broadcast to those that are wanted."""
    for have, want in zip(reversed(dims), reversed(wanted), strict=False):
        if have:
            join(have, want)


@_rule("pointwise")
def pointwise(call: Call) -> list[Value]:
    dims = _broadcast(call.values)
    aligned = {k: _map(v, lambda x: Aligned(x, dims)) for k, v in call.arguments.items()}
    return call.made(call.written(**aligned), *[dims] * len(call.out))


def _map(argument: object, function: Callable[[Value], object]) -> object:
    if isinstance(argument, Value):
        return function(argument)
    if isinstance(argument, (list, tuple)):
        return [_map(a, function) for a in argument]
    return argument


@_rule("clone", "alias", "detach", "lift_fresh", "lift_fresh_copy", "contiguous", "_conj", "resolve_conj")
def same(call: Call) -> list[Value]:
    (value,) = call.values
    if isinstance(value.source, Places):
        return call.made(value.source, value.dims)
    detached = call.name == "detach"
    operation = "aten.detach.default" if detached else "aten.alias.default"
    return call.made(Made(operation, (value,)), value.dims, grad=value.grad and not detached)


@_rule("view", "_unsafe_view", "reshape", "squeeze", "unsqueeze", "_reshape_alias", "view_copy")
def view(call: Call) -> list[Value]:
    value = call["self"]
    dims = regrouped(value.dims, list(call.out[0].shape))
    if isinstance(value.source, Places):
        return call.made(value.source, dims)
    return call.made(Made("aten.reshape.default", (value, Shape(dims))), dims)


@_rule("expand")
def expand(call: Call) -> list[Value]:
    value, sizes = call["self"], call.out[0].shape
    before: list[Dim] = [*[()] * (len(sizes) - len(value.dims)), *value.dims]
    dims = [d or fresh(size) for d, size in zip(before, sizes, strict=True)]
    return call.made(Made("aten.expand.default", (Aligned(value, dims), Shape(dims))), dims)


@_rule("permute", "t", "transpose", "numpy_T")
def permute(call: Call) -> list[Value]:
    value = call["self"]
    order = list(range(len(value.dims)))
    if call.name == "permute":
        order = [d % len(order) for d in call["dims"]]
    elif call.name == "transpose":
        a, b = (call[name] % len(order) for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    else:
        order.reverse()
    return call.made(Made("aten.permute.default", (value, Order(value.dims, order))), [value.dims[d] for d in order])


@_rule(
    "sum", "mean", "amax", "amin", "logsumexp", "argmax", "argmin", "max", "min", "any", "all", "prod", "var", "std",
    "var_mean", "std_mean", "norm", "linalg_vector_norm", "nansum", "aminmax", "count_nonzero", "median", "mode", "kthvalue",
)  # fmt: skip
def reduction(call: Call) -> list[Value]:
    """Over some dimensions, of which those that are kept have the size 1."""
    value, given = call["self"], call.arguments
    over = call.dims("dim")
    for d in over:
        mix(value.dims[d], call.name)
    kept = given.get("keepdim") is True
    dims = [() if n in over else d for n, d in enumerate(value.dims) if kept or n not in over]
    if given.get("dim") in (None, []):
        return call.made(call.written(), *[dims] * len(call.out))
    at = [At(value.dims, d) for d in over]
    return call.made(
        call.written(dim=at if isinstance(given["dim"], (list, tuple)) else at[0]), *[dims] * len(call.out)
    )


@_rule(
    "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort",
    "argsort", "flip", "topk",
)  # fmt: skip
def along(call: Call) -> list[Value]:
    """Along a dimension, which stays; of `topk` with another size."""
    value = call["self"]
    over = call.dims("dim" if "dim" in call.arguments else "dims")
    for d in over:
        mix(value.dims[d], call.name)
    dims = list(value.dims)
    if call.name == "topk":
        dims[over[0]] = fresh(call.out[0].shape[over[0]])
        mix(dims[over[0]], call.name)
    at = [At(value.dims, d) for d in over]
    changed = {"dim": at[0]} if "dim" in call.arguments else {"dims": at}
    return call.made(call.written(**changed), *[dims] * len(call.out))


@_rule("select", "slice", "split", "split_with_sizes", "unbind", "chunk")
def part(call: Call) -> list[Value]:
    """Some places of a dimension."""
    value, (d,) = call["self"], call.dims("dim")
    if call.name == "slice" and call.out[0].shape == tuple(_sizes(value)) and call["step"] == 1:
        return call.made(Made("aten.alias.default", (value,)), value.dims)
    mix(value.dims[d], call.name)
    gone = call.name in ("select", "unbind")
    dims = []
    for fake in call.out:
        here = [] if gone else [fresh(fake.shape[d])]
        for dim in here:
            mix(dim, call.name)
        dims.append([*value.dims[:d], *here, *value.dims[d + 1 :]])
    return call.made(call.written(dim=At(value.dims, d)), *dims)


def _sizes(value: Value) -> list[int]:
    return [size_of(dim) for dim in value.dims]


@_rule("cat", "stack")
def joined(call: Call) -> list[Value]:
    values = call["tensors"]
    rank = call.out[0].dim()
    d = call["dim"] % rank
    dims = list(values[0].dims)
    if call.name == "stack":
        for other in values[1:]:
            for a, b in zip(dims, other.dims, strict=True):
                join(a, b)
        dims.insert(d, fresh(len(values)))
    else:
        for other in values:
            if len(other.dims) != rank:
                raise NotByRows("an empty tensor is joined")
            mix(other.dims[d], "cat")
            for n in range(rank):
                if n != d:
                    join(dims[n], other.dims[n])
        dims[d] = fresh(call.out[0].shape[d])
    mix(dims[d], call.name)
    return call.made(call.written(dim=At(dims, d)), dims)


@_rule("gather", "scatter", "scatter_add", "scatter_reduce")
def picked(call: Call) -> list[Value]:
    """Places of a dimension chosen by numbers of the others."""
    value, index, (d,) = call["self"], call["index"], call.dims("dim")
    source = call.arguments.get("src")
    for n, (a, b) in enumerate(zip(value.dims, index.dims, strict=True)):
        if n == d:
            mix(a, call.name)
            mix(b, call.name)
        else:
            join(a, b)
        if isinstance(source, Value):
            join(b, source.dims[n])
    dims = index.dims if call.name == "gather" else value.dims
    return call.made(call.written(dim=At(value.dims, d)), dims)


@_rule("embedding", "index_select")
def looked_up(call: Call) -> list[Value]:
    value = call["weight"] if call.name == "embedding" else call["self"]
    index = call["indices"] if call.name == "embedding" else call["index"]
    d = 0 if call.name == "embedding" else call.dims("dim")[0]
    mix(value.dims[d], call.name)
    dims = [*value.dims[:d], *index.dims, *value.dims[d + 1 :]]
    chosen = [*[None] * d, index]
    return call.made(Made("aten.index.Tensor", (value, Chosen(value.dims, tuple(chosen)))), dims)


def _chosen_places(call: Call, value: Value, chosen: list[Value | None]) -> tuple[list[int], list[Dim]]:
    """The dimensions that index tensors choose places of, and those of the index tensors. Along rows only each row's own
    place may be chosen."""
    given = {n: i for n, i in enumerate(chosen) if i is not None}
    at = list(given)
    if at != list(range(at[0], at[-1] + 1)) or any(i.dtype == torch.bool for i in given.values()):
        raise NotByRows(f"`{call.name}` by a mask, or at dimensions that are apart")
    for n, i in given.items():
        rows = any(axis.row for axis in resolved(value.dims[n]))
        if rows and isinstance(i.source, Places):
            (dim,) = [d for d in i.dims if d]
            join(value.dims[n], dim)
        else:
            mix(value.dims[n], call.name)
    return at, _broadcast(list(given.values()))


@_rule("index")
def index(call: Call) -> list[Value]:
    """Places by index tensors; along rows only each row's own place."""
    value, chosen = call["self"], list(call["indices"])
    at, among = _chosen_places(call, value, chosen)
    dims = [*value.dims[: at[0]], *among, *value.dims[at[-1] + 1 :]]
    aligned = [None if i is None else Aligned(i, among) for i in chosen]
    return call.made(Made("aten.index.Tensor", (value, Chosen(value.dims, tuple(aligned)))), dims)


@_rule("index_put")
def index_put(call: Call) -> list[Value]:
    """The places that `index` takes, written over."""
    value, chosen = call["self"], list(call["indices"])
    at, among = _chosen_places(call, value, chosen)
    if at[-1] != len(value.dims) - 1:
        raise NotByRows("`index_put` of whole dimensions")
    _join_broadcast(call["values"].dims, among)
    aligned = [None if i is None else Aligned(i, among) for i in chosen]
    made = Made(
        call.full, (value, Chosen(value.dims, tuple(aligned)), Aligned(call["values"], among), call["accumulate"])
    )
    return call.made(made, value.dims)


@_rule("select_scatter", "slice_scatter")
def scattered(call: Call) -> list[Value]:
    """A part of a dimension, written over."""
    value, source, (d,) = call["self"], call["src"], call.dims("dim")
    mix(value.dims[d], call.name)
    others = [dim for n, dim in enumerate(value.dims) if n != d]
    beside = list(source.dims) if call.name == "select_scatter" else [x for n, x in enumerate(source.dims) if n != d]
    for a, b in zip(others, beside, strict=True):
        join(a, b)
    return call.made(call.written(dim=At(value.dims, d)), value.dims)


@_rule(*PRODUCTS)
def product(call: Call) -> list[Value]:
    a, b, letters = {
        "mm": ("self", "mat2", ("ij", "jk", "ik")),
        "bmm": ("self", "mat2", ("bij", "bjk", "bik")),
        "addmm": ("mat1", "mat2", ("ij", "jk", "ik")),
        "baddbmm": ("batch1", "batch2", ("bij", "bjk", "bik")),
        "mv": ("self", "vec", ("ij", "j", "i")),
        "addmv": ("mat", "vec", ("ij", "j", "i")),
        "dot": ("self", "tensor", ("j", "j", "")),
    }[call.name]
    left, right = call[a], call[b]
    places: dict[str, Dim] = {}
    for value, names in ((left, letters[0]), (right, letters[1])):
        for letter, dim in zip(names, value.dims, strict=True):
            if letter in places and places[letter] and dim:
                join(places[letter], dim)
            places[letter] = places.get(letter) or dim
    mix(places["j"], call.name)
    dims = [places[letter] for letter in letters[2]]
    made = Made("einsum", (Product((left, right), letters, dims), (left, right)))
    if "beta" not in call.arguments:
        return call.made(made, dims)
    flows = any(v.grad for v in call.values)
    times = Value(dims, left.dtype, made, grad=flows)
    scaled = Value(dims, left.dtype, Made("aten.mul.Scalar", (times, call["alpha"])), grad=flows)
    added = call["self"]
    _join_broadcast(added.dims, dims)
    sum_ = Made("aten.add.Tensor", (scaled, Aligned(added, dims)), {"alpha": call["beta"]})
    return call.made(sum_, dims)


_FILLED = {"zeros": 0, "ones": 1, "empty": 0, "empty_strided": 0}


@_rule(*[f"{n}_like" for n in (*_FILLED, "full")], *[f"new_{n}" for n in (*_FILLED, "full")], *_FILLED, "full")
def filled(call: Call) -> list[Value]:
    """A tensor of one number. Memory that is not written to yet is as good as zeros."""
    kind = call.name.removesuffix("_like").removeprefix("new_")
    number = call["fill_value"] if kind == "full" else _FILLED[kind]
    fake = call.out[0]
    dims = list(call["self"].dims) if call.name.endswith("_like") else [fresh(size) for size in fake.shape]
    return call.made(Made("aten.full.default", (Shape(dims), number), {"dtype": fake.dtype}), dims, grad=False)


@_rule("scalar_tensor")
def scalar(call: Call) -> list[Value]:
    return call.made(Made("aten.full.default", (Shape(()), call["s"]), {"dtype": call.out[0].dtype}), [], grad=False)


@_rule("arange")
def arange(call: Call) -> list[Value]:
    fake = call.out[0]
    dims = [fresh(fake.shape[0])]
    start, step = call.arguments.get("start", 0), call.arguments.get("step", 1)
    if fake.dtype == torch.int64 and (start, step) == (0, 1):
        return call.made(Places(), dims, grad=False)
    mix(dims[0], call.name)
    return call.made(call.written(dtype=fake.dtype), dims, grad=False)


@_rule("eye")
def eye(call: Call) -> list[Value]:
    fake = call.out[0]
    rows, columns = (fresh(size) for size in fake.shape)
    a = Value([rows, ()], torch.int64, Places())
    b = Value([(), columns], torch.int64, Places())
    dims = [rows, columns]
    equal = Value(dims, torch.bool, Made("aten.eq.Tensor", (Aligned(a, dims), Aligned(b, dims))))
    return call.made(Made("aten._to_copy.default", (equal,), {"dtype": fake.dtype}), dims, grad=False)


@_rule("copy", "fill")
def copied(call: Call) -> list[Value]:
    """What a tensor is written over with."""
    value, source = call["self"], call["src" if call.name == "copy" else "value"]
    if not isinstance(source, Value):
        return call.made(
            Made("aten.full.default", (Shape(value.dims), source), {"dtype": value.dtype}), value.dims, grad=False
        )
    _join_broadcast(source.dims, value.dims)
    cast = Value(source.dims, value.dtype, Made("aten._to_copy.default", (source,), {"dtype": value.dtype}))
    cast.grad = source.grad
    made = Made("aten.expand.default", (Aligned(cast, value.dims), Shape(value.dims)))
    return call.made(made, value.dims, grad=source.grad)


@_rule("diagonal")
def diagonal(call: Call) -> list[Value]:
    """Of rows against classes: the class of each row's own number."""
    value, fake = call["self"], call.out[0]
    if len(value.dims) != 2 or call["offset"] != 0 or fake.shape[0] != _sizes(value)[0]:
        raise NotByRows("a diagonal that is not of each row's own class")
    d = 1 if rows_in(value.dims[1]) else 0
    rows, classes = value.dims[d], value.dims[1 - d]
    mix(classes, call.name)
    places = Aligned(Value([rows], torch.int64, Places()), [rows])
    made = Made("aten.index.Tensor", (value, Chosen(value.dims, (places, places))))
    return call.made(made, [rows])
