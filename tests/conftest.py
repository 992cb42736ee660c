# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

# Wherever a graph is compiled, here or in a process that a test starts, the pass has to leave the program's guards alone.
os.environ["CCE_FX_DEBUG"] = "1"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, though a process that a shell started in the background ignores it, and hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
