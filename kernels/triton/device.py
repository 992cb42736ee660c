# SPDX-License-Identifier: Apache-2.0
"""Where the kernels run: what a device offers, and how a kernel is started on it.

`record()` takes the place of the device: inside it every launch is written down with its real arguments instead of
being run, which is how the kernels are compiled ahead of time, and modelled, for machines that are not there.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton

from .machines import BY_ARCH, INTERPRETER, MACHINES, Machine


class Launch(NamedTuple):
    """One kernel start: the jitted function, its grid, its arguments by name, and warps and stages."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int]


@dataclass
class Recorder:
    """The launches of a `record()` block, as if on `machine`."""

    machine: Machine
    launches: list[Launch]


_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


@contextlib.contextmanager
def record(machine: Machine) -> Iterator[list[Launch]]:
    """Collect launches for `machine` instead of running them. Tensors may be on the meta device."""
    token = _recorder.set(Recorder(machine, []))
    try:
        found = _recorder.get()
        assert found is not None
        yield found.launches
    finally:
        _recorder.reset(token)


def recording() -> bool:
    """Whether launches are written down and not run."""
    return _recorder.get() is not None


def interpreted() -> bool:
    """Whether triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


_tma = os.environ.get("CCE_FX_TMA") == "1"


@contextlib.contextmanager
def through_tma(wanted: bool = True) -> Iterator[None]:
    """Load tiles of logits through tensor descriptors inside the block, where the GPU has them (CCE_FX_TMA=1: always)."""
    global _tma
    before, _tma = _tma, wanted
    try:
        yield
    finally:
        _tma = before


def machine_of(device: torch.device) -> Machine:
    """The machine behind `device`. Raises NotImplementedError where no kernel can run there."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.machine
    if device.type == "cuda":
        machine = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    elif interpreted():
        machine = INTERPRETER
    else:
        raise NotImplementedError(
            f"the triton kernels run on CUDA and ROCm tensors, not on {device.type}; use kernels.portable there, or set "
            "TRITON_INTERPRET=1 before triton is imported to run them slowly on the CPU"
        )
    return machine.through_tma() if _tma else machine


@functools.cache
def _gpu(index: int) -> Machine:
    p = torch.cuda.get_device_properties(index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else 10 * p.major + p.minor
    shared = getattr(p, "shared_memory_per_block_optin", 0)
    base = nearest(p.name, arch, shared)
    l2 = getattr(p, "L2_cache_size", 0)
    return base.like(p.name, p.multi_processor_count, shared or base.shared, l2 or base.l2)


def nearest(name: str, arch: int | str, shared: int) -> Machine:
    """The machine of the table that stands for a card: by its name, else by its architecture.

    A capability (`arch`, an int) that the table lacks is served by the newest below it that needs no more than the card's
    `shared` bytes, an AMD architecture by gfx942.
    """
    kin = [m for m in MACHINES.values() if isinstance(m.capability, int) == isinstance(arch, int)]
    named = [m for m in kin if m.name in name and m.capability == arch]
    if named:
        return named[0]
    if isinstance(arch, str):
        return BY_ARCH.get(arch, BY_ARCH["gfx942"])
    known = [m for m in BY_ARCH.values() if m in kin and m.capability <= arch and m.shared <= (shared or m.shared)]
    return max(known, key=lambda m: m.capability, default=BY_ARCH["sm_86"])


def launch(device: torch.device, kernel: Any, grid: tuple[int, ...], options: dict[str, int], **args: Any) -> None:
    """Run `kernel` over `grid` on `device`, or write it down inside `record()`. An empty grid is no launch."""
    if 0 in grid:
        return
    recorder = _recorder.get()
    if recorder is not None:
        recorder.launches.append(Launch(kernel, grid, args, options))
        return
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        # In a context of its own, so that an allocator that the program has set stays the program's.
        contextvars.copy_context().run(_start, kernel, grid, args, options, device)


def _start(
    kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, int], device: torch.device
) -> None:
    """Run a kernel, whose tensor descriptors take a little memory for the time that it runs."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))
    kernel[grid](**args, **options)
