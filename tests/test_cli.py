# SPDX-License-Identifier: Apache-2.0
"""`python -m cce_fx explain`, and what else torch's own tools are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import cce_fx
from cce_fx.__main__ import main

MODELS = """
import torch, torch.nn as nn, torch.nn.functional as F

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 50)
    def forward(self, x, y, relu=False):
        z = self.head(x)
        return F.cross_entropy(z.relu() if relu else z, y)

def good():
    return Model(), torch.randn(6, 4), torch.randint(50, (6,))

def bad():
    return (*good(), {"relu": True})

def nothing():
    return None
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "some_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "some_models", raising=False)
    return tmp_path


@pytest.mark.parametrize("where", ["some_models:good", "some_models.py:good"])
def test_a_report(models: Path, capsys: pytest.CaptureFixture[str], where: str) -> None:
    assert main(["explain", where, "--check"]) == 0
    assert capsys.readouterr().out.startswith("cce_fx: 1 loss(es) rewritten, 0 declined")


def test_keyword_arguments_and_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "some_models:bad", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [d["reason"] for d in report["declined"]] == ["NO_RULE"]
    assert main(["explain", "some_models:bad", "--check"]) == 1


def test_options(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "some_models:good", "--option", "min_vocab=100", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["declined"][0]["reason"] == "SMALL"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["some_models"], "name a function as module:function"),
        (["no_such_module:good"], "there is no module 'no_such_module'"),
        (["nowhere.py:good"], "there is no file nowhere.py"),
        (["some_models:better"], "has no function 'better'"),
        (["some_models:nothing"], "must return the model and its example inputs"),
        (["some_models:good", "--option", "strict"], "an option is name=value"),
        (["some_models:good", "--option", "min_vocabulary=3"], "no option 'min_vocabulary'"),
        (["some_models:good", "--option", "logits=never"], "'logits' is one of"),
    ],
)
def test_mistakes_are_told(models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str) -> None:
    assert main(["explain", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_as_a_command_with_torchs_log(models: Path) -> None:
    """`TORCH_LOGS=cce_fx` needs nothing of the project's."""
    (models / "train.py").write_text(
        MODELS + "m, x, y = good()\ntorch.compile(m, backend='cce', options={'inner': 'eager'})(x, y)\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "cce_fx", "explain", "some_models:good"], capture_output=True, text=True
    )
    assert run.returncode == 0 and "1 loss(es) rewritten" in run.stdout, run.stderr
    log = subprocess.run(
        [sys.executable, "train.py"], capture_output=True, text=True, env={**os.environ, "TORCH_LOGS": "+cce_fx"}
    )
    assert log.returncode == 0 and "rewritten: saves" in log.stderr, log.stderr


def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, w), y)


def test_counters_of_torch() -> None:
    torch._dynamo.reset()
    counters.clear()
    tensors = [torch.randn(6, 4), torch.randn(50, 4), torch.randint(50, (6,))]
    torch.compile(loss, backend="cce", options={"inner": "eager"})(*tensors)
    torch.compile(lambda h, w, y: loss(h.relu(), w, y) + F.cross_entropy(F.linear(h, w).relu(), y), backend="cce",
                  options={"inner": "eager"})(*tensors)  # fmt: skip
    assert dict(counters["cce_fx"]) == {"rewritten": 2, "declined_no_rule": 1}


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
def test_profiles_show_the_kernels_with_their_sizes(strategy: str) -> None:
    h, w, y = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True), torch.randint(50, (6,))
    with torch.profiler.profile(record_shapes=True) as profile:
        cce_fx.linear_cross_entropy(h, w, y, strategy=strategy).backward()  # type: ignore[arg-type]
    names = {e.key for e in profile.key_averages()}
    ranges = {"cce_fx::forward_backward"} if strategy == "grads_in_forward" else {"cce_fx::forward", "cce_fx::backward"}
    assert ranges <= names and any(n.startswith("cce::linear_cross_entropy") for n in names)
