# SPDX-License-Identifier: Apache-2.0
"""Operators of torch do with lazy logits what they do with the plain tensor; see `any_op.py`."""

from __future__ import annotations

import os

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from .any_op import EXCEPTIONS, calls, calls_of, differences, some_calls
from .selection import shares

SEED = int(os.environ.get("CCE_FX_SEED", "0"))
ways = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


@ways
def test_some_operators(traced: bool) -> None:
    tried, wrong = differences(some_calls(80 if traced else 400, SEED), traced)
    torch._dynamo.reset()
    print(f"{tried} calls from seed {SEED}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("share", shares(len(op_db), 50))
@ways
def test_every_operator(traced: bool, share: tuple[int, int]) -> None:
    at, count = share
    made = (call for op in op_db[at * 50 : at * 50 + count] for call in calls_of(op))
    tried, wrong = differences(made, traced)
    torch._dynamo.reset()
    print(f"{tried} calls")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_the_shares_hold_thousands_of_calls() -> None:
    assert sum(1 for _ in calls([])) > 5000


def test_an_exception_has_a_reason_and_its_operator() -> None:
    for name, reason in EXCEPTIONS.items():
        assert reason and list(calls([name]))
