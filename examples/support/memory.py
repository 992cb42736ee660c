# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step takes, counted allocation by allocation.

torch reports every allocation and release of its CPU allocator to the profiler, those of compiled code included. Adding
them up gives the number of bytes alive at each moment, and so the exact peak; the resident size of the process, which
moves with the C library's habits, is not looked at. Scratch memory that a maths library takes from the system by itself
is not seen.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASES = ("forward", "backward", "optimizer")


@dataclass(frozen=True)
class StepTrace:
    """Memory over one step, as bytes on top of what was alive when the step began."""

    milliseconds: list[float]
    bytes_alive: list[int]
    phases: dict[str, tuple[float, float]]  # name -> (begin, end) in milliseconds

    @property
    def peak_bytes(self) -> int:
        return max(self.bytes_alive, default=0)

    def to_dict(self) -> dict:
        return asdict(self) | {"peak_bytes": self.peak_bytes}


def phase(name: str):
    """Marks a part of the step, so that it can be told apart in the trace; costs nothing outside of one."""
    return record_function(f"phase:{name}")


def trace_step(step: Callable[[], object]) -> StepTrace:
    """Run `step` once and count its memory."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda c: c[0])
    spans = {e.name()[6:]: e for e in events if e.name().startswith("phase:")}
    begin = min([*(t for t, _ in changes), *(e.start_ns() for e in spans.values())], default=0)
    return StepTrace(
        milliseconds=[round((t - begin) / 1e6, 4) for t, _ in changes],
        bytes_alive=list(itertools.accumulate(b for _, b in changes)),
        phases={
            name: ((e.start_ns() - begin) / 1e6, (e.start_ns() + e.duration_ns() - begin) / 1e6)
            for name, e in spans.items()
        },
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
