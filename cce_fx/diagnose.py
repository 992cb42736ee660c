# SPDX-License-Identifier: Apache-2.0
"""`explain`: what would be rewritten in a model, what not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .backend import cut_graph
from .options import Options, split
from .outputs import restore
from .passes import Report


def explain(
    model: Callable[..., Any], *args: Any, options: Options | dict[str, Any] | None = None, **kwargs: Any
) -> Report:
    """Run `model(*args, **kwargs)` once and report its losses, like `torch._dynamo.explain`.

    Args:
        model: a module or function, compiled or not. What was compiled before, of this model and of others, is
            forgotten and compiled again at its next call.
        *args: its example inputs; small ones do.
        **kwargs: more of them.
        options: as given to the backend, or an `Options`.

    Returns:
        A `Report` over all graphs that Dynamo captured. Its `str` is for reading, `to_dict()` for programs.

    Raises:
        ValueError, TypeError: options that the backend would refuse.
        Exception: what the model raises.
    """
    options = options if isinstance(options, Options) else split(options)[0]
    total = Report(graphs=0)

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        cut = cut_graph(gm, example_inputs, options)
        total.extend(cut.report)
        return restore(gm.forward, cut.outputs)

    torch.compiler.reset()
    try:
        torch.compile(model, backend=look)(*args, **kwargs)
    finally:
        torch.compiler.reset()
    return total
