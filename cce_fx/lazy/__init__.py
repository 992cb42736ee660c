# SPDX-License-Identifier: Apache-2.0
"""Logits that a program returns and may never read: `LazyLogits` stand in their place.

`tensor.py` is the tensor itself and `state.py` what is behind it; `weights.py` tells whether what it is made from is still the
forward's, `operations.py` says what is done without reading it, and `graph.py` cuts a loss that is taken of it outside the
compiled graph.
"""

from . import operations as operations  # registers itself with the tensor
from .state import HeadChain
from .tensor import LazyLogits

__all__ = ["HeadChain", "LazyLogits"]
