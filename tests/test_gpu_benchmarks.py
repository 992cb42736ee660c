# SPDX-License-Identifier: Apache-2.0
"""The programs that are meant for a GPU, tried out on a CPU at small shapes: they run, go on where they were, and fill a page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import candidates, gpu, measure, store, tune
from benchmarks.__main__ import COMMANDS, main
from cce_fx.kernels.triton.device import record
from cce_fx.kernels.triton.head import make_head
from cce_fx.kernels.triton.machines import BY_ARCH, Config, Fused, Tile

ROOT = Path(__file__).parent.parent
SMALL = "gpu --device cpu --dtype float32 --shapes 40:32:300 --logits random --rounds 2"


def rows_in(folder: Path) -> tuple[Path, list[store.Row]]:
    (path,) = folder.glob("*.json")
    return path, store.read(path)[2]


def test_every_implementation_is_measured_or_says_why_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL.split(), "--out", str(tmp_path)])
    path, rows = rows_in(tmp_path)
    found = {r["implementation"]: r for r in rows}
    assert set(found) == set(gpu.ORDER) and [x.name for x in gpu.candidates("cpu")] == gpu.ORDER
    for name in ("eager", "inductor", "cce_fx", "cce_fx, recompute"):
        row = found[name]
        assert len(row["forward"]) == len(row["backward"]) == 2 and min(gpu.both(row)) > 0
        assert max(row["errors"].values()) < 1e-5 and row["gradients"] == 4 * 32 * 340
    assert 2 * 40 * 300 * 4 <= found["eager"]["peak"] - found["eager"]["gradients"] < 3.5 * 40 * 300 * 4
    assert found["three products"]["peak"] == 0 and found["three products"]["errors"] is None
    for name in ("liger-kernel", "cut-cross-entropy", "cut-cross-entropy, exact"):
        assert found[name]["note"] == "runs on a GPU only" and not found[name]["forward"]
    assert "runs on a GPU only" in capsys.readouterr().out
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- more -->\nafter\n")
    for _ in range(2):  # the second time in its place
        main(["report", str(path), "--out", str(tmp_path), "--into", str(page)])
    text = page.read_text()
    assert text.count("| cce_fx |") == 1 and text.count(f"<!-- begin {path.stem} -->") == 1
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_without_a_gpu_the_program_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("gpu", "tune"):
        with pytest.raises(SystemExit, match="no GPU"):
            main([command])


def test_a_run_that_is_cut_off_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*SMALL.split(), "--only", "three,eager,F.linear", "--out", str(tmp_path)]
    checks = []

    def check(self: measure.Budget) -> None:
        checks.append(self)
        if len(checks) == 6:  # three first calls, and two of a round
            raise measure.OutOfTime

    with monkeypatch.context() as m:
        m.setattr(measure.Budget, "check", check)
        main(command)
    _, before = rows_in(tmp_path)
    assert {r["implementation"] for r in before} == {"three products", "eager", "F.linear_cross_entropy"}
    kept = {r["implementation"]: r for r in before}
    # What an earlier run has whole is not measured again.
    path, _ = rows_in(tmp_path)
    data = json.loads(path.read_text())
    for row in data["rows"]:
        if row["implementation"] == "eager":
            row["forward"], row["backward"] = [1.0, 1.0], [2.0, 2.0]
    path.write_text(json.dumps(data))
    main(command)
    after = {r["implementation"]: r for r in rows_in(tmp_path)[1]}
    assert gpu.both(after["eager"]) == [3.0, 3.0] and after["eager"]["peak"] == kept["eager"]["peak"]
    assert all(len(r["forward"]) == 2 for r in after.values())


def test_no_time_at_all_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*SMALL.split(), "--minutes", "0", "--out", str(tmp_path)])
    assert "goes on from here" in capsys.readouterr().out and not list(tmp_path.glob("*.json"))


def test_one_that_fails_or_hangs_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> candidates.Loss:
        raise RuntimeError("no such kernel\nand more")

    def hangs() -> candidates.Loss:
        def loss(*args: torch.Tensor) -> torch.Tensor:
            while True:
                torch.ones(1)

        return loss

    real = candidates.peers

    def peers(device: str, eps: float | str | None) -> list[candidates.Peer]:
        found = {"cce_fx": hangs, "inductor": broken}
        return [replace(p, make=found.get(p.name, p.make)) for p in real(device, eps)]

    monkeypatch.setattr(gpu, "peers", peers)
    main([*SMALL.split(), "--only", "three,eager,inductor,cce_fx", "--limit", "1", "--out", str(tmp_path)])
    rows = {r["implementation"]: r for r in rows_in(tmp_path)[1]}
    assert rows["inductor"]["note"] == "RuntimeError: no such kernel"
    assert rows["cce_fx"]["note"] == "TimeoutError: took longer than 1 s"
    assert len(rows["eager"]["forward"]) == 2


def test_what_tells_most_is_measured_first() -> None:
    cases = gpu.cases(None, ["peaked", "random"])
    assert cases[0] == ("Gemma 2 2B (the paper's)", (8192, 2304, 256000), "peaked")
    assert {name for name, _, _ in cases} == set(gpu.SHAPES) and len(cases) == len(set(cases))
    assert gpu.ORDER[:2] == ["three products", "cce_fx"]


def test_peaked_logits_have_the_loss_of_a_trained_model() -> None:
    hidden, weight, target = candidates.inputs(512, 64, 8000, torch.float32, logits="peaked")
    loss = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    assert 1 < loss < 4 < torch.tensor(8000.0).log()


def interpreted(*arguments: str, folder: Path) -> str:
    """What a command prints in a process of its own, where the interpreter takes the GPU's place."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "COLUMNS": "160"}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_block_shapes_are_timed_and_printed_as_a_row(tmp_path: Path) -> None:
    command = f"tune --device cpu --shapes 20:16:200 --rounds 1 --most 2 --out {tmp_path}".split()
    text = interpreted(*command, "--uses", "sweep,logits", folder=tmp_path)
    config = eval(
        text[text.index("Config(") : text.index("written:")], {"Config": Config, "Tile": Tile, "Fused": Fused}
    )
    path, rows = rows_in(tmp_path)
    assert [r["use"] for r in rows] == ["sweep", "sweep", "logits", "logits"] and all(r["seconds"] for r in rows)
    assert config.sweep == tune.winners(rows, "bfloat16")["sweep"]
    # The rest is taken up: what is there is not timed again.
    interpreted(*command, "--uses", ",".join(tune.USES), folder=tmp_path)
    after = rows_in(tmp_path)[1]
    assert {r["use"] for r in after} == set(tune.USES) and all(row in after for row in rows)
    main(["report", str(path)])


def test_a_block_shape_is_written_as_it_is_read() -> None:
    shapes = [Tile(128, 256, 64, 8, 3), Tile(128, 64, 64, 8, 4, registers=255), Tile(64, 64, 32, 4, 2, tma=True)]
    shapes += [Fused(64, 128, 64, 256, 8, 3), Fused(64, 64, 64, 256, 8, 3, registers=255)]
    for machine in BY_ARCH.values():
        shapes += [machine.through_tma().config(torch.bfloat16).sweep, machine.config(torch.bfloat16).fused]
    for shape in shapes:
        assert eval(tune.short(shape)) == shape == tune.shape_of(vars(shape))
    assert tune.short(shapes[1]) == "Tile(128, 64, 64, 8, 4, registers=255)"


def test_the_winner_is_good_at_every_problem() -> None:
    def row(shape: str, tile: Tile, *seconds: float) -> store.Row:
        key = {"use": "sweep", "shape": shape, "dtype": "bfloat16", "note": ""}
        return {**key, "tile": repr(tile), "values": vars(tile), "seconds": list(seconds)}

    a, b, c = (Tile(rows, 128, 64, 8, 3) for rows in (64, 128, 256))
    rows = [row("x", a, 1.0), row("x", b, 1.1), row("x", c, 0.5, 0.5), row("y", a, 2.0), row("y", b, 1.0)]
    assert tune.winners(rows, "bfloat16") == {"sweep": b}  # c was not timed at y
    assert tune.winners(rows, "float16") == {}


def test_shapes_are_screened_on_paper_then_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.__version__ < "2.12":
        pytest.skip("there is no compiler here")
    from benchmarks import screen

    good, spilling = Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 4, 2)
    monkeypatch.setattr(screen, "grid", lambda use, arch: [spilling, good])
    path = tmp_path / "sm_90.json"
    for _ in range(2):  # the second run has nothing left to do
        main(f"screen --arch sm_90 --uses sweep --json {path}".split())
        first, second = store.read(path)[2]
        assert (first["shape"], first["good"]) == (tune.short(good), True) and first["density"] > 2000
        assert (second["shape"], second["good"]) == (tune.short(spilling), False) and second["note"]
        monkeypatch.setattr(screen, "examined", lambda *args: pytest.fail("examined again"))
    machine = BY_ARCH["sm_90"]
    with record(machine):  # a head on that machine
        head = make_head(screen.problem("sweep"))
        assert tune.proposed(head.config, "sweep", head, store.read(path)[2]) == [good]


@pytest.mark.slow
def test_a_step_of_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    path = tmp_path / "step.json"
    small = "--vocab 4096 --width 64 --layers 1 --batch 2 --length 64 --rounds 1 --only eager,cce"
    main(f"step --device cpu --dtype bfloat16 {small} --json {path}".split())
    found = json.loads(path.read_text())
    assert found["losses"]["cce"] == pytest.approx(found["losses"]["eager"], abs=0.02)
    assert found["peaks"]["cce"] < found["peaks"]["eager"] and len(found["seconds"]["cce"]) == 1
    assert "bfloat16 by autocast, CPU" in capsys.readouterr().out


@pytest.mark.slow
def test_what_outlives_a_step_costs_a_copy_of_the_head(tmp_path: Path) -> None:
    path = tmp_path / "after_step.json"
    main(
        f"after_step --device cpu --vocab 8192 --width 64 --layers 1 --batch 1 --length 16 --rounds 1 --json {path}".split()
    )
    found = json.loads(path.read_text())
    copied, error = (found["peaks"][f"alive, {what}"] for what in ("as_before", "error"))
    assert 0 <= copied - error <= 1.01 * 4 * 8192 * 64 and all(len(times) == 1 for times in found["seconds"].values())


def test_the_pass_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    main("compile_time --nodes 50,100 --rounds 1".split())
    assert "us a node" in capsys.readouterr().out


def test_training_is_compared_with_eagers_own_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    from benchmarks import quality

    monkeypatch.setattr(quality, "RUNS", {name: quality.RUNS[name] for name in ("eager", "eager, moved by an ulp (1)")})
    monkeypatch.setattr(quality, "PRECISIONS", ("float32",))
    # Neither a tokenizer is trained here nor a process started.
    tokens = torch.randint(512, (10_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    monkeypatch.setattr(quality.corpus, "load_tokens", lambda vocab, cache: tokens)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        threads = torch.get_num_threads()
        losses = quality.train(**json.loads(command[-1]))
        torch.set_num_threads(threads)
        return subprocess.CompletedProcess(command, 0, json.dumps(losses))

    monkeypatch.setattr(quality.subprocess, "run", run)
    main(f"quality --steps 3 --vocab 512 --cache {tmp_path} --json {tmp_path / 'q.json'}".split())
    found = json.loads((tmp_path / "q.json").read_text())["float32"]
    assert max(quality.distances(found, "eager, moved by an ulp (1)")) < 1e-3 < found["eager"][0]


def test_every_command_is_run_by_a_test() -> None:
    text = "".join(
        p.read_text() for p in (*ROOT.glob("tests/test_*benchmarks.py"), ROOT / "tests/triton/test_static_gpu.py")
    )
    started = {name for name in COMMANDS if f'"{name} -' in text or f"{name}.main(" in text or f'["{name}"' in text}
    missing = set(COMMANDS) - started
    assert not missing, missing
