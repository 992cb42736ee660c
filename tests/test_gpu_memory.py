# SPDX-License-Identifier: Apache-2.0
"""The examples' and benchmarks' reading of the CUDA allocator's history, on histories as `torch.cuda.memory._snapshot` gives them.

They are written out here in the format that torch documents, and torch's own tools read them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import measure
from examples.support import cuda_memory, memory

KIB, MIB = 1 << 10, 1 << 20
BASE = 0x7F0000000000


def event(action: str, address: int, size: int, microseconds: int) -> dict[str, Any]:
    return {"action": action, "addr": BASE + address, "size": size, "stream": 0, "time_us": microseconds, "frames": []}


def snapshot() -> dict[str, Any]:
    """One step: an activation of 2 MiB, logits of 40 MiB and their copy, gradients of 6 MiB that stay."""
    start = 1_760_000_000_000_000
    trace = [
        event("segment_alloc", 0, 100 * MIB, start),
        event("alloc", 0, 2 * MIB, start + 10),
        event("alloc", 2 * MIB, 40 * MIB - 100, start + 20),
        event("alloc", 42 * MIB, 40 * MIB - 100, start + 30),
        event("free_requested", 42 * MIB, 40 * MIB - 100, start + 40),
        event("free_completed", 42 * MIB, 40 * MIB - 100, start + 40),
        event("alloc", 42 * MIB, 6 * MIB, start + 50),
        event("free_requested", 2 * MIB, 40 * MIB - 100, start + 60),
        event("free_completed", 2 * MIB, 40 * MIB - 100, start + 61),
        event("free_requested", 0, 2 * MIB, start + 70),
        event("free_completed", 0, 2 * MIB, start + 70),
        {"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": start + 80, "frames": []},
    ]
    blocks = [
        {
            "size": (end - at) * MIB,
            "requested_size": (end - at) * MIB,
            "address": BASE + at * MIB,
            "state": state,
            "frames": [],
        }
        for at, end, state in ((0, 42, "inactive"), (42, 48, "active_allocated"), (48, 100, "inactive"))
    ]
    segment = {
        "device": 0, "address": BASE, "total_size": 100 * MIB, "allocated_size": 6 * MIB, "active_size": 6 * MIB,
        "requested_size": 6 * MIB, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0),
        "is_expandable": False, "frames": [], "blocks": blocks,
    }  # fmt: skip
    return {"segments": [segment], "device_traces": [trace, []], "allocator_settings": {}, "external_annotations": []}


def test_torch_reads_these_histories() -> None:
    from torch.cuda import _memory_viz

    assert "alloc" in _memory_viz.trace(snapshot()) and "6.0MiB" in _memory_viz.segsum(snapshot())


def test_changes_are_the_bytes_asked_for_in_order() -> None:
    found = cuda_memory.changes(snapshot())
    large = 40 * MIB - 100
    assert [c.bytes for c in found] == [2 * MIB, large, large, -large, 6 * MIB, -large, -2 * MIB]
    assert found[1].seconds - found[0].seconds == pytest.approx(10e-6, abs=1e-6)
    assert cuda_memory.changes(snapshot(), device=1) == []


def test_a_history_without_its_beginning_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "LONGEST", 12)
    with pytest.raises(ValueError, match="longer than the 12 events"):
        cuda_memory.changes(snapshot())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> mock.MagicMock:
    """A GPU whose allocator has the history above."""
    cuda = mock.MagicMock(spec=torch.cuda)
    cuda.memory._snapshot.side_effect = lambda *args: snapshot()
    cuda.current_device.return_value = 0
    cuda.memory_allocated.return_value = 3 * MIB
    cuda.max_memory_allocated.return_value = 3 * MIB + 82 * MIB
    monkeypatch.setattr(torch, "cuda", cuda)
    return cuda


def test_a_step_is_traced_with_its_phases(recorded: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(1_760_000_000 + t * 1e-6 for t in (0, 35, 36, 65, 66, 75))
    monkeypatch.setattr(memory.time, "time", lambda: next(times))

    def step() -> None:
        for name in memory.PHASES:
            with memory.phase(name):
                pass

    trace = memory.trace_step(step, "cuda")
    assert trace.peak_bytes == 82 * MIB - 200 and trace.allocator_peak == 82 * MIB
    assert trace.bytes_alive[-1] == 6 * MIB
    assert trace.milliseconds[:3] == pytest.approx([0.01, 0.02, 0.03], abs=2e-3)
    assert trace.phases["forward"] == pytest.approx((0, 0.035), abs=2e-3)
    assert list(trace.phases) == list(memory.PHASES)
    assert memory._spans is None and recorded.memory._record_memory_history.call_args == mock.call(None)
    assert json.loads(json.dumps(trace.to_dict()))["peak_bytes"] == trace.peak_bytes


def test_recording_ends_when_a_step_fails(recorded: mock.MagicMock) -> None:
    with pytest.raises(ZeroDivisionError):
        memory.trace_step(lambda: 1 / 0, "cuda:0")
    assert memory._spans is None and recorded.memory._record_memory_history.call_args == mock.call(None)


def test_allocations_of_a_call(recorded: mock.MagicMock) -> None:
    result, changes = measure.allocations(lambda: 7, "cuda")
    assert result == 7 and max(changes) == 40 * MIB - 100 and sum(changes) == 6 * MIB


def test_the_picture_and_the_table_of_a_gpu(recorded: mock.MagicMock, tmp_path: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    try:
        from support import report
    finally:
        sys.path.pop(0)
    trace = memory.trace_step(lambda: None, "cuda").to_dict()
    trace["phases"] = {name: (at * 0.02, at * 0.02 + 0.02) for at, name in enumerate(memory.PHASES)}
    steps = [{"step": at, "loss": 3.0 - at, "seconds": 0.1} for at in range(2)]
    own = {"parameters": 6 * MIB, "gradients": 6 * MIB, "optimizer": 12 * MIB}
    runs = {mode: {"trace": trace, "steps": steps, "own": own} for mode in ("eager", "cce")}
    summaries = {mode: report.summarise(run, runs["eager"]) for mode, run in runs.items()}
    assert summaries["cce"]["allocator_peak_bytes"] == 82 * MIB
    from rich.console import Console

    with (tmp_path / "table.txt").open("w") as file:
        Console(file=file, width=120).print(report.comparison_table(summaries))
    assert "peak of the step by the GPU's allocator" in (tmp_path / "table.txt").read_text()
    assert report.draw(runs, "a title", tmp_path / "a.png").stat().st_size > 10_000
