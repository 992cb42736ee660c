# SPDX-License-Identifier: Apache-2.0
"""The arguments of a problem that most kernels share, and the sizes from which their grids are made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..combine import local_class_weight, statistics_dtype
from ..spec import Problem
from .device import machine_of, recording
from .machines import Config, Machine
from .rows import Rows


@dataclass(frozen=True)
class Head:
    """A problem as the kernels see it."""

    problem: Problem
    machine: Machine
    config: Config
    class_weight: Tensor | None  # (V,) of this shard, in the dtype of the statistics; None where all are 1 or unused

    @property
    def n(self) -> int:
        return self.problem.hidden.shape[0]

    @property
    def d(self) -> int:
        return self.problem.hidden.shape[1]

    @property
    def v(self) -> int:
        return self.problem.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of accumulation and of the statistics."""
        return statistics_dtype(self.problem.hidden.dtype)

    @property
    def precision(self) -> str:
        """How fp32 products are made: exactly, unless torch is told that TensorFloat-32 will do."""
        fast = self.machine.backend == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return "tf32" if fast and self.problem.hidden.dtype == torch.float32 else "ieee"

    def using(self, config: Config) -> Head:
        """With other block shapes; without tensor descriptors where the tensors or the workspace do not allow them."""
        p = self.problem
        possible = _described(p.weight) and self.d * p.hidden.element_size() % 16 == 0 and p.filter_eps is None
        if not possible or (p.workspace is not None and self.packed_bytes > p.workspace):
            sweep, logits = (replace(tile, tma=False) for tile in (config.sweep, config.logits))
            config = replace(config, sweep=sweep, logits=logits)
        return replace(self, config=config)

    @property
    def packed_bytes(self) -> int:
        """Bytes of hidden with the kept rows first, for tensor descriptors; 0 where hidden itself will do."""
        p = self.problem
        all_kept = p.ignore_index is None or not p.skip_ignored
        return 0 if all_kept and _described(p.hidden) else self.n * self.d * p.hidden.element_size()

    def args(self, rows: Rows) -> dict[str, Any]:
        """Arguments that every kernel with tiles of logits takes."""
        p, e = self.problem, self.problem.epilogue
        capped = e.softcap is not None
        return {
            "hidden": p.hidden,
            "weight": p.weight,
            "bias": p.bias,
            "class_weight": self.class_weight,
            "index": rows.index,
            "column": rows.column,
            "state": rows.state,
            "V": self.v,
            "D": self.d,
            "stride_hn": p.hidden.stride(0),
            "stride_hd": p.hidden.stride(1),
            "stride_wv": p.weight.stride(0),
            "stride_wd": p.weight.stride(1),
            "INNER": e.scale / e.softcap if capped else e.scale * e.post_scale,
            "OUTER": e.softcap * e.post_scale if capped else 1.0,
            # The rounding of half-precision inputs hides what a quick tanh leaves out.
            "CAPPED": 0 if not capped else 1 if p.hidden.element_size() == 2 else 2,
            "ACC": tl_dtype(self.dtype),
            "OPERAND": tl_dtype(self.dtype if self.machine.backend == "cpu" else p.hidden.dtype),
            "PRECISION": self.precision,
        }

    def group(self, rows: int) -> int:
        """How many blocks of `rows` rows of hidden to walk through together: two fifths of the cache."""
        size = rows * self.d * self.problem.hidden.element_size()
        return max(1, int(0.4 * self.machine.l2) // max(1, size))


def make_head(problem: Problem) -> Head:
    """Raises NotImplementedError for a device without kernels, ValueError for an unfit `class_weight`."""
    p, machine = problem, machine_of(problem.hidden.device)
    weights = local_class_weight(p) if p.smooth else None
    aligned = p.hidden.stride(1) == 1 and all(map(_aligned, (p.hidden, p.weight)))
    plain = machine.config(p.hidden.dtype, aligned=aligned)
    (v, d), tiles = p.weight.shape, (plain.sweep, plain.logits)
    mask = any(v % t.cols for t in tiles)
    extras = [p.smooth, p.epilogue.softcap is not None, p.bias is not None, mask, p.filter_eps is not None]
    # Masks at the end of a row take registers too, and so do columns in the place of rows.
    heavy = any(extras) or p.weight.stride(1) != 1 or any(d % t.depth for t in tiles)
    config = machine.config(p.hidden.dtype, heavy, weights is not None or sum(extras) > 1, aligned)
    if p.top and not heavy and config.likeliest is not None:
        config = replace(config, sweep=config.likeliest)
    return Head(problem, machine, config, None if weights is None else weights.contiguous()).using(config)


def _aligned(matrix: Tensor) -> bool:
    """Whether the compiler knows that 16 bytes can be loaded at once: from the strides, which it asks for multiples of 16."""
    aligned = recording() or matrix.data_ptr() % 16 == 0
    return aligned and 1 in matrix.stride() and max(matrix.stride()) % 16 == 0


def _described(matrix: Tensor) -> bool:
    """Whether a tensor descriptor can load the rows of a matrix: contiguous, and each 16 bytes from an aligned address."""
    aligned = recording() or matrix.data_ptr() % 16 == 0
    return aligned and matrix.stride(1) == 1 and matrix.stride(0) * matrix.element_size() % 16 == 0


def tl_dtype(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of a floating dtype."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)
