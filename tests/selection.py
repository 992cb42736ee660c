# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test are run by default where all of them take long: `@pytest.mark.sample(n)`."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import Any

import pytest


def sampled(items: list[pytest.Item], every: int | None = None) -> list[pytest.Item]:
    """Of each test function one case in `every`, one at the least, always the same ones; as it is marked without `every`."""
    cases: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in items:
        cases[item.path, getattr(item, "originalname", item.name)].append(item)
    found = []
    for group in cases.values():
        mark = group[0].get_closest_marker("sample")
        part = every or (mark.args[0] if mark else 1)
        found += sorted(group, key=lambda item: hashlib.sha256(item.name.encode()).digest())[: -(-len(group) // part)]
    return found


def shares(count: int, each: int) -> list[Any]:
    """The parameters of a slow test that draws many: `(number, how many)` of parts that processes can take one by one.

    A part draws from a seed of its own, so it can be run again alone: `test_file.py::test_name[3 of 30]`.
    """
    parts = -(-count // each)
    return [
        pytest.param((at, min(each, count - at * each)), id=f"{at} of {parts}", marks=pytest.mark.slow)
        for at in range(parts)
    ]
