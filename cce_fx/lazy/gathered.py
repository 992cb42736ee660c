# SPDX-License-Identifier: Apache-2.0
"""Weights that FSDP gathers for a module's forward and lets go again: what lazy logits have to know of them.

A gathered weight's version does not change when an optimizer changes the shards, and its memory may be let go and taken again at
the same address. So the shard tells whether the weight is still the forward's, and the size of its memory whether it is there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

# Without it in the program there is nothing to look for.
_LOADED = "torch.distributed.fsdp"


def shard_of(weight: Tensor) -> Tensor | None:
    """FSDP's sharded parameter that `weight` was gathered from; None where it is an ordinary tensor."""
    found = _managed(weight)
    return None if found is None else found[1].sharded_param


def is_let_go_early(weight: Tensor) -> bool:
    """Whether FSDP lets a gathered weight go right after its module's forward (`reshard_after_forward`)."""
    found = _managed(weight)
    return found is not None and found[0]._reshard_after_forward


def is_there(weight: Tensor) -> bool:
    """Whether a tensor still has its memory."""
    return weight.numel() == 0 or weight.untyped_storage().size() > 0


def is_gathering(hook: Callable[..., Any]) -> bool:
    """Whether a tensor's hook is the one with which FSDP gathers a module's weights before its backward."""
    if _LOADED not in sys.modules:
        return False
    from .._torch import FSDPState

    return isinstance(getattr(hook, "__self__", None), FSDPState)


def _managed(weight: Tensor) -> tuple[Any, Any] | None:
    """FSDP's group of parameters and its parameter behind a gathered weight."""
    if _LOADED not in sys.modules or not isinstance(weight, Parameter):
        return None
    from .._torch import FSDPState, composable_states

    if not composable_states:
        return None
    for reference in list(composable_states.values()):
        state = reference()
        if not isinstance(state, FSDPState):
            continue
        for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
            for managed in group.fsdp_params if group is not None else ():
                if getattr(managed, "_unsharded_param", None) is weight:
                    return group, managed
    return None
