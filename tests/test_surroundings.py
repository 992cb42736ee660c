# SPDX-License-Identifier: Apache-2.0
"""Random training programs run with cce where they run without, and log what eager logs; see `surroundings.py`."""

from __future__ import annotations

import os

import pytest

from .selection import shares
from .surroundings import check_all

MANY, SEED = int(os.environ.get("CCE_FX_SURROUNDINGS", "3000")), int(os.environ.get("CCE_FX_SEED", "0"))


def test_some_programs() -> None:
    assert check_all(60, SEED, "aot_eager") == []


@pytest.mark.parametrize("share", shares(MANY, 100))
def test_many_programs(share: tuple[int, int]) -> None:
    at, count = share
    assert check_all(count, SEED + at, "inductor") == []
