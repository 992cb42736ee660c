# SPDX-License-Identifier: Apache-2.0
"""`LazyLogits`: stands in for logits that a compiled program returns and that nobody may ever read.

It has the logits' shape, dtype, device and strides, and computes them when somebody looks. Operations that only move rows
about, cast or scale stay lazy, because a training framework casts every output without looking at it; a loss on lazy
logits is cut like a loss inside the graph; reductions over the vocabulary go block by block of rows (`operations.py`).
Everything else reads the logits, and from then on the object is the plain tensor. Code that gets at the tensor below Python finds the
result of an autograd function, which computes the logits' graph when their gradient arrives.

What it keeps alive: hidden (N x D, with its autograd graph), and references to weight and bias, which are alive anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import swap_tensors

from .._torch import (
    DisableTorchFunctionSubclass,
    FakeTensorMode,
    disable_dynamo,
    throw_on_data_ptr,
    tree_iter,
    tree_map,
)
from ..passes.autocast import under
from .functions import METADATA, Op
from .gathered import is_let_go_early
from .state import LOCK, HeadChain, State

# `(func, args, kwargs) -> result or NotImplemented`, asked in order before the logits are read.
HANDLERS: list[Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]] = []


# Logits of fewer bytes are worth no waiting where they need no gradient.
_LARGE = 16 << 20


def are_large(logits: Tensor) -> bool:
    """Whether logits, or what stands for them, are lazy without a gradient too. Sizes that are symbols are the example's."""
    size = logits.numel() * logits.dtype.itemsize
    return bool((size if isinstance(size, int) else size.node.hint or 0) >= _LARGE)


class LazyLogits(Tensor):
    """Logits that compute themselves when read. Made by the backend; see the module's text.

    Once read, the object is the plain tensor: an instance of `torch.Tensor`, and of this class no more. Where something else
    holds on to it (an autograd function that saved it, a weak reference) it stays, and stands for the plain tensor.

    Raises:
        RuntimeError: when read after hidden, weight or bias changed, but for the step of an optimizer.
    """

    state: State

    @classmethod
    def make(cls, chain: HeadChain, like: Tensor | None = None) -> LazyLogits:
        """Lazy logits of a chain; `like` is a (meta) tensor of the logits' shape, strides and dtype, if known."""
        state = State.made_by(chain, _meta_run(chain) if like is None else like)
        state.requires_grad = state.grad and any(t.requires_grad for t in chain.tensors)
        return _shell(state, chain)

    @classmethod
    def hand_out(cls, chain: HeadChain, like: Tensor | None = None, *, at_any_size: bool = False) -> Tensor:
        """Lazy logits for a program; plain ones where they are small and no gradient is kept, as of a token that is generated.

        Weights that will be gone when somebody reads are read while they are there.
        """
        lazy = cls.make(chain, like)
        waits = at_any_size or lazy.requires_grad or are_large(lazy.state.like)
        return lazy if waits and not any(is_let_go_early(t) for t in chain.tensors) else lazy.materialize()

    def derive(self, op: Op, like: Tensor) -> LazyLogits:
        """This tensor after one operation that stays lazy."""
        chain, state = self.state.unread, self.state.then(op, like)
        assert chain is not None
        differentiable = any(x.requires_grad for x in tree_iter((op.args, op.kwargs)) if isinstance(x, (State, Tensor)))
        differentiable &= like.is_floating_point() or like.is_complex()
        # A view made without gradients of a tensor that has one is a leaf with one.
        state.requires_grad = differentiable and not op.detaches and (state.grad or op.is_alias)
        return _shell(state, chain)

    @property
    def chain(self) -> HeadChain | None:
        """What an unread tensor will be computed from; None once the logits were read."""
        return self.state.unread

    def materialize(self) -> Tensor:
        """This object as a plain tensor, computed at the first call, with its autograd graph.

        Raises:
            RuntimeError: when hidden, weight or bias changed since the forward.
        """
        with LOCK:
            if not isinstance(self, LazyLogits):
                return self  # another thread was faster
            state = self.state
            given, value = state.given, state.give()
            if given:
                return value
            try:
                with DisableTorchFunctionSubclass():
                    swap_tensors(self, value)
            except RuntimeError:  # one of them is held by something else
                return value
            state.given_as(self)
            return self

    @classmethod
    @disable_dynamo(recursive=True)
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA and isinstance(args[0], LazyLogits):
            value = args[0].state.value
            with DisableTorchFunctionSubclass():
                return func(args[0] if value is None else value, *args[1:], **kwargs)
        with LOCK:  # no other thread reads them meanwhile
            lazies = [x for x in tree_iter((args, kwargs)) if isinstance(x, LazyLogits)]
            for lazy in lazies:
                _keep_graph(lazy)
            for handle in HANDLERS:
                found = handle(func, args, kwargs)
                if found is not NotImplemented:
                    return found
            args, kwargs = tree_map(_plain, (args, kwargs))
        found = func(*args, **kwargs)
        # What is changed in place is returned as the very tensor that was given.
        return next((x for x in lazies if isinstance(x, LazyLogits) and found is x.state.value), found)

    @classmethod
    @disable_dynamo(recursive=True)
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Below autograd, where C++ got at the tensor without asking; the gradient is `_Made`'s."""
        kwargs = kwargs or {}
        if func._schema.is_mutable:  # the memory itself is meant
            for x in tree_iter((args, kwargs)):
                if isinstance(x, LazyLogits):
                    x.state.give()
        args, kwargs = tree_map(_bare, (args, kwargs))
        return func(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.materialize().__deepcopy__(memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.materialize())


@disable_dynamo(recursive=True)
def _in_place(operation: Callable[..., Any], lazy: Tensor, other: Any) -> Any:
    return operation(lazy, other)


def _operator(name: str) -> Callable[..., Any]:
    operation = getattr(Tensor, name)

    def method(self: Tensor, other: Any) -> Any:
        return _in_place(operation, self, other)

    return method


# Dynamo reads Python's in-place operators of a class like this one by calling the method, and the method by the operator.
for _name in (
    f"__{name}__" for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "iand", "ior", "ixor")
):
    setattr(LazyLogits, _name, _operator(_name))


class _Made(torch.autograd.Function):
    """Ties a lazy tensor to what it is made from, for code that differentiates it without asking for its values."""

    @staticmethod
    def forward(state: State, device: torch.device, *tensors: Tensor) -> LazyLogits:
        return _new(state, device)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.state, _, *ctx.tensors = inputs
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        found: Any = [None] * len(needs)
        if grad is not None:
            wanted = [t for t, need in zip(ctx.tensors, needs, strict=True) if need]
            again = torch.is_grad_enabled()
            with torch.enable_grad():
                made = iter(torch.autograd.grad(
                    ctx.state.read(), wanted, grad, retain_graph=True, create_graph=again, allow_unused=True))  # fmt: skip
            found = [next(made) if need else None for need in needs]
        return (None, None, *found)


_Made.forward.__signature__ = inspect.signature(_Made.forward)  # type: ignore[attr-defined]  # torch asks at each call


class _Read(torch.autograd.Function):
    """The values of a lazy tensor that has another autograd graph than the one it was made with, with that graph."""

    @staticmethod
    def forward(lazy: LazyLogits, state: State) -> Tensor:
        return state.read_bare().clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _keep_graph(lazy: LazyLogits) -> None:
    """Read a tensor that was given a graph by an autograd function of the program's, which returned it."""
    state = lazy.state
    with DisableTorchFunctionSubclass():
        if state.value is not None or lazy.requires_grad == state.requires_grad:
            return
    with torch.enable_grad():
        value = _Read.apply(lazy, state)
    lazy.state = State(state.like, True)
    lazy.state.value = value


def _shell(state: State, chain: HeadChain) -> LazyLogits:
    """The tensor in front of a state that is made from a chain."""
    device = chain.hidden.device
    if not (state.requires_grad and state.grad):
        return _new(state, device)
    with torch.enable_grad():
        return _Made.apply(state, device, *state.tensors)


def _new(state: State, device: torch.device) -> LazyLogits:
    like = state.like
    lazy = Tensor._make_wrapper_subclass(
        LazyLogits,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=device,
        requires_grad=state.requires_grad and not state.grad,
    )
    throw_on_data_ptr(lazy)
    lazy.state = state
    return lazy


def base_of(lazy: LazyLogits) -> Tensor | None:
    """What an unread tensor is a view of, as `Tensor._base`; None where it is no view."""
    owner, chain = lazy.state.viewed(), lazy.state.unread
    if owner is lazy.state:
        return None
    if owner.value is not None:
        return owner.value if owner.value._base is None else owner.value._base
    assert chain is not None
    return _shell(owner, chain)


def _plain(x: Any) -> Any:
    return x.materialize() if isinstance(x, LazyLogits) else x


def _bare(x: Any) -> Any:
    return x.state.read_bare() if isinstance(x, LazyLogits) else x


def _meta_run(chain: HeadChain) -> Tensor:
    """Shape, strides and dtype of a chain's result, from a run on the meta device."""
    mode = FakeTensorMode()
    args = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in (chain.hidden.detach(), *chain.inputs)]
    with mode, torch.no_grad(), under(chain.hidden.device, chain.autocast):
        made = chain.run(*args)
    return torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
