# SPDX-License-Identifier: Apache-2.0
"""The likeliest class of each row of lazy logits, as the kernel of a loss of theirs has told it.

A loss in the compiled graph tells it with the logits (`outputs.py`), one outside of it when it is computed (`graph.py`); an
`argmax` asks for it (`operations.py`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..passes.canonical import CASTS
from .expression import Expression, is_calculation, line_of, moved_rows
from .state import State

# Calculations that leave the classes of a row in their order.
_IN_ORDER = {*CASTS, "contiguous", "softmax", "log_softmax"}


def known_top(state: State) -> Tensor | None:
    """The likeliest class of each row of a tensor that is some rows of logits, -1 where it is not known; or None."""
    root, *rest = line_of(state)
    if root.chain is None or root.chain.top is None:
        return None
    moves = []
    for s in rest:
        assert s.op is not None
        if not is_calculation(s.op, s):
            moves.append(s)
        elif s.op.name not in _IN_ORDER:
            return None
    return moved_rows(root.chain.top.view(*root.chain.hidden.shape[:-1], 1), moves)[..., 0]


def remember(expression: Expression, top: Tensor) -> None:
    """Keep the likeliest classes of the rows that an expression reads, -1 where they are not known, for who asks next."""
    assert expression.moves is not None
    root, *moves = expression.moves[0]
    chain = root.chain
    if chain is None:
        return  # read meanwhile
    shape = chain.hidden.shape[:-1]
    known = top.new_full((shape.numel(),), -1) if chain.top is None else chain.top
    places = moved_rows(torch.arange(known.numel(), device=top.device).view(*shape, 1), moves).flatten()
    root.chain = replace(chain, top=known.index_copy(0, places, torch.where(top < 0, known[places], top)))
