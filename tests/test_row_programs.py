# SPDX-License-Identifier: Apache-2.0
"""Losses that no kernel knows, run some rows at a time: the same numbers as eager, and the logits gone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cce_fx
from tests import row_losses
from tests.helpers import assert_no_worse
from tests.row_losses import LOSSES, MIXED, Data, Heads, Loss, data

OPTIONS = {"inner": "aot_eager", "min_vocab": 0, "logits": "keep"}


def outcome(loss: Loss, heads: Heads, given: Data, compiled: Any = None) -> list[Tensor | None]:
    """What a loss returns, and its gradients with respect to the input and every parameter."""
    for p in heads.parameters():
        p.grad = None
    given.x.grad = None
    out = (compiled or loss)(heads, given)
    found = list(out) if isinstance(out, tuple) else [out]
    sum(o.sum() for o in found if o.requires_grad).backward()
    return [*(o.detach() for o in found), given.x.grad, *(p.grad for p in heads.parameters())]


def check(loss: Loss, given: Data, heads: Heads, compiled: Any) -> None:
    exact = outcome(loss, copy.deepcopy(heads).double(), given.to(torch.float64))
    eager, ours = (outcome(loss, heads, given.to(given.x.dtype), run) for run in (None, compiled))
    for number, values in enumerate(zip(exact, eager, ours, strict=True)):
        assert_no_worse(f"{loss.__name__}, result {number}", *values, ulps=64)


@pytest.fixture
def heads() -> Heads:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Heads()


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_rows_is_cut_and_right(name: str, strategy: str, heads: Heads) -> None:
    loss, given = LOSSES[name], data()
    report = cce_fx.explain(loss, heads, given, options=cce_fx.Options(**OPTIONS))
    assert report.rewritten and all(r.logits == "unused" for r in report.rewritten), report
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="cce", options={**OPTIONS, "strategy": strategy})
    check(loss, given, heads, compiled)


@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_any_number(name: str, heads: Heads) -> None:
    if "B" in LOSSES[name].__code__.co_names:
        pytest.skip("its sizes are fixed")
    compiled = torch.compile(LOSSES[name], backend="cce", options=OPTIONS, dynamic=True)
    for n in (24, 7, 33):
        check(LOSSES[name], data(n, n), heads, compiled)


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_mixes_rows_is_left_alone_or_right(name: str, heads: Heads) -> None:
    check(MIXED[name], data(), heads, torch.compile(MIXED[name], backend="cce", options=OPTIONS))


def test_the_losses_differ_from_each_other() -> None:
    """Two of one name would hide each other."""
    source = Path(row_losses.__file__).read_text()
    assert len(LOSSES) + len(MIXED) == source.count("\n@loss") + source.count("\n@mixed")
