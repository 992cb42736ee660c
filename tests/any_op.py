# SPDX-License-Identifier: Apache-2.0
"""Every operator of torch on lazy logits and on the plain tensor, from torch's own database of operators and their arguments.

    python -m tests.any_op              all operators, called in eager
    python -m tests.any_op --traced     called in a frame that Dynamo traces
    python -m tests.any_op add sparse   those with such names

For every operator, each way to call it (function, method, in-place method, Python's operator) and each argument that can be
a floating tensor: value, dtype, effect in place and gradient are the plain tensor's, and so are exceptions.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cce_fx import LazyLogits
from cce_fx.lazy import HeadChain

# Name of an operator, and why it may do otherwise.
EXCEPTIONS: dict[str, str] = {}
MOST_SAMPLES = 4  # of the arguments that the database has for an operator


def _doubled() -> GraphModule:
    graph = Graph()
    graph.output(graph.call_function(torch.mul, (graph.placeholder("hidden"), 2.0)))
    return GraphModule(torch.nn.Module(), graph)


_CHAIN = _doubled()


@dataclass
class Call:
    """One way to call an operator with one of its tensors replaced."""

    name: str
    way: str
    function: Callable[..., Any]
    leaves: list[Any]
    spec: Any
    at: int  # the leaf that is replaced

    def run(self, lazy: bool, traced: bool) -> Any:
        """Results, the replaced tensor afterwards, and the gradient of what it is made from; or the type of the exception."""
        given = self.leaves[self.at]
        leaves = [
            x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in self.leaves
        ]
        hidden = (given.detach() / 2).requires_grad_(given.requires_grad)
        z = LazyLogits.make(HeadChain(hidden, (), _CHAIN)) if lazy else hidden * 2.0
        leaves[self.at] = z
        function = torch.compile(self.function, backend="eager") if traced else self.function
        if traced:
            torch._dynamo.reset()
        torch.manual_seed(0)
        try:
            args, kwargs = tree_unflatten(leaves, self.spec)
            found = function(*args, **kwargs)
            results = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            total = [x.abs().double().sum() for x in results if x.requires_grad and x.layout == torch.strided]
            if total:
                sum(total).backward()
            plain = tree_map(
                lambda x: (x + 0).detach() if isinstance(x, Tensor) and x.dtype.is_floating_point else x, found
            )
            return plain, (z + 0).detach(), hidden.grad
        except Exception as error:  # compared
            return type(error), str(error)

    def differs(self, traced: bool) -> str:
        """What the lazy tensor does otherwise; nothing where it does not."""
        want = self.run(False, traced=False)
        if traced and isinstance(want[0], type):
            return ""  # in eager it is an error
        got = self.run(True, traced)
        if isinstance(want[0], type):
            return ""  # an error of the plain tensor's need not be one of the lazy tensor's
        if isinstance(got[0], type):
            return f"{got[0].__name__}: {got[1]}".splitlines()[0][:160]
        for name, a, b in zip(("results", "the tensor", "gradient"), got, want, strict=True):
            try:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True, check_stride=False)
            except AssertionError as error:
                return f"{name}: " + " ".join(str(error).split())[:160]
            except Exception:  # results that are no tensors
                if repr(a) != repr(b):
                    return f"{name}: {a!r:.60} is not {b!r:.60}"
        return ""


def calls(names: list[str]) -> Iterator[Call]:
    """Every call of the operators of these names; of all where there are none."""
    for op in op_db:
        if names and not any(n in op.name for n in names):
            continue
        dtype = next((d for d in (torch.float32, torch.float64) if d in op.dtypes), None)
        if dtype is None:
            continue
        ways = {"function": op.op, "method": op.method_variant, "in place": op.inplace_variant,
                "operator": op.operator_variant, "in-place operator": op.inplace_operator_variant}  # fmt: skip
        try:
            samples = list(op.sample_inputs("cpu", dtype, requires_grad=op.supports_autograd))
        except Exception:  # some need what is not installed
            continue
        for sample in samples[:MOST_SAMPLES]:
            for way, function in ways.items():
                if function is None:
                    continue
                leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
                for at, leaf in enumerate(leaves):
                    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dtype.is_floating_point:
                        name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
                        yield Call(name, way, function, leaves, spec, at)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--traced", action="store_true")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    tried, wrong = 0, {}
    for call in calls(args.names):
        tried += 1
        told = call.differs(args.traced)
        if told:
            key = (call.name, call.way, call.at, told[:60])
            if key not in wrong:
                wrong[key] = told
                print(call.name, "|", call.way, "|", call.at, "|", told, flush=True)
    print(f"{tried} calls, {len(wrong)} kinds of differences")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
