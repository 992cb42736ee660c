# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors that lazy logits are made from are still those of the forward; and copies of those that a step will change.

Most changes count a tensor's version up. Fused optimizers do not, nor do changes through `.data`, numpy or a second view of
the memory made by hand. For these some hundred entries are remembered, which a change of all weights cannot miss.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .._torch import disable_dynamo
from . import gathered

_ROWS, _COLUMNS = 128, 4  # of the entries that are remembered
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # so that a NaN equals itself


@dataclass(frozen=True)
class Witness:
    """A tensor as it was: what tells that it changed.

    Attributes:
        tensor: of any shape.
        count: its version, and the version of FSDP's shard that it was gathered from; None where nobody counts.
        place: where its memory is.
        entries: some of its values, spread over rows; None of a tensor that is not plain and floating.
    """

    tensor: Tensor
    count: Any
    place: int
    entries: Tensor | None

    @staticmethod
    def of(tensor: Tensor) -> Witness:
        return Witness(tensor, *_count(tensor), _entries(tensor, keep=True))

    @property
    def changed(self) -> bool:
        """Whether the tensor's version or memory is another. Free."""
        return _count(self.tensor) != (self.count, self.place)

    def is_other(self) -> bool:
        """Whether the tensor changed, as far as that can be known."""
        same = None if self.changed else self.same_entries
        return self.changed if same is None else not same

    @property
    def same_entries(self) -> Tensor | None:
        """Whether the entries are what they were, a bool () on the tensor's device; None where none are remembered."""
        now = None if self.entries is None else _entries(self.tensor, keep=False)
        if now is None or self.entries is None:
            return None
        bits = _BITS[now.element_size()]
        return (now.contiguous().view(bits) == self.entries.view(bits)).all()


def _count(t: Tensor) -> tuple[Any, int]:
    shard = gathered.shard_of(t)
    if shard is not None:
        with torch.no_grad():
            return (_count(shard.to_local()), shard._version), 0  # type: ignore[attr-defined]
    return (None if t.is_inference() else t._version), t.data_ptr()


def _entries(t: Tensor, *, keep: bool) -> Tensor | None:
    """A grid of a tensor's entries, all of its last dimensions' ends among them; a copy of it to `keep`."""
    if type(t) not in (Tensor, Parameter) or not t.is_floating_point() or t.numel() == 0 or t.device.type == "meta":
        return None
    if not gathered.is_there(t):
        return None
    with torch.no_grad():
        grid = t.as_strided(*_grid(t.shape, t.stride()))
        return grid.clone(memory_format=torch.contiguous_format) if keep else grid


@functools.lru_cache(256)
def _grid(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of the grid."""
    most = (_COLUMNS,) if len(shape) > 1 else (_ROWS * _COLUMNS,)
    wanted = [_ROWS if at == 0 else 1 for at in range(len(shape) - 1)] + list(most) if shape else []
    every = [-(-have // want) for have, want in zip(shape, wanted, strict=True)]
    sizes = tuple(-(-have // step) for have, step in zip(shape, every, strict=True))
    return sizes, tuple(step * by for step, by in zip(stride, every, strict=True))


class Overtaken(Protocol):
    """What a step would change the weights of: lazy logits that nobody has read."""

    def outlive(self, copies: Copies) -> None:
        """Take copies of what the step will change."""


class Copies:
    """Copies of the tensors that an optimizer's step is about to change, one for each, whoever asks."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        parameters = [p for p in parameters if isinstance(p, Tensor)]
        self._changing: set[int] = {id(p) for p in parameters}
        self._memory: set[int] = {p.untyped_storage().data_ptr() for p in parameters if type(p) in (Tensor, Parameter)}
        self._made: dict[Any, Tensor] = {}

    def of(self, t: Tensor, grad: bool) -> Tensor:
        """A copy of a tensor that the step changes, with its autograd graph where `grad`; itself where it does not."""
        shard = gathered.shard_of(t)
        known = t if shard is None else shard
        if id(known) not in self._changing and (shard is not None or self._place(t) not in self._memory):
            return t
        key = (t.data_ptr(), t.shape, t.stride(), t.dtype, t.requires_grad, grad)
        if key not in self._made:
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                self._made[key] = t.clone()
        return self._made[key]

    @staticmethod
    def _place(t: Tensor) -> int:
        return t.untyped_storage().data_ptr() if type(t) in (Tensor, Parameter) else 0


_unread: weakref.WeakSet[Any] = weakref.WeakSet()


def keep_through_steps(lazy: Overtaken) -> None:
    """Have `lazy.outlive` called before a step of any optimizer of torch changes a weight, while `lazy` is alive."""
    _unread.add(lazy)


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The step's arguments: `step(self, closure)`. A closure runs forwards of its own before the step changes anything."""
    # A step that is being compiled is no step. What it changes counts the versions up, so reading is an error then.
    if torch.compiler.is_compiling():
        return None
    _copy_for(optimizer)
    if callable(kwargs.get("closure")):
        return args, {**kwargs, "closure": _then_copied(kwargs["closure"], optimizer)}
    if len(args) > 1 and callable(args[1]):
        return (args[0], _then_copied(args[1], optimizer), *args[2:]), kwargs
    return None


def _then_copied(closure: Callable[[], Any], optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    def call() -> Any:
        found = closure()
        _copy_for(optimizer)
        return found

    return call


@disable_dynamo(recursive=True)
def _copy_for(optimizer: torch.optim.Optimizer) -> None:
    waiting = list(_unread)
    if waiting:
        copies = Copies(p for group in optimizer.param_groups for p in group["params"])
        for lazy in waiting:
            lazy.outlive(copies)


# At import, and not with the first lazy logits: those may be made by a closure, inside a step.
register_optimizer_step_pre_hook(_before_step)
