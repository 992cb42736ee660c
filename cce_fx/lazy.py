# SPDX-License-Identifier: Apache-2.0
"""`LazyLogits`: stands in for logits that a compiled program returns and that nobody may ever read.

It has the logits' shape, dtype, device and strides, and computes them when somebody looks. Operations that only move rows
about, cast or scale stay lazy, because a training framework casts every output without looking at it; a loss on lazy
logits is cut like a loss inside the graph (`cce_fx.lazy_loss`); reductions over the vocabulary go block by block of rows.
Everything else reads the logits once and works on the plain tensor.

What it keeps alive: hidden (N x D, with its autograd graph), and references to weight and bias, which are alive anyway.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import gathered, lazy_ops
from ._torch import DisableTorchFunctionSubclass, disable_dynamo, tree_iter, tree_map

_STALE = (
    "these logits are lazy and were not read while they could be: {what} changed in place since the forward (by "
    "optimizer.step(), perhaps), so reading them now would give other values. Read them before, or compile with "
    "options={{'logits': 'keep'}}."
)


_LET_GO = (
    "these logits are lazy and FSDP has let go of the gathered weight that they are made from. Read them before the "
    "backward, or compile with options={'logits': 'keep'}."
)


@dataclass(frozen=True)
class HeadChain:
    """How logits are made.

    Attributes:
        hidden: (..., D), an output of the compiled graph; with its autograd graph where the program has one.
        inputs: what else `run` takes: weight, bias, symbolic sizes.
        run: `run(hidden, *inputs)` gives the logits.
    """

    hidden: Tensor
    inputs: tuple[Any, ...]
    run: GraphModule

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.hidden, *(x for x in self.inputs if isinstance(x, Tensor)))


def _stamp(t: Tensor) -> tuple[Any, int]:
    """Changes with every in-place change of a tensor, and when its memory is exchanged."""
    shard = gathered.shard_of(t)
    if shard is not None:
        with torch.no_grad():
            return (_stamp(shard.to_local()), shard._version)  # type: ignore[attr-defined]
    return (None if t.is_inference() else t._version, t.data_ptr())


@dataclass
class _State:
    """Behind one LazyLogits: either a chain, or an operation on another LazyLogits; or the value."""

    chain: HeadChain | None
    base: LazyLogits | None
    op: lazy_ops.Op | None
    stamps: tuple[tuple[Any, int], ...]
    grad: bool  # grad mode of the forward
    value: Tensor | None = None
    hooks: tuple[Callable[..., Any], ...] = ()  # FSDP's, which gather the weights before the backward


class LazyLogits(Tensor):
    """Logits that compute themselves when read. Made by the backend; see the module's text.

    Raises:
        RuntimeError: when read after hidden, weight or bias changed in place.
    """

    _state: _State
    _children: weakref.WeakSet[LazyLogits]
    _lock: threading.RLock

    @staticmethod
    def _wrap(like: Tensor, state: _State, requires_grad: bool) -> LazyLogits:
        lazy = Tensor._make_wrapper_subclass(
            LazyLogits,
            like.shape,
            strides=like.stride(),
            storage_offset=like.storage_offset(),
            dtype=like.dtype,
            device=state.chain.hidden.device if state.chain else state.base.device,  # type: ignore[union-attr]
            requires_grad=requires_grad,
        )
        lazy._state, lazy._children, lazy._lock = state, weakref.WeakSet(), threading.RLock()
        return lazy

    @classmethod
    def make(cls, chain: HeadChain, like: Tensor | None = None) -> LazyLogits:
        """Lazy logits of a chain; `like` is a (meta) tensor of the logits' shape, strides and dtype, if known."""
        if like is None:
            like = _meta_run(chain)
        grad = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        tensors = chain.tensors
        stamps = tuple([_stamp(t) for t in tensors])
        needs = grad and any(t.requires_grad for t in tensors)
        return cls._wrap(like, _State(chain, None, None, stamps, grad), needs)

    def _derive(self, op: lazy_ops.Op, like: Tensor) -> LazyLogits:
        """This tensor after one operation that stays lazy."""
        needs = self._requires_grad() and not op.detaches and (torch.is_grad_enabled() or op.is_alias)
        made = LazyLogits._wrap(like, _State(None, self, op, (), torch.is_grad_enabled()), needs)
        self._children.add(made)
        return made

    def _requires_grad(self) -> bool:
        with DisableTorchFunctionSubclass():
            return self.requires_grad

    def materialize(self) -> Tensor:
        """The logits as a plain tensor, computed at the first call, with their autograd graph.

        Raises:
            RuntimeError: when hidden, weight or bias changed in place since the forward.
        """
        with self._lock:
            state = self._state
            if state.value is None:
                with torch.inference_mode(False), torch.set_grad_enabled(state.grad):
                    state.value = self._compute(state)
                self.hook_up(state.value)
                # The references have done their work; what autograd needs it holds by itself.
                state.chain = state.base = state.op = None
            return state.value

    def _compute(self, state: _State) -> Tensor:
        if state.chain is not None:
            self.check_fresh()
            with torch.autocast(self.device.type, enabled=False):
                return state.chain.run(state.chain.hidden, *state.chain.inputs)
        assert state.base is not None and state.op is not None
        # A few rows are read without the others, as a loop over chunks of the logits does.
        if self.chain is not None and 2 * self._size() <= self.root._size():
            from .lazy_loss import read_rows

            rows = read_rows(self)
            if rows is not NotImplemented:
                return rows
        return state.op.apply(state.base.materialize())

    def _size(self) -> int:
        with DisableTorchFunctionSubclass():
            return self.numel()

    def check_fresh(self) -> None:
        """Raise RuntimeError where the chain's inputs changed since the forward."""
        root = self.root
        chain = root._state.chain
        if chain is None:
            return
        for at, (tensor, stamp) in enumerate(zip(chain.tensors, root._state.stamps, strict=True)):
            if not gathered.is_there(tensor):
                raise RuntimeError(_LET_GO)
            if _stamp(tensor) != stamp:
                raise RuntimeError(_STALE.format(what="hidden" if at == 0 else "the weight or bias"))

    def hook_up(self, made: Tensor) -> None:
        """Put the hooks that were put off onto what was made of these logits."""
        for hook in self.root._state.hooks if made.requires_grad else ():
            made.register_hook(hook)

    def _hook(self, hook: Callable[..., Any]) -> bool:
        """Put off a hook of FSDP's, that asks for no gradient, until the logits or their loss are made; False if too late."""
        with self._lock:
            state = self.root._state
            if state.chain is None or not gathered.is_gathering(hook):
                return False
            state.hooks = (*state.hooks, hook)
            return True

    @property
    def root(self) -> LazyLogits:
        """The logits that this tensor is a view, cast or scale of."""
        lazy = self
        while lazy._state.base is not None:
            lazy = lazy._state.base
        return lazy

    @property
    def ops(self) -> tuple[lazy_ops.Op, ...]:
        """The lazy operations between the root and this tensor, in order."""
        found: list[lazy_ops.Op] = []
        lazy = self
        while lazy._state.base is not None:
            found.append(lazy._state.op)  # type: ignore[arg-type]
            lazy = lazy._state.base
        return tuple(reversed(found))

    @property
    def chain(self) -> HeadChain | None:
        """The chain of an unread tensor; None once the root was read."""
        return self.root._state.chain

    def _before_writing(self) -> None:
        """An in-place change reaches every view of this memory: read the whole family first, as one."""
        with self._lock:
            root = self.root
            for lazy in (root, *_family(root)):
                lazy.materialize()

    def _is_alias(self) -> bool:
        with self._lock:
            op, value = self._state.op, self._state.value
        return bool(op and op.is_alias) if value is None else value._is_view()

    def _detach_in_place(self) -> LazyLogits:
        """Without a look at the logits, and without the autograd graph of hidden: a pipeline's schedule detaches every output."""
        with self._lock:
            state = self._state
            if state.chain is not None and not self._children:
                state.chain = replace(state.chain, hidden=state.chain.hidden.detach())
                state.grad = False
            else:  # views of it keep their gradient, and a view cannot be detached: torch says so
                self._before_writing()
                self.materialize().detach_()
        with DisableTorchFunctionSubclass():
            self.requires_grad_(False)
        return self

    @classmethod
    @disable_dynamo(recursive=True)
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in lazy_ops.METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == lazy_ops.IS_LEAF:
            return not args[0].requires_grad
        if func is lazy_ops.IS_VIEW:
            return args[0]._is_alias()
        if func in lazy_ops.DETACH_:
            return args[0]._detach_in_place()
        if func == lazy_ops.BASE and args[0]._state.value is None:
            return args[0]._state.base if args[0]._is_alias() else None
        if func is lazy_ops.REGISTER_HOOK and args[0]._hook(args[1]):
            return None
        found = lazy_ops.stay_lazy(func, args, kwargs)
        if found is not NotImplemented:
            return found
        if lazy_ops.writes(func, kwargs):
            for x in tree_iter((args, kwargs)):
                if isinstance(x, LazyLogits):
                    x._before_writing()
        args, kwargs = tree_map(_plain, (args, kwargs))
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    @disable_dynamo(recursive=True)
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, where C++ got at the tensor without asking (`torch.func`, say): read it.

        A gradient can no longer be attached here, so one that is due is an error.
        """
        lazies = [x for x in tree_iter((args, kwargs)) if isinstance(x, LazyLogits)]
        if torch.is_grad_enabled() and any(x._requires_grad() for x in lazies):
            raise RuntimeError(f"lazy logits were given to {func} in a way that loses their gradient; pass "
                               "logits.materialize() instead")  # fmt: skip
        args, kwargs = tree_map(_plain, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().__deepcopy__(memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())


def _plain(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyLogits) else x


def _family(lazy: LazyLogits) -> Iterable[LazyLogits]:
    for child in list(lazy._children):
        yield child
        yield from _family(child)


def _meta_run(chain: HeadChain) -> Tensor:
    """Shape, strides and dtype of a chain's result, from a run on the meta device."""
    args = [x.to("meta") if isinstance(x, Tensor) else x for x in (chain.hidden.detach(), *chain.inputs)]
    with torch.no_grad(), torch.autocast(chain.hidden.device.type, enabled=False):
        return chain.run(*args)
