# SPDX-License-Identifier: Apache-2.0
"""Lazy logits without a compiler: a module that ends in a linear layer returns them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .._torch import tree_map
from ..options import Options
from ..passes import Policy
from ..passes.autocast import autocast_of
from .state import HeadChain
from .tensor import LazyLogits


class LazyHead:
    """A module whose logits are lazy; `remove()`, or the end of a `with` block, undoes it."""

    def __init__(self, module: nn.Module, options: Options) -> None:
        self._options = options
        self._graphs = [_graph(bias, options.policy) for bias in (False, True)]
        self._entered: list[_Linear] = []
        self._handles: tuple[RemovableHandle, ...] = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, prepend=True, always_call=True),
        )

    def remove(self) -> None:
        """Have the module return plain logits again."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> LazyHead:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph of the module is the backend's
            self._entered.append(_Linear(self._graphs, self._options.after_step == "as_before"))
            self._entered[-1].__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling() and self._entered:
            self._entered.pop().__exit__(None, None, None)


def lazy_head(module: nn.Module, options: dict[str, Any] | None = None) -> LazyHead:
    """Have a module that ends in a linear layer return lazy logits, in place and without compiling anything.

    What is done with the logits (a loss, compiled or not, an argmax, an entropy) is then cut as it is behind
    `torch.compile(model, backend="cce")`. Parameters, state dict and class of the module stay what they are.

    Args:
        module: called as a module, and plain `F.linear` makes what it returns, maybe scaled, capped or cast.
        options: those of `Options` that are about losses: `strategy`, `workspace`, `filter_eps`, `min_vocab`, `tiers`, `after_step`.

    Returns:
        A handle whose `remove()` undoes it.

    Raises:
        TypeError: `module` is no module, or an option has the wrong type.
        ValueError: an option has a value outside its choices.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"lazy_head takes a torch.nn.Module, not {type(module).__name__}")
    return LazyHead(module, Options(**(options or {})))


class _Linear(TorchFunctionMode):
    """Linear layers with more classes than hidden dimensions return lazy logits; one that reads such logits is no head."""

    def __init__(self, graphs: list[GraphModule], outlives_steps: bool) -> None:
        super().__init__()
        self._graphs, self._outlives_steps = graphs, outlives_steps

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.linear:
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda x: x.materialize() if isinstance(x, LazyLogits) else x, (args, kwargs))
        made = self._lazily(*args, **kwargs)
        return func(*args, **kwargs) if made is None else made

    def _lazily(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        operands = [input, weight] if bias is None else [input, weight, bias]
        if any(type(t) not in (Tensor, nn.Parameter) for t in operands) or input.dim() < 2 or weight.dim() != 2:
            return None
        autocast = autocast_of(input.device)
        fits = autocast is not None or len({t.dtype for t in operands}) == 1
        if not fits or weight.size(0) <= weight.size(1) or input.size(-1) != weight.size(1) or input.is_meta:
            return None
        like = torch.empty(*input.shape[:-1], weight.size(0), dtype=autocast or input.dtype, device="meta")
        run = self._graphs[bias is not None]
        return LazyLogits.hand_out(
            HeadChain(input, tuple(operands[1:]), run, autocast, self._outlives_steps, rowwise=True), like
        )


def _graph(bias: bool, policy: Policy) -> GraphModule:
    graph = Graph()
    inputs = tuple(graph.placeholder(name) for name in ("input", "weight", "bias")[: 2 + bias])
    graph.output(graph.call_function(F.linear, inputs))
    made = GraphModule(nn.Module(), graph)
    made.meta["cce_fx_policy"] = policy
    return made
