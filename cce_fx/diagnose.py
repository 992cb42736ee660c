"""`explain`: what would be rewritten in a model, what not, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .options import Options
from .passes import Report, fakes
from .passes.pipeline import apply


def explain(model: Callable[..., Any], *args: Any, options: Options | None = None, **kwargs: Any) -> Report:
    """Run `model(*args, **kwargs)` once and report its losses, like `torch._dynamo.explain`.

    Args:
        model: a module or function, not compiled.
        args, kwargs: its example inputs; small ones do.
        options: as given to the backend.

    Returns:
        A `Report` over all graphs that Dynamo captured. Its `str` is for reading, `to_dict()` for programs.
    """
    policy = (options or Options()).policy
    total = Report(graphs=0)

    def look(gm: torch.fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        fakes.ensure(gm, example_inputs)
        report, _ = apply(gm, policy)
        total.extend(report)
        return gm.forward

    torch.compiler.reset()
    try:
        torch.compile(model, backend=look)(*args, **kwargs)
    finally:
        torch.compiler.reset()
    return total
