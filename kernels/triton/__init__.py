# SPDX-License-Identifier: Apache-2.0
"""The kernels for CUDA and ROCm, in Triton. See `..spec` for the contract."""

from .backward import backward as backward
from .backward import forward_backward as forward_backward
from .filtering import Filter as Filter
from .forward import forward as forward
from .forward import partial as partial
