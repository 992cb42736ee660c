# SPDX-License-Identifier: Apache-2.0
"""How a rewrite shows: torch's counters, its structured trace and the logger `cce_fx`."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule

from ._torch import counters, trace_log, trace_structured
from .passes import Report
from .passes.pipeline import announce


def text_of(gm: GraphModule) -> str:
    """The graph as source, where somebody listens to torch's structured trace (TORCH_TRACE); else nothing, which is free."""
    return gm.print_readable(print_output=False) if trace_log.handlers else ""


def record(report: Report, before: str, after: str) -> None:
    """Count rewrites and declines, and leave the graph before and after and the report as artifacts for tlparse."""
    announce(report)
    counters["cce_fx"]["rewritten"] += len(report.rewritten)
    for declined in report.declined:
        counters["cce_fx"][f"declined_{declined.reason.lower()}"] += 1
    if not report.rewritten and not report.declined:
        return
    for name, payload in (
        ("cce_fx_report", lambda: str(report)),
        ("cce_fx_graph_before", lambda: before),
        ("cce_fx_graph_after", lambda: after),
    ):
        _leave(name, payload)


def _leave(name: str, payload: Callable[[], str]) -> None:
    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=payload)
