# SPDX-License-Identifier: Apache-2.0
"""The benchmark programs run, say what is missing, and write what they measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, curves, measure, peers, report, scale, store
from benchmarks.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0 and f"benchmarks {command}" in capsys.readouterr().out


def test_an_unknown_command_is_named_with_those_there_are() -> None:
    with pytest.raises(SystemExit, match=r"no benchmark 'per'.*peers"):
        main(["per"])


def test_kernel_program_prints_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    main("kernel --shapes 64:16:500 --rounds 1 --runs".split() + ["three products,kernel,ignored,portable"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("three products", "kernel", "ignored", "portable"))


def test_kernel_program_shows_phases_beside_the_processors_rate() -> None:
    command = [sys.executable, *"-m benchmarks kernel --shapes 64:64:9000 --rounds 1 --threads 1 --peak".split()]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines() if "│" in line]
    share, of_rate = ({row[0]: float(row[at]) for row in cells if row[at]} for at in (1, 2))
    assert all(share[name] > 0 for name in ("packing", "logits", "gradient of hidden", "gradient of weight")), out
    assert 0.02 < of_rate["together, counted as 6NDV"] < 1.1, out


def test_peers_are_compared_recorded_and_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "peers.json"
    command = f"peers --shapes 64:16:600 --rounds 2 --only product,eager,cce_fx,liger --json {path}".split()
    main(command)
    _, _, rows = store.read(path)
    assert {r["mode"] for r in rows} == set(candidates.MODES)
    found = {r["implementation"]: r for r in rows if r["mode"] == "train"}
    assert all(len(found[name]["seconds"]) == 2 for name in ("three products", "one product", "eager", "cce_fx"))
    assert found["eager"]["gradients"] == 4 * 16 * (64 + 600) and found["three products"]["gradients"] == 0
    # Two tensors of the logits' size are alive at once in eager's backward, and gradients are not counted.
    assert 2 * 64 * 600 * 4 <= found["eager"]["peak"] - found["eager"]["gradients"] < 3.5 * 64 * 600 * 4
    assert found["liger-kernel"]["note"] == "runs on a GPU only"
    main(command)  # has nothing left to do
    assert store.read(path)[2] == rows
    main(["report", str(path), "--out", str(tmp_path)])
    assert "| cce_fx |" in capsys.readouterr().out and (tmp_path / "peers.png").stat().st_size > 10_000


def test_a_stopped_run_keeps_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keep, rounds = tmp_path / "peers.json", peers.keep, []

    def stop(*args: object) -> None:
        keep(*args)  # type: ignore[arg-type]
        rounds.append(1)
        if len(rounds) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(peers, "keep", stop)
    with pytest.raises(KeyboardInterrupt):
        main(f"peers --shapes 32:8:300 --modes eval --rounds 5 --only eager --json {path}".split())
    ((row,)) = store.read(path)[2]
    assert len(row["seconds"]) == 2


def test_what_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "free_bytes", lambda: 1000)
    values = candidates.inputs(64, 8, 300, torch.float32)
    row, run = peers.first(candidates.peers("cpu")[0], "train", values)
    assert run is None and row["note"].startswith("needs ")


def test_scaling_program_fits_slopes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "scaling.json"
    only = ["--only", "one product,eager", "--png", str(tmp_path / "a.png")]
    main([*f"scaling --n 64,128 --v 500,1000 --n-fixed 64 --v-fixed 500 --d 8 --rounds 1 --json {path}".split(), *only])
    rows = store.read(path)[2]
    assert 0.9 < curves.slope(curves.curve(rows, "n", "eager", "memory")) < 1.1
    assert "Slopes" in capsys.readouterr().out and (tmp_path / "a.png").stat().st_size > 10_000


def test_slope_of_a_power() -> None:
    assert curves.slope([(x, 3 * x**1.5) for x in (1.0, 2.0, 8.0)]) == pytest.approx(1.5)


@pytest.mark.slow
def test_overhead_program_tells_the_parts_apart(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    main(f"overhead --rounds 1 --repeat 2 --parts call --json {path}".split())
    names = [r["name"] for r in store.read(path)[2] if r.get("what") == "step, logits returned"]
    assert names == ["inductor", "cce", "cce without the kernel"]


@pytest.mark.slow
def test_overhead_program_counts_what_an_import_brings(tmp_path: Path) -> None:
    path = tmp_path / "overhead.json"
    main(f"overhead --rounds 1 --repeat 2 --parts import --json {path}".split())
    rows = store.read(path)[2]
    assert {r["name"]: r["modules"] for r in rows if r["part"] == "import"}["cce_fx torch"] == 2


def test_scale_arithmetic(capsys: pytest.CaptureFixture[str]) -> None:
    main("scale --models 8B --layouts 2x1x1,1x4x1,2x1x2+fsdp --tokens 1000 --classes 8000 --markdown".split())
    out = capsys.readouterr().out
    assert "8B, DP 1, TP 4, SP 1" in out and "8B, 4 products" in out
    head = scale.Head(1000, 100, 8000)
    one, tp, sp = (scale.held(head, scale.Layout.parse(text)) for text in ("2x1x1", "2x4x1", "2x1x2+fsdp"))
    # By hand: 12 bytes a logit, and 4 more in torch's loss on divided ones, which eager gathers.
    logits = 1000 * 8000
    assert (one.eager, tp.eager, sp.eager) == (12 * logits, 12 * logits, 12 * logits // 2)
    assert (one.loss_parallel, tp.loss_parallel, sp.loss_parallel) == (12 * logits, 16 * logits // 4, 12 * logits // 2)
    assert (one.resting, tp.resting, sp.resting) == (1600000, 400000, 400000)
    assert one.operands == 2 * 100 * 9000 and tp.operands == 2 * 100 * 3000
    wide = scale.held(scale.Head(10, 1000, 8000), scale.Layout())
    assert wide.eager == 2 * (1000 * 8010 + 10 * 8000)  # the gradients, and that of the logits
    assert max(one.cut, tp.cut, sp.cut) < one.eager / 2
    machine = scale.MACHINES["H100"]
    times = [scale.seconds(head, layout, machine, 0.5, 1e11) for layout in (scale.Layout(), scale.Layout(tensor=4))]
    product = 2 * 1000 * 100 * 8000 / (0.5 * machine.flops(torch.bfloat16))
    assert times[0]["cut"] == pytest.approx(3 * product) and times[1]["cut"] > product
    assert times[0]["eager"] - times[0]["cut"] == pytest.approx(24 * logits / machine.memory_rate)


@pytest.mark.skipif(torch.__version__ < "2.12", reason="loss_parallel of torch 2.11 knows meshes of one dimension only")
def test_the_page_shows_what_the_arithmetic_gives(capsys: pytest.CaptureFixture[str]) -> None:
    main(["scale", "--markdown"])
    table = capsys.readouterr().out.split("\n\n")[1].strip()
    page = (Path(__file__).parent.parent / "docs" / "distributed.md").read_text()
    assert report.placed(page, "scale", table) == page, "run: python -m benchmarks scale --markdown"


@pytest.mark.parametrize("text", ["8", "8x8", "8x8x1+tp", "ax1x1"])
def test_a_layout_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        scale.Layout.parse(text)


def test_report_fills_the_places_of_a_page() -> None:
    page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb"
    assert report.placed(page, "x", "new").split() == "a <!-- begin x --> new <!-- end x --> b".split()
    with pytest.raises(ValueError, match="no place"):
        report.placed(page, "y", "new")


def test_inputs_are_those_of_a_trained_head() -> None:
    hidden, weight, target = candidates.inputs(512, 64, 2000, torch.float32)
    logits = (hidden @ weight.T).detach()
    loss = torch.nn.functional.cross_entropy(logits, target)
    drawn = torch.multinomial(logits.softmax(1), 1)[:, 0]
    # Targets are as likely under the softmax as those that are drawn from it.
    assert abs(loss - torch.nn.functional.cross_entropy(logits, drawn)) < 0.5
    assert loss < 6.5 < torch.tensor(2000.0).log()


def test_peak_is_counted_exactly() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        return torch.empty(3 << 19, dtype=torch.uint8)

    assert measure.peak_bytes(run) == 3 << 19


def test_memory_timeline_draws_what_a_step_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(f"memory_timeline --rows 256 --width 16 --vocab 4000 --out {tmp_path}".split())
    found = json.loads((tmp_path / "memory_timeline.json").read_text())
    peaks = {name: max(line["bytes"]) for name, line in found.items()}
    logits = 256 * 4000 * 4
    assert peaks["cce"] < logits < peaks["eager"]
    assert [k[0] for k in found["cce"]["kernels"]] == ["cce_fx::forward_backward"]
    assert (tmp_path / "memory_timeline.png").stat().st_size > 10_000
    assert "cce: at most" in capsys.readouterr().out


def test_filtered_program_measures_the_states_of_a_model(tmp_path: Path) -> None:
    """In the interpreter, which takes the GPU's place."""
    hidden, weight = torch.randn(32, 8), torch.randn(600, 8) / 8
    hidden[:, 0], weight[:, 0] = 1.0, torch.where(torch.arange(600) % 40 == 0, 0.0, -9.0)  # fifteen classes that matter
    torch.save((hidden, weight, torch.randint(15, (32,)) * 40), tmp_path / "5-600-8.pt")
    options = f"--device cpu --steps 5 --vocab 600 --width 8 --bounds 0.5 --rounds 1 --states {tmp_path}"
    command = [sys.executable, "-m", "benchmarks", "filtered", *options.split()]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=True)
    lines = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| filter_eps=0.5")]
    assert len(lines) == 1 and 0 <= float(lines[0][5]) < 0.5 and 0 < float(lines[0][7]) <= 0.5


def test_filtered_program_says_that_a_cpu_has_no_filter() -> None:
    with pytest.raises(SystemExit, match="do not run on cpu"):
        main("filtered --device cpu".split())


def test_each_peer_has_tensors_of_its_own() -> None:
    """cut-cross-entropy marks sizes of what it is given as dynamic, and a head with such sizes is declined."""
    values = candidates.inputs(256, 16, 3000, torch.float32)
    made = {p.name: p for p in candidates.peers("cpu")}
    made["cut-cross-entropy, torch_compile"].calls(*values)["train"]()
    torch._dynamo.utils.counters["cce_fx"].clear()
    made["cce_fx"].calls(*values)["train"]()
    assert torch._dynamo.utils.counters["cce_fx"]["rewritten"] == 1


def test_programs_compares_losses_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "programs.json"
    names = "kl,metrics"
    main(
        f"programs --scale 64 --rounds 1 --only {names} --backends eager,cce,liger --json {path} "
        f"--picture {tmp_path / 'programs.png'}".split()
    )
    found = json.loads(path.read_text())
    out = capsys.readouterr().out
    assert "metrics" in out and (tmp_path / "programs.png").stat().st_size > 0
    for each in found.values():
        assert abs(each["losses"]["cce"] - each["losses"]["eager"]) < 1e-4
        assert each["peaks"]["cce"] < each["peaks"]["eager"]
