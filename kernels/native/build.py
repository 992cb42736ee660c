# SPDX-License-Identifier: Apache-2.0
"""Compiled code: C++ in this folder, compiled once per machine by the compiler that inductor uses, into its cache on disk."""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

from torch import Tensor

# Logits of a problem for which to compile, which takes about as long as two hundred times as many of them.
FEWEST_LOGITS = 1 << 24
_log = logging.getLogger("cce_fx")
X86 = platform.machine().lower() in ("x86_64", "amd64")
# Sums that keep what they lose, and numbers that are not finite, mean what is written.
_EXACT = ("-fno-unsafe-math-optimizations", "-fno-finite-math-only")
# What loops gain from more, they say themselves; -O3 takes nearly twice as long to compile.
FLAGS = ("-O2", "-ffp-contract=fast", *_EXACT, *(("-mprefer-vector-width=512",) if X86 else ()))


@functools.cache
def library(*files: str, define: str = "") -> ctypes.CDLL | None:
    """The compiled `files` of this folder, one after the other and after `#define` `define`, or None where they cannot be had;
    the log says why."""
    try:
        from torch._inductor.codecache import CppCodeCache

        return CppCodeCache.load(source(*files, define=define), "cpu", extra_flags=FLAGS)
    except (ImportError, AttributeError, TypeError, OSError, RuntimeError) as error:  # no compiler, or another torch
        _log.info("torch operations serve instead of %s, which could not be compiled: %s", files[-1], error)
        return None


def source(*files: str, define: str = "") -> str:
    return f"#define {define}\n" * bool(define) + "\n".join(
        Path(__file__).with_name(name).read_text() for name in files
    )


def address(values: Tensor | None) -> int | None:
    """Of the first number of a tensor; None for none."""
    return None if values is None else values.data_ptr()
