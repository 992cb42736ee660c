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
import itertools
import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from cce_fx import LazyLogits
from cce_fx.lazy import HeadChain
from cce_fx.passes import Policy

# Operators whose results are compared by shape, dtype, strides and the like alone, and why.
EXCEPTIONS = {
    "empty_like": "memory that nobody wrote to",
    "new_empty": "memory that nobody wrote to",
    "new_empty_strided": "memory that nobody wrote to",
}
MOST_SAMPLES = 4  # of the arguments that the database has for an operator


def _doubled() -> GraphModule:
    graph = Graph()
    graph.output(graph.call_function(torch.mul, (graph.placeholder("hidden"), 2.0)))
    return GraphModule(torch.nn.Module(), graph)


def _identity() -> GraphModule:
    """A head with as many classes as hidden dimensions."""
    graph = Graph()
    inputs = (graph.placeholder("hidden"), graph.placeholder("weight"))
    graph.output(graph.call_function(torch.nn.functional.linear, inputs))
    made = GraphModule(torch.nn.Module(), graph)
    made.meta["cce_fx_policy"] = Policy(min_vocab=0)
    return made


_CHAIN, _HEAD = _doubled(), _identity()


def _lazy(hidden: Tensor) -> Tensor:
    """hidden times two, lazy; of a head where that can be one."""
    if hidden.dim() < 2 or hidden.numel() == 0 or not hidden.isfinite().all():
        return LazyLogits.make(HeadChain(hidden, (), _CHAIN))
    weight = 2.0 * torch.eye(hidden.size(-1), dtype=hidden.dtype)
    return LazyLogits.make(HeadChain(hidden, (weight,), _HEAD, rowwise=True))


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
        z = _lazy(hidden) if lazy else hidden * 2.0
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
            return tree_map(self._comparable, found), (z + 0).detach(), hidden.grad
        except Exception as error:  # compared
            return type(error), str(error)

    def _comparable(self, result: Any) -> Any:
        if not isinstance(result, Tensor):
            return result
        if self.name.split(".")[0] in EXCEPTIONS:
            return [result.shape, result.dtype, result.layout, result.device, result.stride(), result.requires_grad]
        return (result + 0).detach() if result.dtype.is_floating_point else result

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
        if not names or any(n in op.name for n in names):
            yield from calls_of(op)


def some_calls(count: int, seed: int) -> Iterator[Call]:
    """One call of each of `count` operators."""
    draw = random.Random(seed)
    drawn = (list(calls_of(op)) for op in draw.sample(op_db, len(op_db)))
    return itertools.islice((draw.choice(found) for found in drawn if found), count)


def calls_of(op: OpInfo) -> Iterator[Call]:
    """The ways to call an operator with each of its tensors replaced, for some of the arguments that the database has."""
    dtype = next((d for d in (torch.float32, torch.float64) if d in op.dtypes), None)
    if dtype is None:
        return
    ways = {"function": op.op, "method": op.method_variant, "in place": op.inplace_variant,
            "operator": op.operator_variant, "in-place operator": op.inplace_operator_variant}  # fmt: skip
    torch.manual_seed(0)
    try:
        # Not `op.sample_inputs`, which goes through the stack of its callers at each sample.
        made = op.sample_inputs_func(op, "cpu", dtype, op.supports_autograd)
        samples = list(itertools.islice(made, MOST_SAMPLES))
    except Exception:  # some need what is not installed
        return
    for sample in samples:
        for way, function in ways.items():
            if function is None:
                continue
            leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
            for at, leaf in enumerate(leaves):
                if isinstance(leaf, Tensor) and leaf.layout == torch.strided and leaf.dtype.is_floating_point:
                    name = f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name
                    yield Call(name, way, function, leaves, spec, at)


def differences(made: Iterable[Call], traced: bool) -> tuple[int, list[str]]:
    """How many calls there were, and what was otherwise; once where several calls differ alike."""
    tried, wrong = 0, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in made:
            tried += 1
            told = call.differs(traced)
            if told:
                key = (call.name, call.way, call.at, told[:60])
                wrong.setdefault(key, f"{call.name}, {call.way}, argument {call.at}: {told}")
    return tried, list(wrong.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--traced", action="store_true")
    args = parser.parse_args()
    tried, wrong = differences(calls(args.names), args.traced)
    print(*wrong, f"{tried} calls, {len(wrong)} kinds of differences", sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
