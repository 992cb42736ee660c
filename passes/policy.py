# SPDX-License-Identifier: Apache-2.0
"""The options that decide which losses are rewritten, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Policy:
    """The user's part in the decision."""

    strategy: Literal["auto", "grads_in_forward", "recompute"] = "auto"
    min_vocab: int | None = None  # classes below which a head is left alone; None is max(D, 32) + 1
    workspace: int | None = None  # bytes
    filter_eps: float | Literal["auto"] | None = None
    tiers: Literal["all", "kernel"] = "all"  # whether losses that no kernel knows are cut as row programs
    compiled: bool = True  # whether row programs are compiled by inductor
    tune: bool = False  # block shapes by timing, where the kernel has a choice
