# SPDX-License-Identifier: Apache-2.0
"""These tests are of the GPU's kernels, on a GPU or in Triton's interpreter, which is made twice as fast for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from ..device import accelerator
from .support import Kernels

_call = interpreter.InterpretedFunction.__call__
_uses: dict[Any, list[Any]] = {}


@pytest.fixture(scope="session")
def device() -> torch.device:
    return accelerator()


@pytest.fixture(scope="session")
def kernels(device: torch.device) -> Kernels:
    return Kernels(device)


def _nested(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A device function's call, without patching `triton.language` again where an outer call has done so."""
    if self.fn not in _uses:
        _uses[self.fn] = [m for m in (tl, tl.core) if any(v is m for v in self.fn.__globals__.values())]
    if any(tl.core.is_builtin(module.load) for module in _uses[self.fn]):
        return _call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


@pytest.fixture(autouse=True, scope="session")
def _faster() -> Iterator[None]:
    interpreter.InterpretedFunction.__call__ = _nested
    yield
    interpreter.InterpretedFunction.__call__ = _call
