# SPDX-License-Identifier: Apache-2.0
"""Runs of a graph's functions, remembered: the next of the same function for arguments of the same kinds needs no dispatcher.

A loss says the same few things many times, and torch's dispatcher with a mode takes longer than all that is noted.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._torch import OpOverload
from .call import replaced, signature, tensors

_OF_TORCH = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType)


def kinds(argument: Any) -> Any:
    """What the shape, strides and dtype of a result depend on: those of tensors, and everything else."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.device
    if isinstance(argument, (tuple, list)):
        return type(argument), *[kinds(a) for a in argument]
    if isinstance(argument, dict):
        return tuple((k, kinds(v)) for k, v in argument.items())
    if isinstance(argument, (float, complex)):
        return type(argument), repr(argument)  # zeros of both signs are equal
    return type(argument), argument


def runs_alike(function: Callable[..., Any], args: Any, kwargs: Any, given: list[Tensor]) -> Any:
    """A key of those runs that do the same operations with the same numbers; None where a run may not be remembered.

    Torch's own functions look at nothing but their arguments; of tensors on meta, at no number in them.
    """
    if not isinstance(function, _OF_TORCH) and not str(getattr(function, "__module__", "")).startswith("torch."):
        return None
    if not all(t.device.type == "meta" for t in given):
        return None
    ids = [id(t) for t in given]
    key = function, kinds(args), kinds(kwargs), tuple(map(ids.index, ids)) if len(ids) > 1 else ()
    try:
        hash(key)
    except TypeError:
        return None
    return key


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor among those that a run was given or has made."""

    number: int


@dataclass(frozen=True)
class _Step:
    """An operation of a run, with slots in the place of tensors."""

    func: OpOverload
    args: Any
    kwargs: Any
    shape: Any = None  # of its one result, in memory of its own; None where it is to be run
    stride: Any = None
    dtype: torch.dtype | None = None


class Run:
    """The operations of a function of a graph, with rules of their own, and what it returns."""

    def __init__(self, given: list[Tensor]) -> None:
        self._seen: list[Tensor] = list(given)
        self._steps: list[_Step] = []
        self._out: Any = None

    def takes(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> bool:
        """Note an operation; whether it can be done again without looking."""
        made = tensors(out)
        if not self._knows((args, kwargs)) or not made or any(t.device.type != "meta" for t in made):
            return False
        if any(t is s for t in made for s in self._seen):
            return False
        step = _Step(func, *(replaced(x, self._slot) for x in (args, kwargs)))
        if type(out) is Tensor and out._base is None and not signature(func).view:
            step = _Step(func, step.args, step.kwargs, out.shape, out.stride(), out.dtype)
        self._steps.append(step)
        self._seen += made
        return True

    def ends(self, out: Any) -> bool:
        """Note what the function returns; whether all of it is known."""
        if not self._knows(out):
            return False
        self._out, self._seen = replaced(out, self._slot), []
        return True

    def _knows(self, tree: Any) -> bool:
        return all(any(t is s for s in self._seen) for t in tensors(tree))

    def _slot(self, tensor: Tensor) -> _Slot:
        return _Slot(next(n for n, t in enumerate(self._seen) if t is tensor))

    def again(self, given: list[Tensor], enter: Callable[..., None]) -> Any:
        """What the function returns for other tensors of the same kinds; `enter` is told of each operation."""
        seen = list(given)

        def tensor(slot: _Slot) -> Tensor:
            return seen[slot.number]

        for step in self._steps:
            args, kwargs = replaced(step.args, tensor, _Slot), replaced(step.kwargs, tensor, _Slot)
            if step.shape is None:
                with torch.no_grad():
                    out = step.func(*args, **kwargs)
            else:
                out = torch.empty_strided(step.shape, step.stride, dtype=step.dtype, device="meta")
            enter(step.func, args, kwargs, out, ())  # which are none of those that it was given, as `takes` saw
            seen += tensors(out)
        return replaced(self._out, tensor, _Slot)
