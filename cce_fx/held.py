# SPDX-License-Identifier: Apache-2.0
"""Gradients of a weight that were made in a forward, and wait for their backward.

One is as large as the weight. While one waits, the next losses on that weight make theirs in the backward, one after the other:
so a loop of losses holds no more of them than a single loss does. Losses in one graph are joined: see `passes/joined.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_MOST = 64  # nodes of autograd between a loss and its operator
_waiting: dict[int | None, weakref.ref[Any]] = {}  # nodes of autograd, by the memory of their weights


def is_held(weights: Iterable[Tensor]) -> bool:
    """Whether a gradient of one of some weights was noted whose backward did not run yet, or may run again."""
    return not torch.compiler.is_compiling() and any(
        _has_gradients(_waiting.get(_memory(weight))) for weight in weights
    )


def note(loss: Tensor, weights: Iterable[Tensor]) -> None:
    """Remember the gradients of some weights that a loss made in its forward, and holds."""
    if torch.compiler.is_compiling():
        return
    node = next((n for n in _behind(loss.grad_fn) if "with_grads" in n.name()), None)
    for key in map(_memory, weights) if node is not None else ():
        if key is not None:
            _waiting[key] = weakref.ref(node, lambda reference, key=key: _forget(key, reference))


def _forget(key: int, reference: Any) -> None:
    if _waiting.get(key) is reference:
        del _waiting[key]


def _memory(weight: Tensor) -> int | None:
    try:
        return weight.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # under a transform, say, where a tensor has no memory
        return None


def _behind(node: Any) -> Iterator[Any]:
    """Nodes of autograd, the nearest first."""
    found = [node] if node is not None else []
    for at in range(_MOST):
        if at == len(found):
            return
        yield found[at]
        found += [n for n, _ in found[at].next_functions if n is not None and n not in found]


def _has_gradients(reference: weakref.ref[Any] | None) -> bool:
    node = None if reference is None else reference()
    if node is None:
        return False
    try:
        return bool(node._raw_saved_tensors)  # not unpacked, which may move them between devices
    except RuntimeError:  # the backward has run
        return False
