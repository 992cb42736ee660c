# SPDX-License-Identifier: Apache-2.0
"""Products of bfloat16 matrices with sums and results in float32, on processors that have such products (Intel's AMX).

Ten times as fast as products in float32, and as exact: two bfloat16 numbers have a float32 product. Torch's own matrix
products round their results to bfloat16, which a sum over blocks cannot have. The routine beneath them does not; torch gives
it to the C++ code that inductor writes, and here it is called by name. Without it, tiles are converted to float32.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .spec import Problem

# at::native::cpublas::brgemm(M, N, K, ld_a, ld_b, ld_c, add, const BFloat16* a, const BFloat16* b, float* c, packed),
# the same from torch 2.11 to 2.15: a (M, K), b (K, N) and c (M, N), row after row, c = a b or c += a b.
NAME = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"


def usable(problem: Problem) -> bool:
    """Whether the products of `problem` are made so. A filter has products of its own."""
    cpu = problem.hidden.device.type == "cpu"
    return cpu and problem.filter_eps is None and problem.weight.numel() > 0 and preferred(problem.hidden.dtype)


def preferred(dtype: torch.dtype) -> bool:
    """Whether this processor has such products for numbers of `dtype`."""
    return dtype == torch.bfloat16 and _routine() is not None


@functools.cache
def _routine() -> Callable[..., None] | None:
    if not (torch.cpu.get_capabilities().get("amx_bf16") and torch.backends.mkl.is_available()):
        return None
    try:
        found = getattr(ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libtorch_cpu.so")), NAME)
    except (OSError, AttributeError):  # another platform, or another torch
        return None
    found.argtypes = [*[ctypes.c_int64] * 6, ctypes.c_bool, *[ctypes.c_void_p] * 3, ctypes.c_bool]
    found.restype = None
    return found


def rows_of(values: Tensor) -> Tensor:
    """A matrix whose rows lie one after the other, as the routine takes it: itself, or a copy."""
    return values if _step(values) else values.contiguous()


def _step(values: Tensor) -> int:
    """How far apart the rows of a matrix begin; 0 where they do not lie one after the other. One row, or column, always does."""
    rows, columns = values.shape
    if columns > 1 and values.stride(1) != 1:
        return 0
    step = values.stride(0) if rows > 1 else columns
    return step if step >= columns else 0


def converted(tile: Tensor) -> Tensor:
    """A float32 matrix, or the transpose of one, in bfloat16 with its rows one after the other."""
    return rows_of(tile.to(torch.bfloat16))


def product(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """out (M, N) float32 = a (M, K) @ b (K, N), both bfloat16, or out += a @ b. Rows of all three lie one after the other."""
    routine = _routine()
    assert routine is not None and a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
    steps = [_step(t) for t in (a, b, out)]
    assert all(steps), "rows do not lie one after the other"
    assert a.shape == (out.shape[0], b.shape[0]) and b.shape[1] == out.shape[1]
    routine(*out.shape, a.shape[1], *steps, add, a.data_ptr(), b.data_ptr(), out.data_ptr(), False)
