# SPDX-License-Identifier: Apache-2.0
"""Time and memory of a call, on a CPU or a GPU."""

from __future__ import annotations

import contextlib
import itertools
import math
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from examples.support import cuda_memory

T = TypeVar("T")


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The largest number of bytes allocated at once during `run`, over what was allocated before.

    Exact: by the CUDA allocator's own count, or by adding up every allocation that torch reports of its CPU allocator.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _, changes = allocations(run)
    return max(itertools.accumulate(changes), default=0)


def allocations(run: Callable[[], T], device: str = "cpu") -> tuple[T, list[int]]:
    """The result of a run, and every allocation on the device during it in bytes, in order; one released is negative."""
    if device.startswith("cuda"):
        with cuda_memory.history() as history:
            result = run()
        return result, [change.bytes for change in history]
    with torch.profiler.profile(profile_memory=True, acc_events=True) as prof:
        result = run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    return result, [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """How long one call takes, work queued on the GPU included."""
    if device == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def stamps(run: Callable[[Callable[[], None]], object], device: str = "cpu") -> tuple[float, float]:
    """Seconds of a run until it calls its argument, and from there to its end, without a wait between them."""
    times: list[Any] = []

    def mark() -> None:
        if device == "cuda":
            times.append(torch.cuda.Event(enable_timing=True))
            times[-1].record()
        else:
            times.append(time.perf_counter())

    mark()
    run(mark)
    mark()
    begin, middle, end = times
    if device == "cuda":
        torch.cuda.synchronize()
        return begin.elapsed_time(middle) / 1e3, middle.elapsed_time(end) / 1e3
    return middle - begin, end - middle


class OutOfTime(BaseException):
    """The time for a whole run is up. No `Exception`, so that nothing takes it for a failure."""


class Budget:
    """The time of a whole run in minutes, from now; None is unlimited."""

    def __init__(self, minutes: float | None) -> None:
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Raises OutOfTime when the time is up."""
        if time.monotonic() >= self.end:
            raise OutOfTime

    @contextlib.contextmanager
    def limited(self, seconds: float) -> Iterator[None]:
        """Ends what takes longer: TimeoutError after `seconds`, OutOfTime when the whole time is up. In the main thread."""
        self.check()
        left = self.end - time.monotonic()
        kind = OutOfTime() if left < seconds else TimeoutError(f"took longer than {seconds:g} s")

        def stop(*args: object) -> None:
            raise kind

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, min(left, seconds))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def interleaved(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    after: Callable[[dict[str, list[float]]], None] = lambda times: None,
) -> dict[str, list[float]]:
    """Seconds of each run in each round; what else the machine does hits all alike. `after` is told after every round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
        after(times)
    return times


def free_bytes() -> int:
    """Memory of the machine that is not in use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
