# SPDX-License-Identifier: Apache-2.0
"""Several linear layers that are one head: joined along the vocabulary, or added up as low-rank adapters are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ...kernels.spec import Epilogue
from ..registry import Call, Outcome, rule
from ..values import Form, LogitsView, Operand, Reason, same


def low_rank(call: Call, first: LogitsView, second: LogitsView) -> LogitsView | None:
    """h1 W1^T + h2 W2^T = [h1, h2] [W1, W2]^T: x W^T + s (x A^T) B^T with h2 = s x A^T, say. None where they differ.

    The joined weight is a copy; with the rank of an adapter that is the size of the weight, and not of the logits.
    """
    views = (first, second)
    plain = all(v.form is Form.LOGITS and v.epilogue.softcap is None for v in views)
    alike = (first.class_dim, len(first.shape), first.dtype) == (second.class_dim, len(second.shape), second.dtype)
    alike = alike and all(map(same, first.shape, second.shape))
    if not plain or not alike or (first.bias is not None and second.bias is not None):
        return None
    hidden, other = (_scaled(v.hidden, v) for v in views)
    bias = next((_scaled(v.bias, v) for v in views if v.bias is not None), None)
    return replace(
        first,
        hidden=hidden.then("cat", _join, first.class_dim, other),
        weight=first.weight.then("cat", _join, 1, second.weight),
        bias=bias,
        hidden_size=first.hidden_size + second.hidden_size,
        epilogue=Epilogue(),
        path=(*first.path, *second.path),
    ).at(call.node)


def _scaled(operand: Operand, view: LogitsView) -> Operand:
    scale = view.epilogue.scale * view.epilogue.post_scale
    return operand if scale == 1.0 else operand.then("mul", torch.mul, scale)


def _join(first: Any, dim: int, *others: Any) -> Any:
    return torch.cat([first, *others], dim)


@rule("cat")
def cat(call: Call) -> Outcome:
    """Logits of several heads on one hidden state, joined along the vocabulary."""
    nodes, dim = call.arg(0, "tensors"), call.arg(1, "dim", 0)
    if not isinstance(nodes, (list, tuple)):
        return None
    views = [call.values.get(n) if isinstance(n, Node) else None for n in nodes]
    if all(v is None for v in views):
        return None
    first = views[0]
    if first is None or not all(v is not None and _same_rows(first, v) for v in views):
        return call.decline(Reason.NO_RULE, "logits are joined with something else")
    if not isinstance(dim, int) or dim % len(first.shape) != first.class_dim:
        return call.decline(Reason.NO_RULE, "logits are joined along another dimension than the vocabulary")
    rest = views[1:]
    bias = first.bias and first.bias.then("cat", _join, 0, *(v.bias for v in rest))
    path = tuple(n for v in views for n in v.path)
    weight = first.weight.then("cat", _join, 0, *(v.weight for v in rest))
    shape = tuple(call.result.shape)
    return replace(first, weight=weight, bias=bias, shape=shape, path=path).at(call.node)


def _same_rows(a: LogitsView, b: LogitsView) -> bool:
    same_head = (a.hidden, a.class_dim, a.epilogue, a.dtype) == (b.hidden, b.class_dim, b.epilogue, b.dtype)
    return same_head and a.form is b.form is Form.LOGITS and (a.bias is None) == (b.bias is None)
