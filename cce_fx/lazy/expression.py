# SPDX-License-Identifier: Apache-2.0
"""What is asked of lazy tensors, written down: the chains and operations that make it, and the tensors that they read.

Operations that move the rows of logits about are done to hidden here, where a row is D long and not V, and are no part of it:
what is left says the same whatever rows there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._torch import tree_iter, tree_map
from ..passes.autocast import under
from ..passes.canonical import CASTS
from .functions import Op
from .state import HeadChain, State


class NotWritten(Exception):
    """An expression that cannot be written down."""


@dataclass(frozen=True)
class Ref:
    """The result of a step."""

    step: int


@dataclass(frozen=True)
class Input:
    """One of the tensors and numbers that an expression reads."""

    index: int


@dataclass(frozen=True)
class Size:
    """A size that an earlier tensor has, in the place of the number."""

    size: int


@dataclass(frozen=True)
class Step:
    """A function, or a chain's graph, and its arguments, in which `Ref`, `Input` and `Size` stand for what they name."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    autocast: torch.dtype | None
    shape: tuple[int, ...] | None  # of the result, where that is a lazy tensor


@dataclass(frozen=True)
class _Chosen:
    """Some of the rows of logits (*shape, V), by their places (M,) among all."""

    shape: tuple[int, ...]
    places: Tensor


# Operations that give each row what they give it among others, whatever the dimensions before the last.
_ELEMENTWISE = {*CASTS, "contiguous", "mul", "div", "neg", "exp", "log"}
_ALONG_CLASSES = {"softmax", "log_softmax"}
_RESHAPES = {"view", "reshape", "expand"}


class Expression:
    """What some operation makes of lazy tensors.

    Attributes:
        steps: in order; the last is the operation.
        values: what the steps read: hidden states, weights, and the operations' own tensors.
        chains: of the logits that it is made of.
        sizes: sizes of rows, which a kind of expressions leaves open.
        fixed: sizes of classes and hidden states, which are no sizes of rows.
        grad: whether gradients are kept.
        moves: of a single chain, the states from its root on that move its rows, and the step that makes it.
        key: equal for expressions of a kind.
    """

    def __init__(self, grad: bool, device: torch.device) -> None:
        self.grad: bool = grad
        self.device: torch.device = device
        self.steps: list[Step] = []
        self.values: list[Any] = []
        self.chains: list[HeadChain] = []
        self.sizes: list[int] = []
        self.fixed: set[int] = {0, 1}
        self.moves: tuple[list[State], int] | None = None
        self._inputs: dict[Any, int] = {}
        self._made: dict[Any, Ref] = {}
        self._kept: list[Any] = []  # an id is an object's only while it lives

    @property
    def key(self) -> Any:
        number = {size: _Number(at) for at, size in enumerate(self.sizes)}
        values = tuple(
            (tuple(number.get(n, n) for n in v.shape), v.dtype, v.device, v.requires_grad)
            if isinstance(v, Tensor)
            else number.get(v, v) if type(v) is int else v
            for v in self.values
        )  # fmt: skip
        steps = tuple((s.func, _frozen(s.args, number), _frozen(s.kwargs, number), s.autocast) for s in self.steps)
        return self.grad, values, steps

    def add(self, func: Callable[..., Any], args: Any, kwargs: Any, autocast: torch.dtype | None) -> None:
        """An operation on lazy tensors, for which their states stand among the arguments; raises NotWritten."""
        for state in _states((args, kwargs)):
            for root in state.roots:
                assert root.chain is not None
                self.fixed |= {root.like.size(-1), root.chain.hidden.size(-1)} if root.like.dim() else set()
        args, kwargs = tree_map(lambda a: self._argument(a, None), (args, kwargs))
        self._step(func, args, tuple(kwargs.items()), autocast)

    # --- steps

    def _step(self, func: Any, args: Any, kwargs: Any, autocast: Any, shape: Sequence[int] | None = None) -> Ref:
        for size in shape or ():
            self._see(size)
        self.steps.append(Step(func, tuple(args), tuple(kwargs), autocast, None if shape is None else tuple(shape)))
        return Ref(len(self.steps) - 1)

    def _see(self, size: int) -> None:
        """Note a size of rows."""
        if size not in self.fixed and size not in self.sizes:
            self.sizes.append(size)

    def _argument(self, a: Any, chosen: _Chosen | None) -> Any:
        if isinstance(a, State):
            return self._state(a, chosen)
        if isinstance(a, Tensor):
            return self._input(a if chosen is None else _chosen_of(a, chosen))
        return a

    def _input(self, value: Any, key: Any = None) -> Input:
        if key is None:
            key = ("tensor", id(value)) if isinstance(value, Tensor) else ("number", len(self.values))
        if key not in self._inputs:
            self._inputs[key] = len(self.values)
            self.values.append(value)
        return Input(self._inputs[key])

    def _state(self, state: State, chosen: _Chosen | None) -> Ref:
        key = (id(state), id(chosen))
        if key not in self._made:
            self._made[key] = self._written(state, chosen)
            self._kept += [state, chosen]
        return self._made[key]

    def _written(self, state: State, chosen: _Chosen | None) -> Ref:
        states = line_of(state)
        if states[0].op is None:
            return self._rows(states, chosen)
        op, base = state.op, state.base
        assert op is not None and base is not None
        if chosen is None and op.name == "index_select" and op.args[1] == 0:
            return self._selected(state, base, op.args[2])
        if not state.grad and op.is_alias and state.requires_grad:
            raise NotWritten("a view made without gradients is a leaf of its own")
        args, kwargs = tree_map(lambda a: self._argument(a, chosen), (op.args, op.kwargs))
        if op.name in _RESHAPES:
            args = tree_map(lambda a: Size(a) if type(a) is int and a in self.sizes else a, args)
        shape = state.like.shape if chosen is None else None
        return self._cut_off(state, self._step(op.func, args, kwargs, op.autocast, shape))

    def _cut_off(self, state: State, made: Ref) -> Ref:
        """A step's result without a gradient, where it was made without."""
        if state.grad or not self.grad:
            return made
        return self._step(torch.detach, (made,), (), None)

    def _selected(self, state: State, base: State, places: Tensor) -> Ref:
        """Some rows of a calculation are the calculation on these rows."""
        flat = base.op is not None and base.op.name == "flatten" and base.base is not None
        whole = base.base if flat and base.base is not None else base
        if not whole.in_order or base.like.dim() != 2 or whole.like.shape[-1] != base.like.shape[-1]:
            raise NotWritten("rows of what has them in another order")
        self._see(places.numel())
        made = self._state(whole, _Chosen(tuple(whole.like.shape[:-1]), places))
        return self._step(torch.reshape, (made, (-1, state.like.size(-1))), (), None, state.like.shape)

    def _parted(self, states: list[State]) -> tuple[list[State], list[State], bool]:
        """The states of a line that move rows, those that calculate, and whether a gradient flows through all of them."""
        moved, calculations, attached = [], [], states[0].grad and self.grad
        for state in states[1:]:
            assert state.op is not None
            if is_calculation(state.op, state):
                calculations.append(state)
                continue
            if attached and not state.grad and not state.op.detaches:
                raise NotWritten("a view made without gradients is a leaf of its own")
            attached &= not state.op.detaches
            moved.append(state)
        return moved, calculations, attached

    def _rows(self, states: list[State], chosen: _Chosen | None) -> Ref:
        """Logits whose rows were moved, and then taken one by one; made of the hidden states of these rows."""
        chain = states[0].chain
        assert chain is not None
        moved, calculations, attached = self._parted(states)
        last = moved[-1] if moved else states[0]
        if chosen is not None and (last.like.shape[:-1] != chosen.shape or not chain.rowwise):
            raise NotWritten("rows of logits that have others")
        key, hidden = ("rows", id(last), id(chosen), attached), chain.hidden
        if key not in self._inputs:
            with torch.set_grad_enabled(attached):
                hidden = hidden if attached else hidden.detach()
                hidden = moved_rows(hidden, moved)
                hidden = hidden if chosen is None else _chosen_of(hidden, chosen)
        given = self._input(hidden, key)
        for size in self.values[given.index].shape[:-1]:
            self._see(size)
        alone = not self.chains and chosen is None and chain.rowwise
        self.moves = ([states[0], *moved], len(self.steps)) if alone else None
        self.chains.append(chain)
        inputs = [
            self._input(x if attached else x.detach(), ("input", id(x), attached))
            if isinstance(x, Tensor)
            else self._input(x)
            for x in chain.inputs
        ]
        made = self._step(chain.run, (given, *inputs), (), chain.autocast)
        for state in calculations:
            op = state.op
            assert op is not None
            args, kwargs = _on_rows(op)
            made = self._cut_off(state, self._step(op.func, (made, *args), kwargs, op.autocast))
        if chosen is None:
            self.steps[-1] = replace(self.steps[-1], shape=tuple(states[-1].like.shape))
        return made


@dataclass(frozen=True)
class _Number:
    """In a key: the number of a size that is left open."""

    at: int


def _frozen(value: Any, number: dict[int, _Number]) -> Any:
    """A hashable likeness of arguments."""
    if isinstance(value, (tuple, list)):
        return (type(value), *(_frozen(v, number) for v in value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v, number)) for k, v in value.items())
    if isinstance(value, slice):
        return (slice, value.start, value.stop, value.step)
    if isinstance(value, Size):
        return (Size, number[value.size])
    return (type(value), repr(value) if type(value) is float else value)  # 0.0 equals -0.0


def _states(tree: Any) -> list[State]:
    return [x for x in tree_iter(tree) if isinstance(x, State)]


def line_of(state: State) -> list[State]:
    """The states from a root to this one, if nothing but moves and calculations on single rows are between; or this one."""
    found = [state]
    while found[-1].op is not None:
        last = found[-1]
        assert last.op is not None and last.base is not None
        if not is_calculation(last.op, last) and _mover(last) is None:
            return [state]
        found.append(last.base)
    chain = found[-1].chain
    if chain is None or not (chain.rowwise or all(is_calculation(s.op, s) for s in found[:-1] if s.op is not None)):
        return [state]
    return found[::-1]


def _mover(state: State) -> Callable[[Tensor], Tensor] | None:
    assert state.op is not None and state.base is not None
    return mover(state.op, state.base.like.shape, state.like.shape)


def moved_rows(hidden: Tensor, states: list[State]) -> Tensor:
    """The rows of hidden after the moves by which these states are made."""
    for state in states:
        move = _mover(state)
        assert move is not None
        hidden = move(hidden)
    return hidden


def is_calculation(op: Op, state: State) -> bool:
    """Whether an operation calculates with the numbers of each row of classes, the last dimension, and no other tensor."""
    if any(isinstance(a, Tensor) for a in tree_iter((op.args, op.kwargs))) or len(_states((op.args, op.kwargs))) > 1:
        return False
    if op.name in _ALONG_CLASSES:
        dim = dict(op.kwargs).get("dim", op.args[1] if len(op.args) > 1 else None)
        return (
            dim in (-1, state.like.dim() - 1)
            and len(op.args) <= 2
            and not dict(op.kwargs).keys() - {"dim", "_stacklevel"}
        )
    return op.name in _ELEMENTWISE and isinstance(op.args[0], State)


def mover(op: Op, before: Sequence[int], after: Sequence[int]) -> Callable[[Tensor], Tensor] | None:
    """What moves the rows of hidden (..., D) as an operation moves those of logits `before` (..., V) to `after` (..., V).

    None where it does something else.
    """
    args, rank = op.args[1:], len(before)
    if rank < 2 or not after or after[-1] != before[-1] or op.kwargs:
        return None

    def among_rows(dims: Any) -> bool:
        return all(d % rank != rank - 1 for d in tree_iter(dims))

    match op.name:
        case "detach":
            return lambda hidden: hidden
        case "view" | "reshape" | "flatten" | "unflatten" | "squeeze" | "unsqueeze":
            return lambda hidden: hidden.reshape(*after[:-1], hidden.size(-1))
        case "getitem":
            index = args[0] if isinstance(args[0], tuple) else (args[0],)
            behind = index[index.index(Ellipsis) + 1 :] if Ellipsis in index else ()
            touched = any(i is not None for i in behind) or sum(i is not None for i in index) == rank
            return None if index[-1] is None or (touched and index[-1] != slice(None)) else lambda hidden: hidden[index]
        case "select" | "narrow" | "index_select" if among_rows(args[0]):
            return lambda hidden: op.func(hidden, *args)
        case "transpose" | "movedim" if among_rows(args):
            return lambda hidden: op.func(hidden, *args)
        case "permute":
            order = [d % rank for d in tree_iter(args)]
            return (lambda hidden: hidden.permute(order)) if order[-1] == rank - 1 else None
    return None


def is_moved(state: State) -> bool:
    """Whether a tensor is rows of logits that `read_rows` gives."""
    states = line_of(state)
    chain = states[0].chain
    return chain is not None and chain.rowwise and len(states) > 1 and len({s.grad for s in states}) == 1


def read_rows(state: State) -> Tensor:
    """The values of a tensor that is some rows of unread logits, without the other rows."""
    root, *rest = line_of(state)
    root.check_fresh()
    chain = root.chain
    assert chain is not None
    grad = state.grad and not any(s.op is not None and s.op.detaches for s in rest)
    with torch.inference_mode(False), torch.set_grad_enabled(grad):
        calculations = [s for s in rest if s.op is not None and is_calculation(s.op, s)]
        value = chain.logits(moved_rows(chain.hidden, [s for s in rest if s not in calculations]))
        for op in (s.op for s in calculations if s.op is not None):
            args, kwargs = _on_rows(op)
            with under(op.device, op.autocast):
                value = op.func(value, *args, **dict(kwargs))
    state.hook_up(value)
    return value


def _on_rows(op: Op) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    """The further arguments of a calculation whose rows may lie along other dimensions."""
    return ((-1,), ()) if op.name in _ALONG_CLASSES else (op.args[1:], op.kwargs)


def _chosen_of(t: Tensor, chosen: _Chosen) -> Tensor:
    """A tensor's rows (1, ..., 1, M, ...) that are chosen; itself where it has none."""
    rank = len(chosen.shape)
    if t.dim() == rank + 1 and tuple(t.shape[:-1]) == chosen.shape:
        rows = t.reshape(-1, t.size(-1)).index_select(0, chosen.places)
        return rows.view(*[1] * (rank - 1), *rows.shape)
    if t.numel() == 1 or not set(t.shape) & ({*chosen.shape} - {1}):
        return t
    raise NotWritten("a tensor whose rows are not told from its other dimensions")
