"""Kernels of the cut cross-entropy. This package imports nothing of the project outside itself."""
