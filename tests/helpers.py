# SPDX-License-Identifier: Apache-2.0
"""What the tests share: running a program eager and compiled, and looking at the graphs in between."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func


def collect_rarely() -> None:
    """What is imported is not searched for cycles again and again while graphs are traced: a fifteenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@dataclass
class Watch:
    """An inner backend that runs the graph through AOTAutograd and keeps every graph it sees."""

    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    dynamo: list[torch.fx.GraphModule] = field(default_factory=list)

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.dynamo.append(gm)

        def keep(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
            self.graphs.append(graph)
            return make_boxed_func(graph.forward)

        return aot_module_simplified(gm, example_inputs, fw_compiler=keep, bw_compiler=keep)

    def largest(self) -> int:
        """Elements of the largest tensor that any node makes, in Dynamo's, the forward and the backward graphs."""
        sizes = [0]
        for gm in (*self.dynamo, *self.graphs):
            for node in gm.graph.nodes:
                if node.op in ("placeholder", "output", "get_attr"):
                    continue
                value = node.meta.get("example_value", node.meta.get("val"))
                for tensor in torch.utils._pytree.tree_leaves(value):
                    if isinstance(tensor, Tensor):
                        sizes.append(int(tensor.numel()))
        return max(sizes)

    def calls(self, name: str) -> int:
        """How many nodes of Dynamo's graphs call an operator of that name."""
        return sum(name in str(node.target) for gm in self.dynamo for node in gm.graph.nodes)

    @property
    def rewritten(self) -> int:
        return self.calls("cce.linear_cross_entropy") + self.calls("cce.rows")


@dataclass
class Outcome:
    """Results of a step, or the error it raised."""

    outputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    error: type[BaseException] | None = None

    @property
    def results(self) -> list[Tensor | None]:
        return [*self.outputs, *self.grads]


def step(fn: Callable[..., Any], tensors: list[Tensor], *, backward: bool = True) -> Outcome:
    """Run fn(*tensors); the first output is summed and differentiated with respect to every floating tensor."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    out = fn(*leaves)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    if backward and outputs[0].requires_grad:
        outputs[0].sum().backward()
    return Outcome([o.detach() + 0 for o in outputs], [t.grad for t in leaves])


class HeadedModel(nn.Module):
    """A model of two layers, the second a head, that returns its loss and its logits; always the same one."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x))
        return F.cross_entropy(logits.flatten(0, -2), y.flatten()), logits


def compare(
    fn: Callable[..., Any],
    tensors: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    ulps: float = 16.0,
    terms: float = 0.0,
) -> Watch:
    """Assert that fn compiled by cce is at least as near to fp64 eager as fn eager in its own dtype; return the graphs.

    The bound on each result's error is eager's own error plus `ulps` units in the last place of its largest entry.
    Eager's error on one input is a draw from the roundings that it may make, and now and then all but nothing; where
    ours is above it, one and a half times the largest of its errors on a dozen inputs some ulp away is the bound.
    `terms` is the size of what a result is a difference of, where the rewritten program rounds those apart.
    """
    torch._dynamo.reset()
    watch = Watch()
    compiled = torch.compile(fn, backend="cce", options={"inner": watch, "min_vocab": 0, **(options or {})})
    near = Nearby(fn, tensors)
    exact, eager = near.pair(0)
    ours = step(compiled, tensors)
    for number, (ref, dense, got) in enumerate(zip(exact.results, eager.results, ours.results, strict=True)):
        name = "output" if number < len(exact.outputs) else "gradient"
        assert_no_worse(name, ref, dense, got, ulps, terms, lambda n=number: near.error(n))  # type: ignore[misc]
    return watch


class Nearby:
    """fn in fp64 and in its own dtype: on its inputs, number 0, and on inputs some ulp away from them."""

    def __init__(self, fn: Callable[..., Any], tensors: list[Tensor], count: int = 12) -> None:
        self.fn, self.tensors, self.count = fn, tensors, count
        self.pairs: dict[int, tuple[Outcome, Outcome]] = {}

    def pair(self, number: int) -> tuple[Outcome, Outcome]:
        """(fp64, own dtype) on inputs `number`."""
        if number not in self.pairs:
            gen = torch.Generator().manual_seed(number)
            inputs = [t if number == 0 or not t.is_floating_point() else _nudged(t, gen) for t in self.tensors]
            exact = step(self.fn, [t.double() if t.is_floating_point() else t for t in inputs])
            self.pairs[number] = exact, step(self.fn, inputs)
        return self.pairs[number]

    def error(self, result: int) -> float:
        """The largest error of one result over the inputs nearby."""
        errors = [0.0]
        for number in range(1, self.count):
            exact, eager = (o.results[result] for o in self.pair(number))
            assert exact is not None and eager is not None
            both = eager.isfinite() & exact.isfinite()
            errors.append(float((eager[both].double() - exact[both]).abs().max()) if both.any() else 0.0)
        return max(errors)


def _nudged(t: Tensor, gen: torch.Generator) -> Tensor:
    noise = torch.randn(t.shape, generator=gen, dtype=torch.float64).to(t.device)
    moved = (t.detach().double() * (1 + 2 * torch.finfo(t.dtype).eps * noise)).to(t.dtype)
    return moved.requires_grad_(t.requires_grad)


def assert_no_worse(
    name: str,
    exact: Tensor | None,
    eager: Tensor | None,
    ours: Tensor | None,
    ulps: float,
    terms: float = 0.0,
    nearby: Callable[[], float] = lambda: 0.0,
) -> None:
    """`ours` has eager's shape, dtype and non-finite places, and an error no larger than eager's and a few ulp.

    `nearby` tells eager's error on inputs close to these, and is asked where the error on these is too small.
    """
    assert (eager is None) == (ours is None), f"{name}: eager {eager is not None}, ours {ours is not None}"
    if exact is None or eager is None or ours is None:
        return
    assert ours.shape == eager.shape and ours.dtype == eager.dtype, (name, ours.shape, eager.shape, ours.dtype)
    if not ours.is_floating_point():
        assert torch.equal(ours, eager), name
        return
    assert torch.equal(torch.isnan(ours), torch.isnan(eager)), f"{name}: NaN in other places"
    assert torch.equal(torch.isinf(ours), torch.isinf(eager)), f"{name}: Inf in other places"
    finite, eps, double = torch.isfinite(eager), torch.finfo(ours.dtype).eps, ours.dtype == torch.float64
    exact, eager, ours = (t[finite].double() for t in (exact, eager, ours))
    if exact.numel() == 0:
        return
    size = max(float(exact.abs().max()), terms)
    if double:
        # The reference is the same arithmetic and no more exact: it can tell that a formula is right, and no more.
        size, eps = max(size, 1.0), 64 * eps
    few = ulps * size * eps
    error, allowed = float((ours - exact).abs().max()), float((eager - exact).abs().max())
    if error > allowed + few:
        allowed = max(allowed, 1.5 * nearby())
    assert error <= allowed + few, f"{name}: error {error:.3g} against fp64, eager's {allowed:.3g} and {few:.3g} more"


def assert_all(check: Callable[[Any], None], strategy: st.SearchStrategy[Any], how: settings, start: int) -> None:
    """`check` of everything drawn; each that fails is told, and not the first alone."""
    wrong: list[str] = []

    @given(strategy)
    @how
    @seed(start)
    def run(drawn: Any) -> None:
        try:
            check(drawn)
        except Exception as error:  # whatever it is, it is reported below
            wrong.append(f"{type(error).__name__}: {error}\n{drawn!r}")

    run()
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:20])
