# SPDX-License-Identifier: Apache-2.0
"""Which device the tests marked `gpu` run on."""

from __future__ import annotations

import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors


def accelerator() -> torch.device:
    return torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")
