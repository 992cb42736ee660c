"""The benchmark programs run, say what is missing, and write what they measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, kernel, measure, memory_timeline, peers


def test_gpu_program_compares_what_runs_here_and_names_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = "gpu --device cpu --dtype float32 --shape 40,32,300 --rounds 2".split()
    monkeypatch.setattr(sys, "argv", [*arguments, "--out", str(tmp_path)])
    gpu.main()
    (path,) = tmp_path.glob("*.json")
    assert path.with_suffix(".png").stat().st_size > 10_000
    found = {r["implementation"]: r for r in json.loads(path.read_text())["results"]}
    assert list(found) == [p.name for p in peers.peers("cpu")]
    for name in ("eager", "inductor", "cce_fx", "cce_fx, recompute"):
        assert found[name]["both"] > 0 < found[name]["forward"] and max(found[name]["error"].values()) < 1e-5
    assert found["liger-kernel"]["note"] and found["liger-kernel"]["both"] is None
    assert "runs on a GPU only" in capsys.readouterr().out


def test_gpu_program_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU"):
        gpu.main()


def test_kernel_program_prints_ratios(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", "kernel --shape 64,16,500 --rounds 1 --runs floor,tiled,ignored".split())
    kernel.main()
    assert "/floor" in capsys.readouterr().out


def test_peak_is_counted_exactly() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        return torch.empty(3 << 19, dtype=torch.uint8)

    assert measure.peak_bytes(run) == 3 << 19


def test_memory_timeline_draws_what_a_step_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"memory_timeline --rows 256 --width 16 --vocab 4000 --out {tmp_path}".split()
    monkeypatch.setattr(sys, "argv", arguments)
    memory_timeline.main()
    found = json.loads((tmp_path / "memory_timeline.json").read_text())
    peaks = {name: max(line["bytes"]) for name, line in found.items()}
    logits = 256 * 4000 * 4
    assert peaks["cce"] < logits < peaks["eager"]
    assert [k[0] for k in found["cce"]["kernels"]] == ["cce_fx::forward_backward"]
    assert (tmp_path / "memory_timeline.png").stat().st_size > 10_000
    assert "cce: at most" in capsys.readouterr().out
