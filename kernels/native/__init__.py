# SPDX-License-Identifier: Apache-2.0
"""The contract of `kernels/spec.py` as compiled code for CPUs: float32, bfloat16 and float16.

In comes a `Problem`, out go statistics and gradients by the four functions of `entry.EntryPoints`. `run.py` hands the problem to
the library that `library.py` has compiled. Logits of some rows are made, reduced and multiplied chunk by chunk of the vocabulary
while they are in a thread's cache; no BLAS library is called.
"""

from ..entry import EntryPoints
from .library import compiled as compiled
from .library import prepare as prepare
from .library import serves as serves
from .run import gradients, sums, sums_and_gradients
from .run import needed as needed

_kernel = EntryPoints(sums, gradients, sums_and_gradients)
partial, forward = _kernel.partial, _kernel.forward
backward, forward_backward = _kernel.backward, _kernel.forward_backward
