# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step takes, counted allocation by allocation.

torch reports every allocation and release of its CPU allocator to the profiler, those of compiled code included, and its
CUDA allocator keeps a history of its own. Adding them up gives the number of bytes alive at each moment, and so the exact
peak; the resident size of the process, which moves with the C library's habits, is not looked at. Scratch memory that a
maths library takes from the system by itself is not seen.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from . import cuda_memory

PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepTrace:
    """Memory over one step, as bytes on top of what was alive when the step began."""

    milliseconds: list[float]
    bytes_alive: list[int]
    phases: dict[str, tuple[float, float]]  # name -> (begin, end) in milliseconds
    allocator_peak: int | None = None  # by a GPU's allocator itself, whose blocks are a little larger

    @property
    def peak_bytes(self) -> int:
        return max(self.bytes_alive, default=0)

    def to_dict(self) -> dict:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


_spans: dict[str, tuple[float, float]] | None = None  # of a step that is traced on a GPU, in seconds since 1970


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks a part of the step, so that it can be told apart in the trace; costs next to nothing outside of one."""
    begin = time.time()
    with record_function(f"phase:{name}"):
        yield
    if _spans is not None:
        torch.cuda.synchronize()  # what was queued belongs to this phase
        _spans[name] = begin, time.time()


def trace_step(step: Callable[[], object], device: str = "cpu") -> StepTrace:
    """Run `step` once and count its memory."""
    return _trace_on_gpu(step) if device.startswith("cuda") else _trace_on_cpu(step)


def _trace_on_cpu(step: Callable[[], object]) -> StepTrace:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    spans = {e.name()[6:]: e for e in events if e.name().startswith("phase:")}
    return step_trace(
        [cuda_memory.Change(t / 1e9, nbytes) for t, nbytes in changes],
        {name: (e.start_ns() / 1e9, (e.start_ns() + e.duration_ns()) / 1e9) for name, e in spans.items()},
    )


def _trace_on_gpu(step: Callable[[], object]) -> StepTrace:
    global _spans
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, _spans = torch.cuda.memory_allocated(), {}
    try:
        with cuda_memory.history() as changes:
            step()
        return step_trace(changes, _spans, torch.cuda.max_memory_allocated() - before)
    finally:
        _spans = None


def step_trace(
    changes: list[cuda_memory.Change], spans: dict[str, tuple[float, float]], allocator_peak: int | None = None
) -> StepTrace:
    """A trace out of allocations and phases, whose times are in seconds by one clock."""
    begin = min([*(c.seconds for c in changes), *(b for b, _ in spans.values())], default=0)
    milliseconds = lambda seconds: round(1e3 * (seconds - begin), 4)  # noqa: E731
    return StepTrace(
        milliseconds=[milliseconds(c.seconds) for c in changes],
        bytes_alive=list(itertools.accumulate(c.bytes for c in changes)),
        phases={name: (milliseconds(b), milliseconds(e)) for name, (b, e) in spans.items()},
        allocator_peak=allocator_peak,
    )


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct storages behind `tensors`: tied weights count once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def own_bytes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """What any way of training this model has to hold: parameters, their gradients, the optimizer's state."""
    parameters = list(model.parameters())
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return {
        "parameters": tensor_bytes(parameters),
        "gradients": sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        "optimizer": tensor_bytes(state),
    }
