# SPDX-License-Identifier: Apache-2.0
"""Compiles the native code with a sanitizer where CCE_FX_SANITIZE names one: `nox -s sanitized` preloads its runtime."""

from __future__ import annotations

import os

from cce_fx.kernels.native import build

if sanitize := os.environ.get("CCE_FX_SANITIZE"):
    build.FLAGS = (
        *build.FLAGS, f"-fsanitize={sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1",
    )  # fmt: skip
