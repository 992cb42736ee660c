# SPDX-License-Identifier: Apache-2.0
"""Gradients in the forward: where all that a row program returns flows into one scalar, with coefficients known beforehand."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ...functional import RowProgram, rows_with_grads
from ..fakes import WouldGuard, propagate
from ..joined import Joint, alone, coefficients_of, flow_of
from ..rewriter import Builder, erase_unused
from ..scalar import Flow, NotKnown, replace_flow
from ..values import value_of
from .own_gradient import is_in_proportion


def make_gradients_in_forward(gm: GraphModule, given: Node | Joint) -> bool:
    """Turn a call of `cce::rows` into one of `cce::rows_with_grads`, in place; whether that is possible."""
    joint = alone(given) if isinstance(given, Node) else given
    if not is_in_proportion(RowProgram.of(str(joint.call.args[4]))):
        return False
    begins = sorted((n for n in joint.parts if value_of(n).requires_grad), key=joint.parts.__getitem__)
    flow = flow_of(gm, joint, begins)
    return flow is not None and _rewrite(gm, joint, flow)


def _rewrite(gm: GraphModule, joint: Joint, flow: Flow) -> bool:
    builder, call = Builder(gm.graph, {}), joint.call
    hidden, weight, rows, shared, *how = call.args
    inputs = [*hidden, *weight, *rows, *shared]  # type: ignore[misc]
    needs = [bool(value_of(n).requires_grad) for n in inputs]
    try:
        with builder.before(call):
            coefficients, of_results = coefficients_of(builder, joint, flow)
            groups = [builder.proxy(list(g)) for g in (hidden, weight, rows, shared)]  # type: ignore[arg-type]
            out = rows_with_grads(*groups, [of_results[n] for n in sorted(of_results)], needs, *how)
            results = {old: out[n + 1].node for old, n in joint.results.items()}
        with builder.before(flow.scalar):
            total = coefficients.with_addends(builder, out[0])
        propagate(gm, builder.written, grad=True)
    except (NotKnown, WouldGuard):
        builder.undo()
        return False
    replace_flow(gm, flow, total.node, results)
    erase_unused(gm.graph, [*results, call])
    return True
