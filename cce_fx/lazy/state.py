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

from .._torch import assert_async, tree_iter, tree_map
from ..passes.autocast import under
from ..passes.policy import Policy
from . import gathered
from .functions import Op
from .weights import Copies, Witness, keep_through_steps

_STALE = (
    "these logits are lazy and were not read while they could be: {what} changed since the forward, so reading them now would "
    "give other values. A step of an optimizer of torch leaves them as they were; after any other change they have to be "
    "read before it. Or compile with options={{'logits': 'keep'}}."
)

# One for all: what is made of several roots is read while they are.
LOCK = threading.RLock()

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
        autocast: the dtype to which autocast casts in the program where `run` is from; None where it is off.
        outlives_steps: whether copies of the weights are taken before an optimizer's step changes them.
        rowwise: whether each row of hidden (..., D) gives its row of the logits (..., V), whatever rows there are.
        top: (N,) int64, the likeliest class of each row, which a loss's kernel came by; -1 for rows that it left out.
    """

    hidden: Tensor
    inputs: tuple[Any, ...]
    run: GraphModule
    autocast: torch.dtype | None = None
    outlives_steps: bool = False
    rowwise: bool = False
    top: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """hidden and the tensors among the inputs."""
        return (self.hidden, *(x for x in self.inputs if isinstance(x, Tensor)))

    @property
    def policy(self) -> Policy:
        """For losses that are taken of the logits: that of the program they are from."""
        policy: Policy = self.run.meta.get("cce_fx_policy", Policy())
        return policy

    def logits(self, hidden: Tensor | None = None) -> Tensor:
        """The logits, a plain tensor; of a `rowwise` chain those of other rows `hidden` (..., D)."""
        with under(self.hidden.device, self.autocast):
            return owned(self.run(self.hidden if hidden is None else hidden, *self.inputs))


def owned(x: Tensor) -> Tensor:
    """A tensor that is no view of another, as the results of graphs and reductions are: it can be detached in place, say."""
    return _Own.apply(x) if x._is_view() else x


class _Own(torch.autograd.Function):
    """A view as a tensor of its own, in the same memory."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class State:
    """A tensor that is not read yet, or its value: the root of a family made by a chain, or an operation on another state.

    What is unread is a function of the chains alone. States that share memory are read together, as views of one another;
    others are computed from what they are derived from while that is as it was, and else from the chain anew.

    Attributes:
        like: its shape, strides and dtype, on the meta device.
        grad: grad mode in which it was made, and in which the value will be.
        requires_grad: whether the stand-in for it was made to require gradients.
        chain: of a root.
        op: of another state: the operation that makes it of others, which are among its arguments.
        base: the first of those.
        in_order: of a calculation: whether it has the rows of its roots in order, and one more dimension.
        value: the plain tensor, once read.
        given: whether the program has the value, so that its identity cannot change any more.
        part: a value of its own, where some rows were read without the others; nobody holds views of it.
        passed_by: of a root: whether a gradient reaches hidden by another way than through the value.
        hooks: FSDP's, of a root: they gather the weights before the backward.
    """

    def __init__(self, like: Tensor, grad: bool) -> None:
        self.like: Tensor = like
        self.grad: bool = grad
        self.requires_grad: bool = False
        self.chain: HeadChain | None = None
        self.base: State | None = None
        self.op: Op | None = None
        self.in_order: bool = False
        self._owner: State | None = None  # whose memory this one's is, if not its own
        self.value: Tensor | None = None
        self.given: bool = False
        self.part: Tensor | None = None
        self.passed_by: bool = False
        self.hooks: tuple[Callable[..., Any], ...] = ()
        self._witnesses: tuple[Witness, ...] = ()  # of what a root is made from
        self._as_read: tuple[Witness, Any] | None = None  # of the value and its graph, when it was given away
        self._bare: Tensor | None = None  # the value without an autograd graph, made below autograd
        self._derived: weakref.WeakSet[State] = weakref.WeakSet()

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
        if op.is_alias:
            state._owner = self._memory
        for base in state.made_of:
            base._derived.add(state)
        return state

    # --- its place in the family -----------------------------------------------------------------------------------------

    @property
    def made_of(self) -> list[State]:
        """The states among the arguments of the operation that makes this one."""
        return [] if self.op is None else [x for x in tree_iter((self.op.args, self.op.kwargs)) if isinstance(x, State)]

    def _behind(self) -> Iterator[State]:
        """This state and all that it is a function of, each once."""
        seen, stack = set(), [self]
        while stack:
            state = stack.pop()
            if id(state) not in seen:
                seen.add(id(state))
                stack += reversed(state.made_of)
                yield state

    @property
    def roots(self) -> list[State]:
        """The states made by chains that this one is a function of, itself if it is one."""
        return [state for state in self._behind() if state.op is None]

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors, outside of the family, that a gradient with respect to this one may flow to."""
        found: list[Tensor] = []
        for state in self._behind():
            if state.op is not None:
                found += [x for x in tree_iter((state.op.args, state.op.kwargs)) if isinstance(x, Tensor)]
            elif state.chain is not None and state.grad:
                found += state.chain.tensors
        return [x for x in found if x.requires_grad]

    @property
    def root(self) -> State:
        """The first of the roots."""
        state = self
        while state.base is not None:
            state = state.base
        return state

    @property
    def unread(self) -> HeadChain | None:
        """The first of the chains that it will be computed from; None once it was read."""
        return self.root.chain if self.value is None else None

    def viewed(self) -> State:
        """The state that this one is a view of, as autograd has it; itself where it is no view."""
        state = self
        while state.base is not None and state.op is not None and state.op.is_alias and not state.op.detaches:
            state = state.base
        return state

    @property
    def _memory(self) -> State:
        """The state whose memory this one's is."""
        return self if self._owner is None else self._owner

    def _views(self) -> Iterator[State]:
        """The states that share this one's memory by being derived from it, each after its base."""
        for state in list(self._derived):
            if state.op is not None and state.op.is_alias:
                yield state
                yield from state._views()

    # --- reading ---------------------------------------------------------------------------------------------------------

    def read(self) -> Tensor:
        """The value, a plain tensor, computed at the first call, with its autograd graph.

        Raises RuntimeError when hidden, weight or bias changed since the forward.
        """
        with LOCK:
            owner = self._memory
            if owner.value is None:
                owner.value = owner.computed(lambda base: base._as_derived())
                self.hook_up(owner.value)
                for view in owner._views():
                    assert view.base is not None
                    view.value = view.computed(lambda base: base.value)
                    view._let_go()
                owner._let_go()
            assert self.value is not None
            return self.value

    def give(self) -> Tensor:
        """The value, for the program to do with as it likes."""
        with LOCK:
            owner, value = self._memory, self.read()
            if owner._as_read is None and owner._awaited():
                assert owner.value is not None
                owner._as_read = Witness.of(owner.value), owner.value.grad_fn
            self.given = True
            return value

    def given_as(self, tensor: Tensor) -> None:
        """The value has become another object."""
        self.value = tensor
        if self._as_read is not None:
            self._as_read = replace(self._as_read[0], tensor=tensor), self._as_read[1]

    def read_bare(self) -> Tensor:
        """The value for code below autograd: what is computed there has no graph, and is not to be taken for the value."""
        with LOCK:
            if self.value is not None:
                return self.value.detach()
            if self._bare is None:
                with torch.no_grad():
                    self._bare = self._applied(lambda base: base.read_bare())
            return self._bare

    def computed(self, source: Callable[[State], Any]) -> Tensor:
        """The value in the grad mode that it was made in, from what `source` gives for a state."""
        with torch.inference_mode(False), torch.set_grad_enabled(self.grad):
            return self._applied(source)

    def _applied(self, source: Callable[[State], Any]) -> Tensor:
        if self.base is None or self.op is None:
            assert self.chain is not None
            self.check_fresh()
            return self.chain.logits()
        args, kwargs = tree_map(lambda a: source(a) if isinstance(a, State) else a, (self.op.args, self.op.kwargs))
        with under(self.op.device, self.op.autocast):
            return self.op.func(*args, **dict(kwargs))

    def _as_derived(self) -> Tensor:
        """The value as it was when something was derived from it.

        What is passed through on the way to a single other tensor is not kept, unless for a gradient.
        """
        passed = self.value is None and self.op is not None and self._owner is None and len(self._derived) == 1
        if self._memory._is_other() or (passed and not self.requires_grad):
            return self.computed(lambda base: base._as_derived())
        return self.read()

    def _is_other(self) -> bool:
        """Whether the program changed the value that it was given."""
        if self._as_read is None or self.value is None:
            return False
        (witness, graph), value = self._as_read, self.value
        as_it_was = value.shape == self.like.shape and value.stride() == self.like.stride() and value.grad_fn is graph
        return not as_it_was or witness.is_other()

    def _awaited(self) -> bool:
        """Whether something is derived from this tensor that was not read."""
        return any(state.value is None or state._awaited() for state in list(self._derived))

    def _let_go(self) -> None:
        """What is not needed to compute anything any more."""
        self.part = self._bare = None
        if not self._derived:
            self.chain = self.base = self.op = None
            self._witnesses = ()

    def hook_up(self, made: Tensor) -> None:
        """Put the hooks that were put off onto what was made of these logits."""
        for root in self.roots if made.requires_grad else ():
            root.passed_by |= made is not root.value
            for hook in root.hooks:
                made.register_hook(hook)

    # --- what it is made from --------------------------------------------------------------------------------------------

    def check_fresh(self, *, wait: bool = True) -> None:
        """Raise RuntimeError where the chain's inputs changed since the forward.

        What only their entries tell is asked on the device and, without `wait`, told by an assertion there.
        """
        for root in self.roots:
            for at, witness in enumerate(root._witnesses):
                _check(witness, "hidden" if at == 0 else "the weight or bias", wait)

    def outlive(self, copies: Copies) -> None:
        """Take copies of the weights that a step is about to change."""
        with LOCK:
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
        with LOCK:
            if self.value is not None or self.chain is None or self._derived:
                return False
            self.chain = replace(self.chain, hidden=self.chain.hidden.detach())
            self._witnesses = (Witness.of(self.chain.hidden), *self._witnesses[1:])
            self.grad = self.requires_grad = False
            return True

    def put_off(self, hook: Callable[..., Any]) -> bool:
        """Keep a hook of FSDP's, which asks for no gradient, until the logits or their loss are made; False if too late."""
        with LOCK:
            if self.unread is None or not gathered.is_gathering(hook):
                return False
            for root in self.roots:
                root.hooks = (*root.hooks, hook)
            return True


def _check(witness: Witness, what: str, wait: bool) -> None:
    if not gathered.is_there(witness.tensor):
        raise RuntimeError(_LET_GO)
    stale = _STALE.format(what=what)
    same = witness.same_entries if not witness.changed else None
    if same is not None and not wait and same.device.type == "cuda":
        assert_async(same, stale)
    elif witness.changed or (same is not None and not same):
        raise RuntimeError(stale)
