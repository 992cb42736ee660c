# SPDX-License-Identifier: Apache-2.0
"""Which device the tests marked `gpu` run on, and Triton's interpreter in half its time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton runs kernels on CPU tensors
# cuBLAS repeats its results only with this, which it reads once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def accelerator() -> torch.device:
    return torch.device("cpu" if INTERPRETED or not torch.cuda.is_available() else "cuda")


@contextlib.contextmanager
def faster_interpreter() -> Iterator[None]:
    """A kernel's calls of device functions without patching `triton.language` again for each."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    call, uses = InterpretedFunction.__call__, {}

    def nested(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.fn not in uses:
            uses[self.fn] = [m for m in (tl, tl.core) if any(v is m for v in self.fn.__globals__.values())]
        if any(tl.core.is_builtin(module.load) for module in uses[self.fn]):
            return call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = nested
    try:
        yield
    finally:
        InterpretedFunction.__call__ = call


@contextlib.contextmanager
def larger_tiles() -> Iterator[None]:
    """Tiles in the interpreter, which takes as long for a large one, of the size that a GPU's are."""
    from cce_fx.kernels.triton import device
    from cce_fx.kernels.triton.machines import Config, Fused, Tile

    tile, fused = Tile(128, 1024, 64, 1, 1), Fused(128, 512, 64, 64, 1, 1)
    config = Config(tile, tile, tile, tile, Tile(128, 64, 256, 1, 1), fused, fused)
    before = device.INTERPRETER
    device.INTERPRETER = replace(before, configs=dict.fromkeys(before.configs, config))
    try:
        yield
    finally:
        device.INTERPRETER = before
