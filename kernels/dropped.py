# SPDX-License-Identifier: Apache-2.0
"""What a filter left out of the gradients, and the bound on the error that follows from it.

In come the sums of what was left out, which triton/filtering.py makes; out go bounds for each row of the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .combine import statistics_dtype
from .spec import Problem


@dataclass(frozen=True)
class Dropped:
    """Sums of |dx_ic| over the entries that a filter left out; in the dtype of the statistics.

    The error of each row is a sum of these entries times rows of the other factor:

        |error of d_hidden_i| <= times rows_i max_c |w_c|          |error of d_weight_c| <= times columns_c max_i |h_i|
    """

    rows: Tensor  # (N,)
    columns: Tensor  # (V,)
    times: int  # 1, or 2 where as much was put in the place of what was left out

    def bound(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Bounds on the error of each row of d_hidden (N,) and of d_weight (V,), in the Euclidean norm."""
        longest_w, longest_h = (_longest_row(t).to(self.rows.dtype) for t in (problem.weight, problem.hidden))
        return self.times * self.rows * longest_w, self.times * self.columns * longest_h


def _longest_row(values: Tensor) -> Tensor:
    lengths = torch.linalg.vector_norm(values, dim=1, dtype=statistics_dtype(values.dtype))
    return lengths.amax() if len(lengths) else lengths.new_zeros(())
