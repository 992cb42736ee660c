# SPDX-License-Identifier: Apache-2.0
"""Every form of `tests/forms.py` is rewritten without logits in any graph, or declined for the reason it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cce_fx
from cce_fx import Options

from . import forms
from .forms import FORMS, Form
from .helpers import compare


@pytest.mark.sample(3)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f.family}: {f.name}")
def test_form(form: Form, device: torch.device) -> None:
    verdict = form.verdict
    if "einops" in form.name:
        pytest.importorskip("einops")
        verdict = (
            verdict if torch.__version__ >= "2.13" else "rows"
        )  # Dynamo does not look into it, the second tier does
    tensors = forms.tensors(device=device)
    # Gradients in float32 of arithmetic in bfloat16 are off by ulps of the latter.
    watch = compare(form.function(), tensors, ulps=2**16 if "half precision" in form.name else 16)
    if form.verdict == "lazy":
        assert watch.largest() < forms.B * (forms.T - 1) * forms.V
        return
    report = cce_fx.explain(form.function(), *tensors, options=Options(min_vocab=0))
    if verdict in ("kernel", "rows"):
        assert {r.tier for r in report.rewritten} == {verdict}, report
        assert watch.rewritten >= 1 and not report.declined, report
        rows, two_weights = forms.B * (forms.T - 1), 2 * forms.V * forms.D
        allowed = {"one-hot": rows * forms.V * 2}.get(form.name.split()[0], 0)  # the program's own one-hot tensor
        assert watch.largest() < max(rows * forms.V, allowed, two_weights + 1), watch.largest()
    else:
        assert watch.rewritten == 0, report
        assert {d.reason for d in report.declined} == ({form.verdict} - {"NONE"}), report


def test_names_are_told_apart() -> None:
    names = [(f.family, f.name) for f in FORMS]
    assert len(set(names)) == len(names) >= 60


def test_the_page_of_patterns_is_up_to_date() -> None:
    page = Path(__file__).parent.parent / "docs" / "patterns.md"
    assert page.read_text() == forms.markdown(), "run: python -m tests.forms > docs/patterns.md"
