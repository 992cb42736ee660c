# SPDX-License-Identifier: Apache-2.0
"""Kernels of the cut cross-entropy. This package imports nothing of the project outside itself."""
