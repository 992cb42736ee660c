# SPDX-License-Identifier: Apache-2.0
"""Leaving out tiles whose gradient is negligible, with a bound on what that costs (arXiv 2411.09009, section 4.3).

A tile is left out when of no row more than its share of `Problem.filter_eps` is in it, the same for all tiles of the
vocabulary, so that no row loses more than `filter_eps` times its coefficient altogether. Classes are visited from the
likeliest to the least likely, so that the entries that matter share tiles. What is left out is summed up (`Dropped`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..combine import statistics_dtype
from ..dropped import Dropped
from ..spec import Problem


@dataclass(frozen=True)
class Filter(Dropped):
    """What is left out, and the order in which classes are visited."""

    eps: float
    order: Tensor  # (V,) int32, classes from the likeliest on


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
    rows, columns = (torch.zeros(size, dtype=dtype, device=device) for size in (n, v))
    return Filter(rows, columns, 1, p.filter_eps, order)
