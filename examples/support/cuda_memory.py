# SPDX-License-Identifier: Apache-2.0
"""Every allocation on a GPU, from the history that torch's CUDA allocator keeps of itself.

The history has the bytes that were asked for, and when. Memory that does not come from the allocator (a library's own, CUDA's
context) is not in it. https://docs.pytorch.org/docs/stable/torch_cuda_memory.html describes its format.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

LONGEST = 1_000_000  # events that are kept


class Change(NamedTuple):
    """One allocation, or, with negative bytes, the release of one."""

    seconds: float  # since 1970, by the machine's clock
    bytes: int


@contextmanager
def history() -> Iterator[list[Change]]:
    """The allocations of the current device inside the block; the list is filled at its end."""
    found: list[Change] = []
    torch.cuda.synchronize()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=LONGEST, clear_history=True)
    try:
        yield found
        torch.cuda.synchronize()
        found += changes(torch.cuda.memory._snapshot(), torch.cuda.current_device())
    finally:
        torch.cuda.memory._record_memory_history(None)


def changes(snapshot: dict[str, Any], device: int = 0) -> list[Change]:
    """Allocations and releases of one device in a snapshot of the allocator, in order.

    Raises ValueError where the history is not whole: one that is as long as it may be has lost its beginning.
    """
    trace = snapshot["device_traces"][device]
    if len(trace) >= LONGEST:
        raise ValueError(f"the history of allocations is longer than the {LONGEST:,} events that are kept")
    # A release counts when it is asked for: on one stream the memory can be used again at once.
    signs = {"alloc": 1, "free_requested": -1}
    return [Change(e["time_us"] / 1e6, signs[e["action"]] * e["size"]) for e in trace if e["action"] in signs]
