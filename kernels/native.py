# SPDX-License-Identifier: Apache-2.0
"""The walks of `elementwise` as compiled code, three to six times as fast as torch operations: float32 on a CPU.

`native.cpp` is compiled once per machine by the C++ compiler that inductor uses, with its flags and into its cache on
disk. Where there is no compiler, or too little to do for it to pay, the torch operations serve.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

import torch
from torch import Tensor

from .elementwise import Elementwise, Torch
from .spec import Problem

_log = logging.getLogger("cce_fx")

FEWEST_LOGITS = 1 << 24  # of a problem; compiling takes about as long as two hundred times as many entries
_PIECE = 128  # columns that a thread takes at a time
_LEVELS_PIECE = 512  # and where each piece has sums for every level
_X86 = ("-mprefer-vector-width=512",) if platform.machine().lower() in ("x86_64", "amd64") else ()
_FLAGS = ("-ffp-contract=fast", *_X86)
_TORCH = Torch()


def elementwise(problem: Problem) -> Elementwise:
    """The fastest way for the tiles of `problem`."""
    rows, classes = problem.hidden.shape[0], problem.weight.shape[0]
    halves = (torch.float32, torch.bfloat16, torch.float16)
    if problem.hidden.device.type != "cpu" or problem.hidden.dtype not in halves or rows * classes < FEWEST_LOGITS:
        return _TORCH
    return _load() or _TORCH


@functools.cache
def _load() -> Native | None:
    """The compiled code, or None where it cannot be had; the log says why."""
    try:
        from torch._inductor.codecache import CppCodeCache

        source = Path(__file__).with_name("native.cpp").read_text()
        return Native(CppCodeCache.load(source, "cpu", extra_flags=_FLAGS))
    except (ImportError, AttributeError, TypeError, OSError, RuntimeError) as error:  # no compiler, or another torch
        _log.info("elementwise loops run as torch operations, since native.cpp could not be compiled: %s", error)
        return None


class Native:
    """`elementwise.Elementwise` by calls into `native.cpp`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, count, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
        self._exp_sums = library.cce_exp_sums
        self._exp_sums.argtypes = [*[pointer], *[count] * 3, *[pointer] * 6, number, number]
        self._probabilities = library.cce_probabilities
        self._probabilities.argtypes = [pointer, count, count, pointer, pointer, number]
        self._levels = library.cce_levels
        self._levels.argtypes = [pointer, count, count, count, *[pointer] * 5, number]
        self._keep = library.cce_keep
        self._keep.argtypes = [pointer, count, pointer, count, pointer, number]
        for function in (self._exp_sums, self._probabilities, self._levels, self._keep):
            function.restype = None

    def exp_sums(
        self, tile: Tensor, before: Tensor | None, highest: Tensor, sums: Tensor, weighted: Tensor | None,
        weights: Tensor | None, keep: bool,
    ) -> None:  # fmt: skip
        columns, rows = tile.shape
        scratch = tile.new_empty(2 * -(-columns // _PIECE) * rows)
        weights = None if weights is None else weights.contiguous()
        pointers = map(_address, (before, weights, scratch, highest, sums, weighted))
        self._exp_sums(_address(tile), columns, rows, _PIECE, *pointers, keep, torch.get_num_threads())

    def probabilities(self, tile: Tensor, highest: Tensor, factor: Tensor) -> None:
        columns, rows = tile.shape
        pointers = _address(highest.contiguous()), _address(factor.contiguous())
        self._probabilities(_address(tile), columns, rows, *pointers, torch.get_num_threads())

    def levels(self, tile: Tensor, factor: Tensor, levels: Tensor, sums: Tensor, mass: Tensor) -> None:
        columns, rows = tile.shape
        scratch = tile.new_empty(-(-columns // _LEVELS_PIECE) * mass.numel())
        pointers = map(_address, (factor.contiguous(), levels, scratch, sums, mass))
        self._levels(_address(tile), columns, rows, _LEVELS_PIECE, *pointers, torch.get_num_threads())

    def keep(self, tile: Tensor, index: Tensor, factor: Tensor) -> Tensor:
        pointers = _address(index), len(index), _address(factor.contiguous())
        self._keep(_address(tile), tile.shape[1], *pointers, torch.get_num_threads())
        return tile[: len(index)]


def _address(values: Tensor | None) -> int | None:
    if values is None:
        return None
    assert values.is_contiguous() and values.dtype in (torch.float32, torch.uint8, torch.int64)
    return values.data_ptr()
