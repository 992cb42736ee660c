# SPDX-License-Identifier: Apache-2.0
"""What `explain` says, and what is left for torch's own tools."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx
from cce_fx import Options
from cce_fx.passes.values import ADVICE, Reason


def tensors() -> list[Tensor]:
    return [torch.randn(6, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True), torch.randint(50, (6,))]


def good(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    logits = F.linear(h, w)
    scaled = logits / 2
    return F.cross_entropy(scaled, y)


def bad(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w).relu(), y)


def test_a_site_is_a_tree_with_source_lines() -> None:
    report = cce_fx.explain(good, *tensors())
    (site,) = report.rewritten
    assert [s.split("`")[1] for s in site.sources] == [
        "logits = F.linear(h, w)", "scaled = logits / 2", "return F.cross_entropy(scaled, y)",
    ]  # fmt: skip
    lines = str(report).splitlines()
    assert (
        "saves 3.5 KiB" in lines[1]
        and "cross_entropy" in lines[2]
        and "<- " in lines[3]
        and "test_explain.py" in lines[3]
    )


def test_a_decline_names_the_operation_and_what_to_change() -> None:
    (declined,) = cce_fx.explain(bad, *tensors()).declined
    assert declined.reason == "NO_RULE" and "relu" in declined.message and "test_explain.py" in declined.source
    assert "rule" in declined.advice and declined.advice in str(declined)


def test_a_report_without_a_loss_says_where_to_look() -> None:
    in_eager = torch.compiler.disable(good)
    report = cce_fx.explain(lambda h, w, y: in_eager(h, w, y), *tensors())
    assert report.graphs == 0 and "torch.compile(model, fullgraph=True) says why" in str(report)
    report = cce_fx.explain(lambda h: h * 2, torch.randn(3))
    assert report.graphs == 1 and "TORCH_LOGS=graph_breaks" in str(report)


def test_every_reason_has_advice() -> None:
    assert set(ADVICE) == set(Reason)


def test_reports_are_data_and_notebooks_show_them() -> None:
    report = cce_fx.explain(bad, *tensors())
    assert json.loads(json.dumps(report.to_dict()))["declined"][0]["reason"] == "NO_RULE"
    assert report._repr_html_().startswith("<pre>cce_fx: 0 loss(es)")


def test_the_logger_is_silent_until_asked(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("cce_fx")
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        for level in (logging.NOTSET, logging.INFO):
            logger.setLevel(level)
            torch._dynamo.reset()
            torch.compile(good, backend="cce", options={"inner": "eager"})(*tensors())
            assert bool(seen) == (level == logging.INFO)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)


def test_graphs_before_and_after_are_left_for_tlparse(tmp_path: Path) -> None:
    import subprocess
    import sys

    program = (
        "import torch, torch.nn.functional as F\n"
        "f = torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y), backend='cce', options={'inner': 'eager'})\n"
        "f(torch.randn(4, 2), torch.randn(50, 2), torch.randint(50, (4,)))\n"
    )
    import os

    env = {**os.environ, "TORCH_TRACE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, capture_output=True)
    text = "".join(p.read_text() for p in tmp_path.rglob("*.log"))
    before, after = text.split("cce_fx_graph_before")[1].split("cce_fx_graph_after")
    assert "cross_entropy(" in before and "cce.linear_cross_entropy" in after


def test_options_reach_explain() -> None:
    assert cce_fx.explain(good, *tensors(), options=Options(min_vocab=100)).declined[0].reason == "SMALL"


def test_returned_logits_are_what_the_backend_makes_of_them() -> None:
    """A reader is told `lazy` where the backend hands out lazy logits, also of a model that is compiled already."""

    def both(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(h, w)
        return logits, F.cross_entropy(logits, y)

    compiled = torch.compile(both, backend="cce", options={"inner": "eager"})
    for program in (both, compiled):
        assert cce_fx.explain(program, *tensors()).rewritten[0].logits == "lazy"
        assert cce_fx.explain(program, *tensors(), options=Options(logits="keep")).rewritten[0].logits == "returned"
