"""What the tests share: running a program eager and compiled, and looking at the graphs in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func


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
        return self.calls("cce.linear_cross_entropy")


@dataclass
class Outcome:
    """Results of a step, or the error it raised."""

    outputs: list[Tensor] = field(default_factory=list)
    grads: list[Tensor | None] = field(default_factory=list)
    error: type[BaseException] | None = None


def step(fn: Callable[..., Any], tensors: list[Tensor], *, backward: bool = True) -> Outcome:
    """Run fn(*tensors); the first output is summed and differentiated with respect to every floating tensor."""
    leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
    out = fn(*leaves)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    if backward and outputs[0].requires_grad:
        outputs[0].sum().backward()
    return Outcome([o.detach() + 0 for o in outputs], [t.grad for t in leaves])


def compare(
    fn: Callable[..., Any],
    tensors: list[Tensor],
    *,
    options: dict[str, Any] | None = None,
    ulps: float = 16.0,
    terms: float = 0.0,
) -> Watch:
    """Assert that fn compiled by cce is at least as near to fp64 eager as fn eager in its own dtype; return the graphs.

    The bound on each result's error is eager's own error plus `ulps` units in the last place of its largest entry, or of
    `terms` where a result is a small difference of terms of that size.
    """
    torch._dynamo.reset()
    watch = Watch()
    compiled = torch.compile(fn, backend="cce", options={"inner": watch, "min_vocab": 0, **(options or {})})
    exact = step(fn, [t.double() if t.is_floating_point() else t for t in tensors])
    eager = step(fn, tensors)
    ours = step(compiled, tensors)
    for name, ref, near, got in (
        *(("output", *x) for x in zip(exact.outputs, eager.outputs, ours.outputs, strict=True)),
        *(("gradient", *x) for x in zip(exact.grads, eager.grads, ours.grads, strict=True)),
    ):
        assert_no_worse(name, ref, near, got, ulps, terms)
    return watch


def assert_no_worse(
    name: str, exact: Tensor | None, eager: Tensor | None, ours: Tensor | None, ulps: float, terms: float = 0.0
) -> None:
    """`ours` has eager's shape, dtype and non-finite places, and an error no larger than eager's and a few ulp."""
    assert (eager is None) == (ours is None), f"{name}: eager {eager is not None}, ours {ours is not None}"
    if exact is None or eager is None or ours is None:
        return
    assert ours.shape == eager.shape and ours.dtype == eager.dtype, (name, ours.shape, eager.shape, ours.dtype)
    if not ours.is_floating_point():
        assert torch.equal(ours, eager), name
        return
    assert torch.equal(torch.isnan(ours), torch.isnan(eager)), f"{name}: NaN in other places"
    assert torch.equal(torch.isinf(ours), torch.isinf(eager)), f"{name}: Inf in other places"
    finite, eps = torch.isfinite(eager), torch.finfo(ours.dtype).eps
    if ours.dtype == torch.float64:
        eps *= 64  # the reference is no more exact than this
    exact, eager, ours = (t[finite].double() for t in (exact, eager, ours))
    if exact.numel() == 0:
        return
    scale = max(float(exact.abs().max()), terms)
    allowed = float((eager - exact).abs().max()) + ulps * scale * eps
    error = float((ours - exact).abs().max())
    assert error <= allowed, f"{name}: error {error:.3g} against fp64, eager's is {allowed:.3g} with {ulps} ulp"
