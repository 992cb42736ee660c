# SPDX-License-Identifier: Apache-2.0
"""As what a region begins with a head: its product, whose rows are the head's or its classes, and what makes that logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..decide import row_count
from ..rewriter import after_product
from ..values import Form, LogitsView, Operand, Scale, example_size, value_of
from .axes import Axis, Dim, fresh
from .numbers import spelling
from .record import Recorder
from .value import Head, Leaf, Turned, Value

_FEWER = 4  # times fewer rows than classes, for which the classes are tried as the rows


def turned(view: LogitsView) -> LogitsView | None:
    """A head the other way round: its classes are the rows, and each has a value of bias and scales. None where it cannot be turned."""
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


def begun(recorder: Recorder, node: Node, view: LogitsView, head: Node | Turned, sizes: Callable[[Any], Any]) -> Tensor:
    """The logits of a view, which are a node's value, from the bare product of a head on."""
    rows = [sizes(s) for s in view.row_shape]
    classes = sizes(view.classes)
    dims: list[Dim] = [() if size == 1 else (Axis(size, row=True),) for size in rows]
    product = recorder.empty(value_of(node), view.dtype, [*rows, classes])
    along: Dim = () if classes == 1 else (Axis(classes, mixed=spelling(view.linear)),)
    grad = value_of(node).requires_grad
    recorder.enter(product, Value([*dims, along], view.dtype, Head(head), grad=grad))

    def by_class(operand: Operand) -> Tensor:
        fake = recorder.empty(value_of(node), view.dtype, rows if view.turned else [classes])
        flows = grad and operand.requires_grad
        return recorder.enter(fake, Value([fresh(*fake.shape)], view.dtype, Leaf(operand), grad=flows))

    steps = [*view.scales, *([] if view.bias is None else [Scale(torch.add, view.bias)])]
    given = [by_class(step.operand) for step in steps]

    def logits(z: Tensor) -> Tensor:
        for step, x in zip(steps, given, strict=True):
            z = step.apply(z, x.unsqueeze(-1) if view.turned else x)
        z = after_product(view, value_of(node).dtype, z)
        return z if view.class_dim == len(view.shape) - 1 else torch.movedim(z, -1, view.class_dim)

    return recorder.run(logits, (product,), {})
