# SPDX-License-Identifier: Apache-2.0
"""Leaving out tiles whose gradient is negligible, with a bound on what that costs (arXiv 2411.09009, section 4.3).

A tile is left out when no entry of its softmax-minus-onehot gradient exceeds `Problem.filter_eps` times its row's
coefficient. Classes are visited from the likeliest to the least likely, so that the entries that matter share tiles.
What is left out is summed, per row and per class, so that the error is bounded by numbers and not by hope:

    |error of d_hidden_i| <= rows_i max_c |w_c|          |error of d_weight_c| <= columns_c max_i |h_i|
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..combine import statistics_dtype
from ..spec import Problem


@dataclass(frozen=True)
class Filter:
    """The mass sum |dx| that a filter left out; float32 (float64 for float64 inputs)."""

    eps: float
    order: Tensor  # (V,) int32, classes from the likeliest on
    rows: Tensor  # (N,), left out of each row of the gradient of hidden
    columns: Tensor  # (V,), left out of each class's gradient of weight and bias

    def bound(self, problem: Problem) -> tuple[Tensor, Tensor]:
        """Bounds on the error of each row of d_hidden (N,) and of d_weight (V,), in the Euclidean norm."""
        dtype = self.rows.dtype
        longest_w = torch.linalg.vector_norm(problem.weight, dim=1, dtype=dtype).amax()
        longest_h = torch.linalg.vector_norm(problem.hidden, dim=1, dtype=dtype).amax()
        return self.rows * longest_w, self.columns * longest_h


def make_filter(problem: Problem) -> Filter | None:
    """A filter with nothing dropped so far, or None where the problem asks for an exact gradient.

    The order is that of the mean logit before the cap, which is one product of the weight with the mean hidden state.
    """
    p = problem
    if p.filter_eps is None:
        return None
    dtype, device = statistics_dtype(p.hidden.dtype), p.hidden.device
    mean = p.hidden.mean(0, dtype=dtype).nan_to_num(0.0, 0.0, 0.0).to(p.hidden.dtype)
    logit = torch.mv(p.weight, mean).to(dtype) * p.epilogue.scale * p.epilogue.post_scale
    if p.bias is not None:
        logit = logit + p.bias.to(dtype) * p.epilogue.scale * p.epilogue.post_scale
    order = torch.argsort(logit, descending=True, stable=True).to(torch.int32)
    n, v = p.hidden.shape[0], p.weight.shape[0]
    return Filter(
        p.filter_eps,
        order,
        torch.zeros(n, dtype=dtype, device=device),
        torch.zeros(v, dtype=dtype, device=device),
    )
