# SPDX-License-Identifier: Apache-2.0
"""Which of the three implementations serves a problem, and how much of a workspace it takes.

In comes a `Problem`, or the sizes of one; out goes `triton` on a GPU, `native` on a CPU that it is compiled for, and `portable`
everywhere else. Nothing but this file knows all three.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os

import torch
from torch import Tensor

from .combine import statistics_dtype
from .spec import Kernel, Problem, Products, Sizes


def on_gpu(device: torch.device) -> bool:
    """Whether the Triton kernels run on a device."""
    # With TRITON_INTERPRET=1 triton runs the GPU's kernels on CPU tensors, for tests and debugging.
    gpu = device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return gpu and importlib.util.find_spec("triton") is not None


def choose(problem: Problem) -> Kernel:
    """The implementation for a problem, by its device, its dtype and its size."""
    device, weight = problem.hidden.device, problem.weight
    if on_gpu(device):
        return _folder("triton")
    if device.type == "cpu" and weight.numel():
        native = _folder("native")
        if native.serves(weight.dtype, problem.hidden.shape[0] * weight.shape[0]):
            return native
    return _folder("portable")


def products(weight: Tensor, block: int, rows: int) -> Products:
    """The products of a head with a weight (V, D), for blocks of `block` of its `rows` rows."""
    native = _folder("native.products")
    on_cpu = weight.device.type == "cpu" and weight.numel() > 0 and native.serves(weight.dtype, block, weight.shape[0])
    if on_cpu and _folder("native").serves(weight.dtype, rows * weight.shape[0]):
        return native.NativeProducts(weight, block)  # type: ignore[no-any-return]
    return _folder("portable.products").PortableProducts(weight, block)  # type: ignore[no-any-return]


def prepare(dtype: torch.dtype, device: torch.device) -> None:
    """Have a CPU's code compiled in the background, while a program with a loss in `dtype` is."""
    if device.type == "cpu" and not on_gpu(device):
        _folder("native").prepare(dtype)


def workspace(sizes: Sizes, device: torch.device, again: bool) -> int:
    """Bytes that a loss of `sizes` takes of its workspace; `again` where a backward makes the logits again."""
    if on_gpu(device):
        return _on_gpu(sizes, again)
    if device.type == "cpu" and _folder("native").compiled(sizes.dtype) is not None:
        return _folder("native").needed(sizes, again)
    return _folder("portable").needed(sizes, again)


def _on_gpu(s: Sizes, again: bool) -> int:
    """The limit that the Triton kernels keep to, and never more than the logits and what they are made from."""
    default = _folder("triton.cost").default_scratch(s.rows, s.width, s.classes, s.dtype.itemsize)
    exact = statistics_dtype(s.dtype).itemsize
    converted = 0 if s.dtype.itemsize == exact else (2 if again else 1) * exact * (s.rows + s.classes) * s.width
    return min(default if s.workspace is None else s.workspace, exact * s.rows * s.classes + converted)


_folder = functools.cache(lambda name: importlib.import_module(f".{name}", __package__))
