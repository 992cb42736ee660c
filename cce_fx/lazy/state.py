# SPDX-License-Identifier: Apache-2.0
"""What is behind a `LazyLogits`: how the value is made, the value once somebody read it, and the views of its memory."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from . import gathered
from .functions import Op
from .weights import Copies, Witness, keep_through_steps, was_read

_STALE = (
    "these logits are lazy and were not read while they could be: {what} changed since the forward, so reading them now would "
    "give other values. A step of an optimizer of torch leaves them as they were; after any other change they have to be "
    "read before it. Or compile with options={{'logits': 'keep'}}."
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
        outlives_steps: whether copies of the weights are taken before an optimizer's step changes them.
    """

    hidden: Tensor
    inputs: tuple[Any, ...]
    run: GraphModule
    outlives_steps: bool = False

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """hidden and the tensors among the inputs."""
        return (self.hidden, *(x for x in self.inputs if isinstance(x, Tensor)))

    def logits(self) -> Tensor:
        """The logits, a plain tensor."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return self.run(self.hidden, *self.inputs)


class State:
    """A tensor that is not read yet, or its value: the root of a family made by a chain, or an operation on another state.

    Attributes:
        like: its shape, strides and dtype, on the meta device.
        chain: of a root that was not read.
        base, op: of another state that was not read.
        grad: grad mode in which it was made, and in which the value will be.
        value: the plain tensor, once read. Views of it are views of this tensor.
        part: a value of its own, where some rows were read without the others; nobody holds views of it.
        passed_by: of a root: whether a gradient reaches hidden by another way than through the value.
        hooks: FSDP's, of a root: they gather the weights before the backward.
    """

    def __init__(self, like: Tensor, grad: bool) -> None:
        self.like: Tensor = like
        self.chain: HeadChain | None = None
        self.base: State | None = None
        self.op: Op | None = None
        self.grad: bool = grad
        self.value: Tensor | None = None
        self.part: Tensor | None = None
        self.passed_by: bool = False
        self.hooks: tuple[Callable[..., Any], ...] = ()
        self._witnesses: tuple[Witness, ...] = ()
        self._bare: Tensor | None = None  # the value without an autograd graph, made below autograd
        self._derived: weakref.WeakSet[State] = weakref.WeakSet()
        self._lock: threading.RLock = threading.RLock()

    @staticmethod
    def made_by(chain: HeadChain, like: Tensor) -> State:
        """The root of a family."""
        state = State(like, torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        state.chain, state._witnesses = chain, tuple([Witness.of(t) for t in chain.tensors])
        if chain.outlives_steps:
            keep_through_steps(state)
        return state

    def then(self, op: Op, like: Tensor) -> State:
        """This tensor after one more operation."""
        state = State(like, torch.is_grad_enabled())
        state.base, state.op = self, op
        self._derived.add(state)
        return state

    # --- its place in the family -----------------------------------------------------------------------------------------

    def path(self) -> list[State]:
        """The states from the root to this one."""
        found = [self]
        while found[-1].base is not None:
            found.append(found[-1].base)
        return found[::-1]

    @property
    def root(self) -> State:
        """What this is a view, cast or scale of."""
        return self.path()[0]

    @property
    def ops(self) -> tuple[Op, ...]:
        """The operations between the root and this tensor, in order."""
        return tuple(state.op for state in self.path() if state.op is not None)

    @property
    def unread(self) -> HeadChain | None:
        """The chain that it will be computed from; None once the root was read."""
        return self.root.chain

    def owner(self) -> State:
        """The state whose memory this one's is."""
        state = self
        while state.base is not None and state.op is not None and state.op.is_alias:
            state = state.base
        return state

    def family(self) -> Iterator[State]:
        """This state and all that is derived from it."""
        yield self
        for child in list(self._derived):
            yield from child.family()

    # --- reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """The value, a plain tensor, computed at the first call, with its autograd graph.

        Raises RuntimeError when hidden, weight or bias changed since the forward.
        """
        with self._lock:
            if self.value is None:
                with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
                    self.value = self._compute()
                self.hook_up(self.value)
                # The references have done their work; what autograd needs it holds by itself.
                self.chain = self.base = self.op = self.part = self._bare = None
                self._witnesses = ()
                was_read(self)
            return self.value

    def _compute(self) -> Tensor:
        if self.chain is not None:
            self.check_fresh()
            return self.chain.logits()
        assert self.base is not None and self.op is not None
        return self.op.apply(self.base.read())

    def read_bare(self) -> Tensor:
        """The value for code below autograd: what is computed there has no graph, and is not to be taken for the value."""
        with self._lock:
            if self.value is not None:
                return self.value.detach()
            if self._bare is None:
                with torch.no_grad():
                    if self.chain is not None:
                        self.check_fresh()
                        self._bare = self.chain.logits()
                    else:
                        assert self.base is not None and self.op is not None
                        self._bare = self.op.apply(self.base.read_bare())
            return self._bare

    def read_family(self) -> None:
        """Before an in-place change, which reaches every view of the memory: read all of them, as views of one another."""
        with self._lock:
            for state in list(self.root.family()):
                state.read()

    def hook_up(self, made: Tensor) -> None:
        """Put the hooks that were put off onto what was made of these logits."""
        if made.requires_grad:
            self.root.passed_by |= made is not self.value
            for hook in self.root.hooks:
                made.register_hook(hook)

    # --- what it is made from --------------------------------------------------------------------------------------------

    def check_fresh(self, *, wait: bool = True) -> None:
        """Raise RuntimeError where the chain's inputs changed since the forward.

        What only their entries tell is asked on the device and, without `wait`, told by an assertion there.
        """
        for at, witness in enumerate(self.root._witnesses):
            if not gathered.is_there(witness.tensor):
                raise RuntimeError(_LET_GO)
            stale = _STALE.format(what="hidden" if at == 0 else "the weight or bias")
            if witness.changed:
                raise RuntimeError(stale)
            same = witness.same_entries
            if same is None:
                continue
            if not wait and same.device.type == "cuda":
                torch._assert_async(same, stale)
            elif not same:
                raise RuntimeError(stale)

    def outlive(self, copies: Copies) -> None:
        """Take copies of the weights that a step is about to change."""
        with self._lock:
            chain = self.chain
            if chain is None or any(w.changed or not gathered.is_there(w.tensor) for w in self._witnesses):
                return  # read already, or an error to read
            hidden, *inputs = (
                copies.of(x, self.grad) if isinstance(x, Tensor) else x for x in (chain.hidden, *chain.inputs)
            )
            known = {id(w.tensor): w for w in self._witnesses}
            self.chain = replace(chain, hidden=hidden, inputs=tuple(inputs))
            # Nobody else has the copies, so their entries need no watching.
            self._witnesses = tuple(
                known.get(id(t)) or replace(Witness.of(t), entries=None) for t in self.chain.tensors
            )

    def detach(self) -> bool:
        """Let the autograd graph of hidden go, unread; False where it was read or views of it keep their gradient."""
        with self._lock:
            if self.chain is None or self._derived:
                return False
            self.chain = replace(self.chain, hidden=self.chain.hidden.detach())
            self._witnesses = (Witness.of(self.chain.hidden), *self._witnesses[1:])
            self.grad = False
            return True

    def put_off(self, hook: Callable[..., Any]) -> bool:
        """Keep a hook of FSDP's, which asks for no gradient, until the logits or their loss are made; False if too late."""
        with self._lock:
            root = self.root
            if root.chain is None or not gathered.is_gathering(hook):
                return False
            root.hooks = (*root.hooks, hook)
            return True
