# SPDX-License-Identifier: Apache-2.0
"""The rules by family; importing this package registers them all."""

from . import elementwise, heads, linear, loss, pick, placement, rows

__all__ = ["elementwise", "heads", "linear", "loss", "pick", "placement", "rows"]
