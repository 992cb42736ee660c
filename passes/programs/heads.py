# SPDX-License-Identifier: Apache-2.0
"""As what a row program begins with a head: which of its two dimensions are the rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..decide import row_count
from ..values import Form, LogitsView, example_size, value_of

_FEWER = 4  # times fewer rows than classes, for which the classes are tried as the rows


def turned(view: LogitsView) -> LogitsView | None:
    """A head the other way round: its classes are the rows, and each has a value of the bias. None where it cannot be turned."""
    plain = replace(view, bias=None)
    facing = None if len(view.shape) != 2 or view.form is not Form.LOGITS else plain.facing(1 - view.class_dim)
    return facing and replace(facing, bias=view.bias, turned=not view.turned)


def is_better_turned(view: LogitsView) -> bool:
    """Whether blocks of classes move less than blocks of rows.

    Each block reads and writes a gradient of the other operand: the weight's, of all classes, or hidden's, of all rows. On
    a GPU, whose memory is fast, many small blocks take longer.
    """
    cpu = value_of(view.linear).device == torch.device("cpu")
    return cpu and 1 < _FEWER * example_size(row_count(view)) <= example_size(view.classes)
