# SPDX-License-Identifier: Apache-2.0
"""A recorder of aten operations on tensors whose dimensions are axes.

A region's nodes are run on fake tensors of sizes that are numbers, and each aten operation below them is written down with
the axes of its results by its rule in `operations.py`, or by what torch decomposes it to. What comes out is not yet a program:
until the region ends, a dimension may still turn out to be rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._torch import (
    FakeTensorMode,
    OpOverload,
    TorchDispatchMode,
    decomposition_table,
    disable_modes,
)
from .axes import NotByRows, RowsMixed, distinct
from .call import Call, replaced, signature, tensors
from .runs import Run, kinds, runs_alike
from .value import Leaf, Made, Shape, Value

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "addmv")


class Recorder(TorchDispatchMode):
    """Notes what is done to fake tensors while it is the current mode."""

    def __init__(
        self, rules: dict[str, Callable[..., Any]], is_pointwise: Callable[[OpOverload], bool], autocast: bool
    ) -> None:
        super().__init__()
        # Fakes are tensors on meta, which are made in a tenth of the time; but autocast asks for a device.
        self._fake_mode: FakeTensorMode | None = FakeTensorMode() if autocast else None
        self._rules = rules
        self._is_pointwise = is_pointwise
        self._values: dict[int, Value] = {}
        self._changed: dict[int, str] = {}  # fakes whose memory an operation wrote to by another name
        self._kept: list[Tensor] = []  # an id is a tensor's only while it lives
        self._views: dict[
            int, tuple[Tensor, Any, tuple[Any, ...]]
        ] = {}  # of what, by which operation, and its arguments
        self._memory: dict[int, list[int]] = {}  # fakes by their storage
        self._known: dict[Any, Any] = {}  # results of operations, by the kinds of their arguments
        self._runs: dict[Any, Run] = {}  # of functions of a graph, by the kinds of their arguments
        self._run: Run | None = None  # that which is being noted
        self._rule_of: dict[OpOverload, Any] = {}
        self.products: int = 0  # how many were recorded

    def run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What a function of a graph returns for arguments in which tensors are fake."""
        given = tensors((args, kwargs))
        key = None if self._fake_mode is not None else runs_alike(function, args, kwargs, given)
        known = None if key is None else self._runs.get(key)
        if known is not None:
            return known.again(given, self._enter_results)
        with torch.no_grad(), self._fake_mode or contextlib.nullcontext(), self:
            if key is None:
                return function(*args, **kwargs)
            self._run = Run(given)
            try:
                out = function(*args, **kwargs)
                if self._run is not None and self._run.ends(out):
                    self._runs[key] = self._run
                return out
            finally:
                self._run = None

    def empty(
        self, like: Tensor, dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int] | None = None
    ) -> Tensor:
        """A fake of some shape, on the device of another tensor."""
        with self._fake_mode or contextlib.nullcontext():
            device = like.device if self._fake_mode else torch.device("meta")
            if stride is None:
                return torch.empty(shape, dtype=dtype, device=device)
            return torch.empty_strided(shape, stride, dtype=dtype, device=device)

    def enter(self, fake: Tensor, value: Value) -> Tensor:
        """Make a tensor known."""
        if not distinct(value.dims):
            raise RowsMixed("rows lie along two dimensions of one tensor")
        self._values[id(fake)] = value
        self._kept.append(fake)
        self._memory.setdefault(_memory_of(fake), []).append(id(fake))
        return fake

    def value(self, fake: Tensor) -> Value:
        """What is known of a tensor. Raises NotByRows for one that the region does not know, or that was changed."""
        if id(fake) in self._changed:
            raise NotByRows(self._changed[id(fake)])
        if id(fake) not in self._values:
            constant = fake if type(fake) is Tensor else getattr(fake, "constant", None)
            if constant is None or constant.dim() or constant.device.type == "meta":
                raise NotByRows("a constant tensor of the program's own")
            with disable_modes():
                number = constant.item()
            made = Made("aten.full.default", (Shape(()), number), {"dtype": fake.dtype})
            self.enter(fake, Value([], fake.dtype, made))
        return self._values[id(fake)]

    def detach(self, fake: Tensor) -> None:
        """No gradient flows through a tensor, as the program has it."""
        value = self.value(fake)
        self._values[id(fake)] = Value(value.dims, value.dtype, Made("aten.detach.default", (value,)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, given, facts = kwargs or {}, tensors((args, kwargs)), signature(func)
        if self._fake_mode is None and (kwargs.get("device") is not None or (not given and facts.makes)):
            kwargs = {**kwargs, "device": torch.device("meta")}
        out = self._result(func, args, kwargs)
        made = tensors(out)
        if (not made and not given) or func.namespace == "prim":
            return out
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotByRows(f"`{func}` draws random numbers")
        run, self._run = self._run, None  # of what an operation is decomposed to nothing is noted
        if facts.mutable:
            self._write(func, args, kwargs)
            return out
        self._enter_results(func, args, kwargs, out, given)
        if run is not None and self._rule(func) is not None and run.takes(func, args, kwargs, out):
            self._run = run
        return out

    def _enter_results(self, func: OpOverload, args: Any, kwargs: Any, out: Any, given: Sequence[Tensor]) -> None:
        """Note what an operation made of the tensors that it was given."""
        made = tensors(out)
        values = self._recorded(func, args, kwargs, made)
        for fake, value in zip(made, values, strict=True):
            if not any(fake is t for t in given):
                self.enter(fake, value)
                if signature(func).view and fake is out:
                    self._views[id(fake)] = (args[0], func, args[1:])

    def _result(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What an operation returns. Of one tensor, not a view, it is remembered for arguments of the same kinds."""
        facts = signature(func)
        if self._fake_mode is not None or facts.view or facts.mutable:
            return func(*args, **kwargs)
        key = func, kinds(args), kinds(kwargs)
        try:
            known = self._known.get(key)
        except TypeError:  # an argument without a hash
            return func(*args, **kwargs)
        if known is None:
            out = func(*args, **kwargs)
            plain = type(out) is Tensor and out.device.type == "meta" and not any(out is t for t in tensors(args))
            if plain and out._base is None:
                self._known[key] = (out.shape, out.stride(), out.dtype)
            return out
        shape, stride, dtype = known
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _recorded(self, func: OpOverload, args: Any, kwargs: Any, out: list[Tensor]) -> list[Value]:
        name = signature(func).name
        if name.startswith("nll_loss") and args[1].dtype not in (torch.int64, torch.uint8):
            raise NotByRows("targets that torch itself refuses, and its decomposition does not")
        if func.namespace != "aten":
            raise NotByRows(f"`{func}` is no operation of torch's own")
        rule = self._rule(func)
        self.products += name in PRODUCTS
        if rule is not None:
            args, kwargs = replaced(args, self.value), replaced(kwargs, self.value)
            return list(rule(Call(func, args, kwargs, out)))
        decomposition = decomposition_table.get(func, func.decompose)
        with self:
            made = decomposition(*args, **kwargs)
        if made is NotImplemented:
            raise NotByRows(f"`{func}` is not known")
        return [self.value(t) for t in tensors(made)]

    def _rule(self, func: OpOverload) -> Callable[..., Any] | None:
        if func not in self._rule_of:
            pointwise = self._rules["pointwise"] if self._is_pointwise(func) else None
            self._rule_of[func] = self._rules.get(signature(func).name, pointwise)
        return self._rule_of[func]

    def _write(self, func: OpOverload, args: Any, kwargs: Any) -> None:
        """An operation in place is the one out of place, whose result takes the tensor's name."""
        first = args[0]
        packet, overload = func._schema.name.split("::")[1], func._overloadname
        functional = getattr(torch.ops.aten, packet.removesuffix("_"), None)
        if not packet.endswith("_") or not hasattr(functional, overload) or "out" in kwargs:
            raise NotByRows(f"`{func}` writes to memory")
        target = self._values.get(id(first))
        if target is None or isinstance(target.source, Leaf):
            raise NotByRows(f"`{func}` writes to a tensor of the program's")
        with self:
            made = getattr(functional, overload)(*args, **kwargs)
            made = made if made.dtype == first.dtype else made.to(first.dtype)
            made = made if made.shape == first.shape else made.expand(first.shape)
        written = {id(first)}
        self._values[id(first)] = self.value(made)
        part = first
        while id(part) in self._views:  # what a part is of is written to as well
            whole, view, rest = self._views[id(part)]
            if self.value(whole).grad and view is torch.ops.aten.detach.default:
                raise NotByRows("logits are written to under another name, of which no gradient knows")
            with self:
                part_made = _written_back(view, whole, made, rest)
            written.add(id(whole))
            self._values[id(whole)] = self.value(part_made)
            part, made = whole, part_made
        for other in self._memory[_memory_of(first)]:
            if other not in written:
                self._changed[other] = f"`{func}` changes it in place under another name"


def _written_back(view: OpOverload, whole: Tensor, part: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """What a tensor is after a view of it was written over."""
    name, aten = signature(view).name, torch.ops.aten
    if name == "select":
        return aten.select_scatter.default(whole, part, *rest)
    if name == "slice":
        return aten.slice_scatter.default(whole, part, *rest)
    if name in ("view", "_unsafe_view", "unsqueeze", "squeeze", "alias"):
        return aten.reshape.default(part, list(whole.shape))
    if name == "detach":
        return part
    raise NotByRows(f"a part of a tensor, by `{name}`, is written to")


def _memory_of(fake: Tensor) -> int:
    return fake.untyped_storage()._cdata
