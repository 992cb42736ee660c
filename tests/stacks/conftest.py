# SPDX-License-Identifier: Apache-2.0
"""Every test compiles anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """torch compiles one forward a few times and runs it eager from then on; models of all tests here share theirs."""
    torch._dynamo.reset()
    yield
