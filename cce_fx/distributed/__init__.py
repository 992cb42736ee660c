# SPDX-License-Identifier: Apache-2.0
"""Losses whose vocabulary or whose rows are divided among processes.

`linear_cross_entropy` is for programs that hold plain tensors, as Megatron's do; programs of DTensors need no call: the pass
rewrites them to `dtensor.sharded_loss`. All communication is torch's functional collectives. See docs/distributed.md.
"""

from .vocab import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
