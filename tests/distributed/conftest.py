# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Iterator

import pytest

from .support import Workers


def _workers(world: int) -> Iterator[Workers]:
    workers = Workers(world)
    yield workers
    workers.stop()


@pytest.fixture(scope="session")
def two() -> Iterator[Workers]:
    yield from _workers(2)


@pytest.fixture(scope="session")
def four() -> Iterator[Workers]:
    yield from _workers(4)
