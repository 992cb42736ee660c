# SPDX-License-Identifier: Apache-2.0
"""Example values: fake tensors on every node, so that shapes, dtypes, aliasing and gradients are known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .._torch import FakeTensor, FakeTensorMode, detect_fake_mode
from .values import value_of


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The mode that the graph's own example values live in.

    Dynamo hands a backend a fresh mode in its tracing context while the nodes keep the values of the mode they were
    traced in, so `detect_fake_mode` would answer with the wrong one.
    """
    values = (value_of(n) for n in gm.graph.nodes)
    locals_ = (getattr(v, "_local_tensor", v) for v in values)  # a DTensor is fake where its piece is
    return next((v.fake_mode for v in locals_ if isinstance(v, FakeTensor)), None) or _new_mode()


def _new_mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)


def propagate(gm: GraphModule, nodes: Sequence[Node], *, grad: bool) -> None:
    """Give each of `nodes`, in order, an example value computed from those before it."""
    mode = fake_mode_of(gm)
    with mode, torch.set_grad_enabled(grad):
        for node in nodes:
            node.meta["example_value"] = _evaluate(gm, node, mode)


def _evaluate(gm: GraphModule, node: Node, mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return torch.func.functional_call(module, _fake_state(module, mode), args, kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_state(module: torch.nn.Module, mode: FakeTensorMode) -> dict[str, Any]:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: mode.from_tensor(value) for name, value in state.items()}


def ensure(gm: GraphModule, example_inputs: Sequence[Any] | None) -> bool:
    """Give every node an example value, all of one fake mode; whether that was possible.

    Without example inputs a graph has to bring its values along, as Dynamo's, export's and make_fx's do.
    """
    nodes = [n for n in gm.graph.nodes if n.op != "output"]
    known = all(value_of(n) is not None or n.op == "get_attr" for n in nodes)
    modes = {id(v.fake_mode) for n in nodes if isinstance(v := value_of(n), FakeTensor)}
    if (known and len(modes) <= 1) or (example_inputs is None and not known):
        missing = [n for n in nodes if n.op == "get_attr" and value_of(n) is None]
        propagate(gm, missing, grad=torch.is_grad_enabled())
        return all(value_of(n) is not None or not n.users or not _makes_tensor(n) for n in nodes)
    if example_inputs is None:
        example_inputs = [value_of(n) for n in nodes if n.op == "placeholder"]
    mode = (detect_fake_mode(list(example_inputs)) if len(modes) <= 1 else None) or _new_mode()
    inputs = iter(example_inputs)
    with mode:
        for node in nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = _as_fake(next(inputs), mode)
            else:
                node.meta["example_value"] = _evaluate(gm, node, mode)
    return True


def _as_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A value in `mode`; one that is fake in another mode becomes an empty tensor like it."""
    if isinstance(value, FakeTensor) and value.fake_mode is not mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad)
    real = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
    return mode.from_tensor(value, static_shapes=True) if real else value


def _makes_tensor(node: Node) -> bool:
    """A node with no value is excused where nothing is known to come out of it, such as a context manager's entry."""
    return node.op in ("call_function", "call_method", "call_module") and any(
        value_of(u) is not None for u in node.users
    )
