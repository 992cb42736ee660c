# SPDX-License-Identifier: Apache-2.0
"""The forward: the statistics of every row, of the whole vocabulary or of one shard of it."""

from __future__ import annotations

from ..spec import Partials, Problem, Stats
from .sweep import run
from .tuning import tuned_head


def partial(problem: Problem) -> Partials:
    """Per-row sums (N,) over the columns of this shard, in float32 (float64 for float64). See `rows.select` for errors."""
    return run(tuned_head(problem), Partials)


def forward(problem: Problem) -> Stats:
    """Stats (N,) of the whole vocabulary, in float32 (float64 for float64). See `rows.select` for errors.

    Raises ValueError for a shard: combine the partials of all shards instead.
    """
    if problem.shard is not None:
        raise ValueError("forward needs the whole vocabulary; combine the partials of all shards instead")
    return run(tuned_head(problem), Stats)
