# SPDX-License-Identifier: Apache-2.0
"""Where an example runs: on the GPU where there is one, with bfloat16 in its products."""

import argparse
import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

DTYPES = ("float32", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser, sizes: dict[str, dict[str, Any]]) -> None:
    """`--device`, `--dtype`, and an option for each of the `sizes`, which are by device and then by name."""
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto takes the GPU, if any")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of products: float32, or bfloat16 by autocast (default on a GPU)"
    )
    for name, small in sizes["cpu"].items():
        text = f"default: {small:,}, on a GPU {sizes['cuda'][name]:,}"
        parser.add_argument(f"--{name}", type=type(small), help=text, default=argparse.SUPPRESS)


def settle(arguments: argparse.Namespace, sizes: dict[str, dict[str, Any]]) -> None:
    """Put a device, a dtype and sizes in the place of what was left open. Raises SystemExit where there is no GPU."""
    available = torch.cuda.is_available()
    if arguments.device == "cuda" and not available:
        raise SystemExit("--device cuda: torch.cuda.is_available() is False")
    if arguments.device == "auto":
        arguments.device = "cuda" if available else "cpu"
    if arguments.dtype is None:
        arguments.dtype = "bfloat16" if arguments.device == "cuda" else "float32"
    for name, value in sizes[arguments.device].items():
        setattr(arguments, name, getattr(arguments, name, value))


def autocast(device: str, dtype: str) -> Callable[[], AbstractContextManager[Any]]:
    """Makes what a forward runs in."""
    if dtype == "float32":
        return contextlib.nullcontext
    return lambda: torch.autocast(device.split(":")[0], getattr(torch, dtype))


def describe(device: str, dtype: str) -> str:
    """Both in a few words, for titles."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "CPU"
    return f"{dtype}{' by autocast' if dtype != 'float32' else ''}, {name}"
