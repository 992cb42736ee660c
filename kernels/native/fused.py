# SPDX-License-Identifier: Apache-2.0
"""The head with its loss as compiled code: calls into `fused.cpp`, which says what each field is."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import sys
import threading

import torch

from .build import FEWEST_LOGITS, X86, library

MOST_THREADS = 256
_POINTER, _COUNT, _FLAG = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Call(ctypes.Structure):
    """`struct Call` of `fused.cpp`, in its order."""

    _fields_ = [
        *((name, _POINTER) for name in ("weight", "bias", "class_weight")),
        *((name, _COUNT) for name in ("weight_row", "weight_column", "classes", "width")),
        ("weight_total", ctypes.c_double),
        *((name, ctypes.c_float) for name in ("inner", "outer")),
        *((name, _FLAG) for name in ("capped", "weighted")),
        ("hidden", _POINTER),
        *((name, _COUNT) for name in ("hidden_row", "hidden_column")),
        *((name, _POINTER) for name in ("index", "target")),
        *((name, _COUNT) for name in ("first", "rows")),
        *((name, _POINTER) for name in ("prob", "hit", "uniform", "uniform_weight")),
        *((name, _POINTER) for name in ("highest", "sumexp", "target_logit", "weighted_sum")),
        *((name, _POINTER) for name in ("d_hidden", "d_weight", "d_bias", "tiles", "shifts")),
        *((name, _POINTER) for name in ("levels", "class_sums", "mass", "keep_hidden", "keep_weight")),
        ("top", ctypes.c_float),
        ("more", _FLAG),
        *((name, _COUNT) for name in ("begin", "end", "stretch", "columns")),
        *((name, _FLAG) for name in ("threads", "fresh")),
        ("room", _POINTER),
    ]


class Compiled:
    """The functions of `fused.cpp`."""

    def __init__(self, found: ctypes.CDLL) -> None:
        call = ctypes.POINTER(Call)
        self.sums = _function(found.cce_sums, ctypes.c_int32, call)
        self.weights = _function(found.cce_weights, None, call)
        self.gradients = _function(found.cce_gradients, None, call)
        self.room = _function(found.cce_room, ctypes.c_int64, call, ctypes.c_int32)
        assert _function(found.cce_call_size, _COUNT)() == ctypes.sizeof(Call)
        # Of float32 alone: gradients that are added to again and again cannot be rounded each time.
        self.tiles, self.levels, self.kept = (
            _function(getattr(found, name), None, call) if hasattr(found, name) else None
            for name in ("cce_tiles", "cce_levels", "cce_kept")
        )


def _function(found, result, *arguments):  # type: ignore[no-untyped-def]
    found.restype, found.argtypes = result, arguments
    return found


FILES = ("vectors.h", "products.h", "head.h", "gradients.h", "fused.cpp", "filter.cpp", "room.cpp")
STORAGE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def on_this_machine() -> bool:
    """Whether the code is written for this processor and this system."""
    has = torch.cpu.get_capabilities()
    return X86 and sys.platform == "linux" and all(has.get(feature) for feature in ("avx2", "fma3", "f16c"))


_prepared: set[torch.dtype] = set()


def prepare(dtype: torch.dtype) -> None:
    """Compile the code for `dtype` in the background, where that was not done yet, and have it serve small problems too."""
    if dtype in STORAGE and dtype not in _prepared and on_this_machine():
        _prepared.add(dtype)
        compile_here = contextvars.copy_context().run  # inductor's configuration belongs to a thread's context
        threading.Thread(target=compile_here, args=(compiled, dtype), name="cce_fx compiler", daemon=True).start()


def is_wanted(dtype: torch.dtype, logits: int) -> bool:
    """Whether the code serves a problem with so many logits: a large one, or any where it was prepared.

    This depends on what a program does and not on when it is compiled, so results repeat to the bit.
    """
    return logits >= FEWEST_LOGITS or dtype in _prepared


@functools.cache
def compiled(dtype: torch.dtype) -> Compiled | None:
    """The code for hidden and weight in `dtype`; None without a compiler, and on processors for which it was not written."""
    if dtype not in STORAGE or not on_this_machine():
        return None
    found = library(*FILES, define=f"STORAGE {STORAGE[dtype]}")
    return None if found is None else Compiled(found)
