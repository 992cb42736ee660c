# SPDX-License-Identifier: Apache-2.0
"""Modules that stand in a graph as calls, as `torch.fx.symbolic_trace` leaves them: written out, so that rules see functions."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

# Modules that heads, losses and what lies between them are made of. Each is a line or two of functions.
_KNOWN = (
    nn.Linear, nn.Identity, nn.Flatten, nn.Unflatten, nn.Tanh, nn.Softmax, nn.LogSoftmax, nn.CrossEntropyLoss, nn.NLLLoss,
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
)  # fmt: skip


def inline_known(gm: GraphModule) -> None:
    """Replace calls of known modules by what their `forward` does, in place. Hooked or parametrised ones stay calls."""
    calls = [n for n in gm.graph.nodes if n.op == "call_module" and _is_known(gm.get_submodule(str(n.target)))]
    for node in calls:
        _inline(gm, node)
    if calls:
        gm.graph.lint()
        gm.recompile()


def _is_known(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) in _KNOWN and not any(hooks)


def _inline(gm: GraphModule, node: Node) -> None:
    inner = torch.fx.symbolic_trace(gm.get_submodule(str(node.target))).graph
    given = list(node.args)
    values: dict[Node, Node] = {}
    with gm.graph.inserting_before(node):
        for n in inner.nodes:
            if n.op == "placeholder":
                values[n] = given.pop(0) if given else node.kwargs[str(n.target)]  # type: ignore[assignment]
            elif n.op == "get_attr":
                values[n] = gm.graph.get_attr(f"{node.target}.{n.target}")
            elif n.op == "output":
                node.replace_all_uses_with(values[n.args[0]])  # type: ignore[index]
            else:
                values[n] = gm.graph.node_copy(n, values.__getitem__)
                values[n].meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
    gm.graph.erase_node(node)
