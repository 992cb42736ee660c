# SPDX-License-Identifier: Apache-2.0
"""Functions and methods of torch as `__torch_function__` is handed them: which ask for nothing, which write, which are views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..passes.canonical import is_inplace_callable

_GET = ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_sparse", "is_leaf",
        "is_quantized", "is_meta", "is_mps", "is_xpu", "itemsize", "nbytes", "is_nested", "is_mkldnn", "is_vulkan")  # fmt: skip
_ASK = ("size", "dim", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "is_complex", "element_size",
        "storage_offset", "get_device", "is_inference", "__len__", "ndimension", "is_signed", "is_same_size")  # fmt: skip
METADATA = {
    *(getattr(Tensor, name).__get__ for name in _GET if hasattr(Tensor, name)),
    *(getattr(Tensor, name) for name in _ASK),
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}

BASE: Any = Tensor._base.__get__  # type: ignore[attr-defined]
REGISTER_HOOK: Any = Tensor.register_hook
# By which a program watches the gradient of a tensor.
WATCH: tuple[Any, ...] = (Tensor.register_hook, Tensor.retain_grad, Tensor.register_post_accumulate_grad_hook)
IS_VIEW: Any = Tensor._is_view
DETACH_: tuple[Any, ...] = (Tensor.detach_, torch.detach_)
# They exchange a tensor's memory, and its views keep the old one.
_EXCHANGE = (Tensor.data.__set__,)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Op:
    """A function and its arguments, in which the states of lazy tensors stand for them."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    is_alias: bool  # whether the result is a view of the first argument's memory
    device: torch.device
    autocast: torch.dtype | None = None  # autocast's dtype where it was called

    @property
    def detaches(self) -> bool:
        return self.name == "detach"


def writes(func: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function changes its first argument in place."""
    inplace = is_inplace_callable(func) or func in _EXCHANGE
    return inplace or kwargs.get("out") is not None or kwargs.get("inplace") is True
