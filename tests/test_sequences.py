# SPDX-License-Identifier: Apache-2.0
"""Programs on lazy logits give what they give on plain ones; see `sequences.py`."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from .helpers import assert_all
from .selection import shares
from .sequences import Model, Sequence, difference, sequences

MANY, SEED = int(os.environ.get("CCE_FX_SEQUENCES", "10000")), int(os.environ.get("CCE_FX_SEED", "0"))
how = settings(
    deadline=None, suppress_health_check=list(HealthCheck), database=None, phases=[Phase.generate], max_examples=100
)


def check_all(count: int, seed: int) -> None:
    torch._dynamo.reset()
    model = Model()
    plain = torch.compile(model, backend="aot_eager")
    compiled = torch.compile(model, backend="cce", options={"inner": "aot_eager", "min_vocab": 0})

    def check(sequence: Sequence) -> None:
        told = difference(sequence, model, plain, compiled)
        assert not told, told

    print(f"{count} sequences from seed {seed}")
    assert_all(check, sequences(), settings(how, max_examples=count), seed)


def test_some_sequences_of_operations() -> None:
    check_all(100, SEED)


@pytest.mark.parametrize("share", shares(MANY, 250))
def test_many_sequences_of_operations(share: tuple[int, int]) -> None:
    at, count = share
    check_all(count, SEED + at)
