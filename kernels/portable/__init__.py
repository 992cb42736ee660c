# SPDX-License-Identifier: Apache-2.0
"""The contract of `kernels/spec.py` in torch operations: any device, float32, float64, bfloat16 and float16.

In comes a `Problem`, out go statistics and gradients by the four functions of `entry.EntryPoints`. The arithmetic is in
`tiles.py`. Half precision is converted tile by tile; sums are in float32, and each result is rounded once. All orders of
summation are fixed, so results repeat bit by bit.
"""

from ..entry import EntryPoints
from .tiles import gradients, sums, sums_and_gradients
from .tiles import needed as needed

_kernel = EntryPoints(sums, gradients, sums_and_gradients)
partial, forward = _kernel.partial, _kernel.forward
backward, forward_backward = _kernel.backward, _kernel.forward_backward
