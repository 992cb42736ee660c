"""The kernels for CUDA and ROCm, in Triton. See `..spec` for the contract."""

from .sweep import forward as forward
from .sweep import partial as partial
