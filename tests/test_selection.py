# SPDX-License-Identifier: Apache-2.0
"""What the default run leaves to the slow one: cases of the same tests, and never a whole test."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from .selection import sampled, shares


def case(function: str, name: str, *, part: int | None = None, file: str = "a.py") -> Any:
    mark = None if part is None else pytest.mark.sample(part).mark
    return SimpleNamespace(
        path=Path(file), originalname=function, name=f"{function}[{name}]", get_closest_marker=lambda kind: mark
    )


def test_a_sample_has_a_case_of_every_test_and_is_the_same_each_time() -> None:
    marked = [case("marked", str(at), part=4) for at in range(10)]
    few = [case("few", str(at), part=4, file="b.py") for at in range(2)]
    plain = [case("plain", str(at)) for at in range(5)]
    found = [x.name for x in sampled([*marked, *few, *plain])]
    assert len(found) == 3 + 1 + 5 and {x.name for x in plain} <= set(found)
    again = [x.name for x in sampled([*reversed(plain), *few, *reversed(marked)])]
    assert set(found) == set(again)
    assert len(sampled([*marked, *plain], 5)) == 2 + 1


def test_shares_are_all_of_it() -> None:
    given = [p.values[0] for p in shares(1050, 500)]
    assert given == [(0, 500), (1, 500), (2, 50)]


@pytest.mark.slow
def test_a_test_that_waits() -> None:
    time.sleep(3)


@pytest.mark.slow
def test_a_slow_test_is_not_ended_for_taking_long() -> None:
    which = f"{__file__}::{test_a_test_that_waits.__name__}"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-o", "faulthandler_timeout=1", which]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
