# SPDX-License-Identifier: Apache-2.0
"""The compiled library: its functions, its structures, and when it is compiled.

In comes a dtype; out goes a `Library` for hidden and weight in it, or None where there cannot be one. `build.py` compiles the
files of this folder; `plan.py` and `run.py` call what they make.
"""

from __future__ import annotations

import contextvars
import ctypes
import functools
import sys
import threading

import torch

from .build import ARM, X86, library

# Logits of a problem for which to compile, which takes about as long as two hundred times as many of them.
FEWEST_LOGITS = 1 << 24
FILES = ("vectors.h", "micro_kernel.h", "head.h", "gradients.h", "steps.cpp")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_POINTER, _COUNT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Head(ctypes.Structure):
    """`struct Head` of `head.h`, in its order."""

    _fields_ = [
        *((name, _POINTER) for name in ("weight", "bias", "class_weight")),
        *((name, _COUNT) for name in ("weight_row", "weight_column", "classes", "width")),
        *((name, ctypes.c_float) for name in ("inner", "outer")),
        *((name, _FLAG) for name in ("capped", "weighted")),
        ("hidden", _POINTER),
        *((name, _COUNT) for name in ("hidden_row", "hidden_column")),
        *((name, _POINTER) for name in ("index", "target")),
        *((name, _POINTER) for name in ("prob", "hit", "uniform", "uniform_weight")),
        *((name, _POINTER) for name in ("highest", "sumexp", "target_logit", "weighted_sum", "best")),
        *((name, _POINTER) for name in ("nll", "lse")),
        *((name, _POINTER) for name in ("d_hidden", "d_weight", "d_bias", "logits")),
        ("columns", _COUNT),
        ("threads", _COUNT),
        ("workspace", _POINTER),
        ("workspace_size", _COUNT),
    ]


class Step(ctypes.Structure):
    """`struct Step` of `head.h`, in its order."""

    _fields_ = [
        *((name, _COUNT) for name in ("kind", "first", "last", "rows", "block", "begin", "end", "classes")),
        *((name, _FLAG) for name in ("hidden", "weights", "in_weight", "adds")),
    ]


DONE, MORE, NOT_FINITE = range(3)  # what `cce_run` returns


class Library:
    """The functions of `steps.cpp`."""

    def __init__(self, found: ctypes.CDLL, dtype: torch.dtype) -> None:
        head, step = ctypes.POINTER(Head), ctypes.POINTER(Step)
        self.run = _function(found.cce_run, _FLAG, head, step, _COUNT, ctypes.POINTER(_COUNT))
        self.workspace = _function(found.cce_workspace, _COUNT, head, step)
        self.are_classes = _function(found.cce_are_classes, _FLAG, _POINTER, _COUNT, _COUNT)
        self.rounds = dtype != torch.float32  # gradients in half precision cannot be added to: each is written once
        sizes = [_function(f, _COUNT)() for f in (found.cce_head_size, found.cce_step_size)]
        assert sizes == [ctypes.sizeof(Head), ctypes.sizeof(Step)]


def _function(found, result, *arguments):  # type: ignore[no-untyped-def]
    found.restype, found.argtypes = result, arguments
    return found


def on_this_machine() -> bool:
    """Whether the code is written for this processor and this system."""
    has = torch.cpu.get_capabilities()
    return sys.platform == "linux" and (ARM or (X86 and all(has.get(f) for f in ("avx2", "fma3", "f16c"))))


_prepared: set[torch.dtype] = set()


def prepare(dtype: torch.dtype) -> None:
    """Compile the code for `dtype` in the background, where that was not done yet, and have it serve small problems too."""
    if dtype in STORAGE and dtype not in _prepared and on_this_machine():
        _prepared.add(dtype)
        compile_here = contextvars.copy_context().run  # inductor's configuration belongs to a thread's context
        threading.Thread(target=compile_here, args=(compiled, dtype), name="cce_fx compiler", daemon=True).start()


def serves(dtype: torch.dtype, logits: int) -> bool:
    """Whether the code is there for a problem with so many logits: a large one, or any where it was prepared.

    This depends on what a program does and not on when it is compiled, so results repeat to the bit.
    """
    return (logits >= FEWEST_LOGITS or dtype in _prepared) and compiled(dtype) is not None


@functools.cache
def compiled(dtype: torch.dtype) -> Library | None:
    """The code for hidden and weight in `dtype`; None without a compiler, and on processors for which it was not written."""
    if dtype not in STORAGE or not on_this_machine():
        return None
    found = library(*FILES, define=f"STORAGE {STORAGE[dtype]}")
    return None if found is None else Library(found, dtype)
