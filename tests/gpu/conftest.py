# SPDX-License-Identifier: Apache-2.0
"""These tests are of the GPU's kernels, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from ..device import accelerator
from .support import Kernels


@pytest.fixture(scope="session")
def device() -> torch.device:
    return accelerator()


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> Kernels:
    return Kernels(device)


@pytest.fixture(autouse=True)
def _tiles() -> None:
    """The interpreter's own small tiles, so that small problems have several."""
