# SPDX-License-Identifier: Apache-2.0
"""From the C++ files of this folder to a library: in come their names, out goes what ctypes has loaded.

The compiler is the one that inductor uses, and the library lies in its cache on disk, so this happens once per machine.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import platform
from pathlib import Path

_log = logging.getLogger("cce_fx")
X86 = platform.machine().lower() in ("x86_64", "amd64")
ARM = platform.machine().lower() in ("aarch64", "arm64")
# Sums that keep what they lose, and numbers that are not finite, mean what is written.
_EXACT = ("-fno-unsafe-math-optimizations", "-fno-finite-math-only")
# What loops gain from more, they say themselves; -O3 takes nearly twice as long to compile.
FLAGS = ("-O2", "-ffp-contract=fast", *_EXACT, *(("-mprefer-vector-width=512",) if X86 else ()))


@functools.cache
def library(*files: str, define: str = "") -> ctypes.CDLL | None:
    """The compiled `files` (of this folder, or elsewhere by their whole paths), one after the other and after `#define` `define`, or None where they cannot be had; the log says
    why."""
    try:
        from torch._inductor.codecache import CppCodeCache

        return CppCodeCache.load(source(*files, define=define), "cpu", extra_flags=FLAGS)
    except (ImportError, AttributeError, TypeError, OSError, RuntimeError) as error:  # no compiler, or another torch
        _log.info("torch operations serve instead of %s, which could not be compiled: %s", files[-1], error)
        return None


def source(*files: str, define: str = "") -> str:
    return f"#define {define}\n" * bool(define) + "\n".join(
        (Path(__file__).parent / name).read_text() for name in files
    )
