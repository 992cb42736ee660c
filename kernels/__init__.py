# SPDX-License-Identifier: Apache-2.0
"""Kernels of the cut cross-entropy: the contract in `spec.py`, implemented in `portable/`, `native/` and `triton/`.

`choose.py` says which of the three serves a problem. This package imports nothing of the project outside itself.
"""
