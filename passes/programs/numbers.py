# SPDX-License-Identifier: Apache-2.0
"""Numbers of a program that are symbols, such as a temperature that changes from step to step: tensors of no dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import Node

from ..._torch import tree_map
from ..canonical import canonical, mutated_arguments
from ..values import value_of
from .axes import NotByRows

# Operations whose numbers are no sizes.
ARITHMETIC = ("mul", "div", "add", "sub", "rsub", "pow")


def of_numbers(node: Node, target: Callable[..., Any]) -> Callable[..., Any]:
    """A node's function for numbers that are tensors of no dimensions, which it would round to its own dtype."""
    dtype = value_of(node).dtype if isinstance(value_of(node), Tensor) else None
    fills = spelling(node) in ("full", "full_like", "new_full")
    low = dtype is not None and dtype.is_floating_point and dtype.itemsize < 4
    if low and mutated_arguments(node):
        raise NotByRows("a number that is not fixed, and half precision in place")

    def call(*args: Any, **kwargs: Any) -> Any:
        if fills:
            number = kwargs.pop("fill_value", args[-1])
            return target(*args[: len(args) - (number is args[-1])], 0.0, **kwargs).fill_(number)
        if not low:
            return target(*args, **kwargs)
        args, kwargs = tree_map(
            lambda t: t.float() if isinstance(t, Tensor) and t.dtype == dtype else t, (args, kwargs)
        )
        return target(*args, **kwargs).to(dtype)

    return call


def spelling(node: Node) -> str:
    name = canonical(node)
    return name if isinstance(name, str) else getattr(name, "__name__", str(name))
