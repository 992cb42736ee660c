# SPDX-License-Identifier: Apache-2.0
"""Gradients in the forward: where all that a row program returns flows into one scalar, with coefficients known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule

from ...functional import RowProgram, rows_with_grads
from ..joined import Joint, in_forward
from ..rewriter import Builder
from ..values import value_of
from .own_gradient import is_in_proportion


def make_gradients_in_forward(gm: GraphModule, joint: Joint) -> bool:
    """Turn a call of `cce::rows` into one of `cce::rows_with_grads`, in place; whether that is possible."""
    hidden, weight, rows, shared, *how = joint.call.args
    if not is_in_proportion(RowProgram.of(str(how[0]))):
        return False
    needs = [bool(value_of(n).requires_grad) for n in (*hidden, *weight, *rows, *shared)]  # type: ignore[misc]

    def with_grads(builder: Builder, coefficients: dict[int, Any]) -> tuple[Any, Callable[[int], int]]:
        groups = [builder.proxy(list(g)) for g in (hidden, weight, rows, shared)]  # type: ignore[arg-type]
        each = [coefficients[n] for n in sorted(coefficients)]
        return rows_with_grads(*groups, each, needs, *how), lambda n: n + 1

    begins = sorted((n for n in joint.parts if value_of(n).requires_grad), key=joint.parts.__getitem__)
    return in_forward(gm, joint, begins, with_grads)
