# SPDX-License-Identifier: Apache-2.0
"""The processor's own rate of multiply-adds, by a loop in registers, and the phases of the CPU kernel held against it."""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.tables import View, time_text
from cce_fx.kernels.native import build, library, plan
from cce_fx.kernels.spec import Sizes

# In the order of micro_kernel.h; beside each the product that is made in it.
PHASES = {
    "packing": "",
    "logits": "logits",
    "exponentials": "",
    "gradient of hidden": "hidden",
    "gradient of weight": "weight",
    "sums into memory": "",
}
_PART = 0.1  # seconds of a measurement
_PARTS = 9


@functools.cache
def rate(dtype: torch.dtype, threads: int) -> float:
    """Operations a second that the processor makes of float32, or of pairs of bfloat16 where it multiplies these at once.

    A multiply-add is two. The median of some short runs, of all threads together, in CPU time, so that what else the machine does
    counts little. Raises RuntimeError without compiled code.
    """
    define, files = f"STORAGE {library.STORAGE[dtype]}", (*library.FILES, str(Path(__file__).with_suffix(".cpp")))
    code = build.library(*files, define=define) if library.on_this_machine() else None
    if code is None:
        raise RuntimeError("the processor's rate needs the compiled kernel")
    code.cce_multiply_add.restype = ctypes.c_double
    memory = torch.zeros(threads, 16)

    def run(count: int) -> tuple[float, float]:
        begin = time.process_time()
        address = ctypes.c_void_p(memory.data_ptr())
        done = code.cce_multiply_add(ctypes.c_int64(threads), ctypes.c_int64(count), address)
        return done, (time.process_time() - begin) / threads

    run(1 << 16)  # starts the threads
    _, seconds = run(1 << 20)
    count = int((1 << 20) * _PART / seconds) + 1
    return statistics.median(done / seconds for done, seconds in (run(count) for _ in range(_PARTS)))


def products(found: plan.Plan, classes: int, width: int) -> dict[str, float]:
    """Operations that a plan spends on each product."""
    made = dict.fromkeys(("logits", "hidden", "weight"), 0.0)
    for step in found.steps:
        each = 2.0 * width * (step.last - step.first) * (step.end - step.begin)
        made["logits"] += each
        made["hidden"] += each * bool(step.hidden)
        made["weight"] += each * bool(step.weights)
    return made


def phases(run: Callable[[], object], sizes: Sizes, rounds: int) -> View:
    """Where the time of a run goes: forward and backward of a problem of these sizes, by code compiled with PHASES."""
    threads = torch.get_num_threads()
    code = build.library(*library.FILES, define=f"STORAGE {library.STORAGE[sizes.dtype]}")
    assert code is not None
    code.cce_ticks.restype = ctypes.c_int64
    ticks = (ctypes.c_int64 * len(PHASES))()
    code.cce_phases(ticks)
    best, seconds = rate(sizes.dtype, threads), []
    shares: list[list[float]] = []
    for _ in range(rounds):
        begin, first = time.process_time(), code.cce_ticks()
        run()
        seconds.append((time.process_time() - begin) / threads)
        whole = threads * (code.cce_ticks() - first)
        code.cce_phases(ticks)
        shares.append([t / whole for t in ticks])
    middle = statistics.median(seconds)
    made = products(plan.sums_and_gradients(sizes, threads), sizes.classes, sizes.width)
    lines = []
    for at, (name, product) in enumerate(PHASES.items()):
        share = statistics.median(found[at] for found in shares)
        of_rate = f"{made[product] / (share * middle) / best:.3f}" if product else ""
        lines.append((name, f"{share:.3f}", of_rate))
    lines.append(("all else, and waiting", f"{1 - statistics.median(map(sum, shares)):.3f}", ""))
    lines.append(
        ("together, counted as 6NDV", "1", f"{6 * sizes.rows * sizes.classes * sizes.width / middle / best:.3f}")
    )
    return View(
        f"N={sizes.rows}, D={sizes.width}, V={sizes.classes}, {sizes.dtype}: {time_text(seconds)} of CPU time; {threads} threads make"
        f" {best / 1e9:.0f} GFLOP/s of multiply-adds",
        ("", "share of the time", "of the processor's rate"),
        tuple(lines),
    )
