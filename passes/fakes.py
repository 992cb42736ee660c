# SPDX-License-Identifier: Apache-2.0
"""Example values: fake tensors on every node, so that shapes, dtypes, aliasing and gradients are known.

Values that a graph brings along are kept: its maker's guards rest on them. What is missing is computed from them, in their
fake mode. Sizes that are symbols belong to the maker as well: within `unguarded`, whatever would learn more about one than
is known (that it is 9, or equal to another) raises `WouldGuard` instead.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .._torch import FakeTensor, FakeTensorMode, ShapeEnv, detect_fake_mode
from .values import value_of


class WouldGuard(RuntimeError):
    """What was asked of a size that is a symbol is not known of every size that the graph is for."""


@contextlib.contextmanager
def unguarded(gm: GraphModule) -> Iterator[None]:
    """Nothing in here adds a guard, a replacement or a symbol to the shape environment of a graph's values."""
    env = fake_mode_of(gm).shape_env
    if env is None:
        yield
        return

    def refuse(expression: Any, value: Any) -> None:
        if not ShapeEnv._suppress_guards_tls():
            raise WouldGuard(f"{expression} is {value} in the example, and not known to be so always")

    before = _learned(env) if _CHECKED else None
    with mock.patch.object(env, "_check_frozen", refuse):
        yield
    if before is not None:
        after = _learned(env)
        changed = {name: (before.get(name), size) for name, size in after.items() if before.get(name) != size}
        assert not changed, f"the shape environment of a user's graph changed: {changed}"


# Set by the tests: the environment is compared before and after.
_CHECKED = bool(os.environ.get("CCE_FX_DEBUG"))
# Of a ShapeEnv: caches, counts for its own logs, and where things came from.
_NOT_LEARNED = ("cache", "counter", "sloc", "stack", "log", "events", "tracked_fakes", "_node", "_equality_graph")


def _learned(env: ShapeEnv) -> dict[str, int]:
    """How much a shape environment knows: the sizes of all that it collects."""
    kept = {k: v for k, v in vars(env).items() if not any(part in k for part in _NOT_LEARNED)}
    found = {k: len(v) for k, v in kept.items() if isinstance(v, (dict, list, set))}
    return {**found, "runtime asserts": env.num_deferred_runtime_asserts}


def fake_mode_of(gm: GraphModule) -> FakeTensorMode:
    """The mode that the graph's own example values live in; a new one where they live in several or there are none.

    Dynamo hands a backend a fresh mode in its tracing context while the nodes keep the values of the mode they were
    traced in, so `detect_fake_mode` would answer with the wrong one.
    """
    found = _modes(gm)
    return found[0] if len(found) == 1 else FakeTensorMode(allow_non_fake_inputs=True)


def _modes(gm: GraphModule) -> list[FakeTensorMode]:
    values = (value_of(n) for n in gm.graph.nodes)
    locals_ = (getattr(v, "_local_tensor", v) for v in values)  # a DTensor is fake where its piece is
    return list({id(v.fake_mode): v.fake_mode for v in locals_ if isinstance(v, FakeTensor)}.values())


def propagate(gm: GraphModule, nodes: Sequence[Node], *, grad: bool) -> None:
    """Give each of `nodes`, in order, an example value computed from those before it."""
    mode = fake_mode_of(gm)
    with mode, torch.set_grad_enabled(grad):
        for node in nodes:
            node.meta["example_value"] = _evaluate(gm, node, mode)


def evaluate(gm: GraphModule, inputs: Sequence[Any], mode: FakeTensorMode | None = None) -> None:
    """Give every node an example value computed from the graph's inputs, whatever values there were."""
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    given = iter(inputs)
    # The graph's own switches of gradients and autocast are obeyed, and undone.
    with mode, torch.set_grad_enabled(torch.is_grad_enabled()):
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                node.meta["example_value"] = _as_fake(next(given), mode)
            elif node.op != "output":
                node.meta["example_value"] = _evaluate(gm, node, mode)


def ensure(gm: GraphModule, example_inputs: Sequence[Any] | None) -> bool:
    """Give every node whose value somebody needs an example value, all of one fake mode; whether that was possible.

    Without example inputs a graph has to bring its values along, as Dynamo's, export's and make_fx's do.
    """
    modes, missing = _modes(gm), _missing(gm)
    if len(modes) == 1 and not any(n.op == "placeholder" for n in missing):
        propagate(gm, missing, grad=torch.is_grad_enabled())
        return True
    if example_inputs is None:
        if not modes:
            return not missing
        example_inputs = [value_of(n) for n in gm.graph.nodes if n.op == "placeholder"]
    evaluate(gm, example_inputs, detect_fake_mode(list(example_inputs)) if not modes else None)
    return True


def _missing(gm: GraphModule) -> list[Node]:
    """The nodes without a value that one with a value, or the output, is made of.

    The others return nothing: a context manager's entry and exit, a write to memory, a line in a log.
    """
    found: dict[Node, None] = {}
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or value_of(node) is not None:
            continue
        if any(u.op == "output" or value_of(u) is not None or u in found for u in node.users):
            found[node] = None
    return list(reversed(found))


def _evaluate(gm: GraphModule, node: Node, mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        value = gm
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return _as_fake(value, mode)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return torch.func.functional_call(module, _fake_state(module, mode), args, kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _fake_state(module: torch.nn.Module, mode: FakeTensorMode) -> dict[str, Any]:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: _as_fake(value, mode) for name, value in state.items()}


def _as_fake(value: Any, mode: FakeTensorMode) -> Any:
    """A value in `mode`; one that is fake in another mode becomes an empty tensor like it."""
    if not isinstance(value, Tensor):
        return value
    if not isinstance(value, FakeTensor):
        return mode.from_tensor(value, static_shapes=True)
    if value.fake_mode is mode:
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.requires_grad_(value.requires_grad)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Torch logs what fails on fake tensors as errors; here it is how an operation says that it does not fit."""
    log = logging.getLogger(FakeTensorMode.__module__)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before
