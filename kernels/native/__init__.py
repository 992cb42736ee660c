# SPDX-License-Identifier: Apache-2.0
"""The contract of `kernels/spec.py` as compiled code for CPUs: float32, bfloat16 and float16.

In comes a `Problem`, out go statistics and gradients. `common_case.py` and, for all else, the four functions of
`entry.EntryPoints` with `run.py` hand it to the library that `library.py` has compiled. Logits of some rows are made, reduced and multiplied chunk by chunk of the vocabulary
while they are in a thread's cache; no BLAS library is called.
"""

from ..entry import EntryPoints
from ..spec import Grads, Needs, Problem, RowGrads, Stats
from . import common_case
from .library import compiled as compiled
from .library import prepare as prepare
from .library import serves as serves
from .run import gradients, sums, sums_and_gradients
from .run import needed as needed

_kernel = EntryPoints(sums, gradients, sums_and_gradients)
partial, backward = _kernel.partial, _kernel.backward


def forward(problem: Problem) -> Stats:
    """As `spec.Kernel` says."""
    return common_case.forward(problem) or _kernel.forward(problem)


def forward_backward(problem: Problem, grads: RowGrads, needs: Needs) -> tuple[Stats, Grads]:
    """As `spec.Kernel` says."""
    return common_case.forward_backward(problem, grads, needs) or _kernel.forward_backward(problem, grads, needs)
