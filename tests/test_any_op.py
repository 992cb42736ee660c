# SPDX-License-Identifier: Apache-2.0
"""Operators of torch do with lazy logits what they do with the plain tensor; see `any_op.py`."""

from __future__ import annotations

import os

import pytest
import torch

from .any_op import EXCEPTIONS, calls, differences, some_calls

SEED = int(os.environ.get("CCE_FX_SEED", "0"))
ways = pytest.mark.parametrize("traced", [False, True], ids=["eager", "traced"])


@ways
def test_some_operators(traced: bool) -> None:
    tried, wrong = differences(some_calls(80 if traced else 400, SEED), traced)
    torch._dynamo.reset()
    print(f"{tried} calls from seed {SEED}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
@ways
def test_every_operator(traced: bool) -> None:
    tried, wrong = differences(calls([]), traced)
    torch._dynamo.reset()
    print(f"{tried} calls")
    assert tried > 5000
    assert not wrong, "\n".join(wrong)


def test_an_exception_has_a_reason_and_its_operator() -> None:
    for name, reason in EXCEPTIONS.items():
        assert reason and list(calls([name]))
