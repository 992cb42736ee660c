# SPDX-License-Identifier: Apache-2.0
"""Each example, run as a user runs it, in a short mode: it ends well, its files are there, its figures make sense."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
SMALL = ["--vocab", "2048", "--width", "64", "--layers", "1", "--batch", "4", "--length", "64"]

for package in ("tokenizers", "rich", "matplotlib", "transformers", "accelerate"):
    pytest.importorskip(package, reason="the examples need the extra: pip install -e '.[examples]'")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One tokenizer for all examples of this file."""
    return tmp_path_factory.mktemp("cache")


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(EXAMPLES / script), *map(str, arguments)]


def environment() -> dict[str, str]:
    # One thread each: the runs are tiny, and their results must not depend on how many cores the machine has.
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def run(folder: Path, script: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        command(script, *arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


USERS = ["train_lm.py", "hf_trainer.py", "recommender.py", "train_distributed.py"]


@pytest.mark.parametrize("script", USERS)
def test_help_says_what_it_does(script, tmp_path):
    text = run(tmp_path, script, "--help")
    assert "usage" in text and "--steps" in text


def test_no_example_imports_the_package():
    """The point of the examples: one string is all that a program has to know."""
    for script in USERS:
        assert "cce_fx" not in (EXAMPLES / script).read_text(encoding="utf-8")


def test_train_lm_compares_three_ways(tmp_path, cache):
    # With this batch the logits (256 x 2048 x 4 bytes = 2 MiB) are most of what a step takes.
    text = run(tmp_path, "train_lm.py", *SMALL, "--steps", "6", "--cache", cache)
    assert "loss at the last step" in text and "peak memory above the model's own" in text
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    summary = figures["summary"]
    assert list(summary) == ["eager", "inductor", "cce"]
    for mode, run_ in figures["runs"].items():
        losses = [s["loss"] for s in run_["steps"]]
        assert len(losses) == 6
        assert abs(losses[0] - math.log(2048)) < 0.5  # an untrained model knows nothing
        assert losses[-1] < losses[0]
        assert summary[mode]["largest_difference"] < 1e-3
        # What was alive at the end of the step must be what was alive at its beginning, or the counting leaks.
        assert abs(run_["trace"]["bytes_alive"][-1]) < 64 * 1024
        assert set(run_["trace"]["phases"]) == {"forward", "backward", "optimizer"}
    assert summary["cce"]["peak_above_own_bytes"] < 0.6 * summary["eager"]["peak_above_own_bytes"]
    assert (tmp_path / "out" / "train_lm.png").read_bytes().startswith(b"\x89PNG")


def test_train_lm_under_autocast_as_on_a_gpu(tmp_path, cache):
    small = [*SMALL, "--device", "cpu", "--dtype", "bfloat16", "--steps", "3", "--only", "eager,cce"]
    text = run(tmp_path, "train_lm.py", *small, "--cache", cache)
    assert "bfloat16 by autocast, CPU" in text
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    assert figures["settings"]["rate"] == 2e-3 and figures["settings"]["dtype"] == "bfloat16"
    assert figures["summary"]["cce"]["largest_difference"] < 0.05


def test_train_lm_goes_on_when_one_way_fails(tmp_path, cache):
    broken = environment() | {
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        "CXX": "/bin/false",
    }  # inductor has no compiler
    arguments = command("train_lm.py", *SMALL, "--steps", "2", "--only", "inductor,eager", "--cache", cache)
    done = subprocess.run(arguments, cwd=tmp_path, env=broken, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "the inductor run ended" in done.stdout
    assert list(json.loads((tmp_path / "out" / "train_lm.json").read_text())["runs"]) == ["eager"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["train_lm.py", "hf_trainer.py", "recommender.py"])
def test_a_gpu_that_is_not_there_is_told(script, tmp_path):
    done = subprocess.run(command(script, "--device", "cuda"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 1 and "torch.cuda.is_available() is False" in done.stderr


def test_train_lm_fits_the_steps_to_the_minutes(tmp_path, cache):
    run(tmp_path, "train_lm.py", *SMALL, "--minutes", "0.01", "--only", "eager", "--cache", cache)
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    assert len(figures["runs"]["eager"]["steps"]) == 10  # the least that a curve is drawn from
    assert list(figures["runs"]) == ["eager"]


def test_train_lm_refuses_an_unknown_way(tmp_path):
    done = subprocess.run(command("train_lm.py", "--only", "eagre"), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2
    assert "eagre" in done.stderr and "inductor" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes under /proc")
def test_train_lm_stopped_in_the_middle_leaves_whole_files(tmp_path, cache, ctrl_c):
    arguments = [*SMALL, "--steps", "100000", "--only", "eager", "--cache", cache]
    process = subprocess.Popen(
        command("train_lm.py", *arguments), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    wait_for(lambda: children_of(process.pid))
    time.sleep(1)
    children = children_of(process.pid)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped" in text
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    left = [p for folder in (tmp_path, cache) for p in folder.rglob("*") if p.is_file()]
    assert not [p for p in left if p.name.startswith(".")], "a temporary file was left behind"
    for path in left:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


def children_of(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_hf_trainer_reads_the_logits_in_evaluation(tmp_path, cache):
    small = [*SMALL, "--steps", "10", "--eval-batches", "2", "--cache", cache]
    run(tmp_path, "hf_trainer.py", *small)
    run(tmp_path, "hf_trainer.py", *small, "--backend", "eager", "--out", "eager")
    cut = json.loads((tmp_path / "out" / "hf_trainer.json").read_text())
    eager = json.loads((tmp_path / "eager" / "hf_trainer.json").read_text())
    assert abs(cut["eval_loss"] - eager["eval_loss"]) < 1e-3
    assert cut["eval_loss"] < math.log(2048)
    # An argmax may flip between two equal logits, on few of the 512 tokens.
    assert abs(cut["accuracy"] - eager["accuracy"]) < 0.01
    assert (tmp_path / "out" / "hf_trainer" / "model.safetensors").exists()


def test_recommender_needs_less_memory(tmp_path):
    small = ["--items", "20000", "--width", "32", "--users", "4", "--length", "16", "--steps", "3"]
    run(tmp_path, "recommender.py", *small)
    summary = json.loads((tmp_path / "out" / "recommender.json").read_text())
    assert summary["cce"]["largest_difference"] < 1e-3
    assert summary["cce"]["peak_above_own_bytes"] < summary["eager"]["peak_above_own_bytes"]


def distributed(folder: Path, *arguments: str) -> tuple[str, float]:
    """What train_distributed.py prints on two processes, and the peak memory of a step in MiB."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    small = ["--vocab", "8192", "--width", "32", "--length", "128", "--steps", "5"]
    done = subprocess.run(
        [*launch, *command("train_distributed.py", *small, *arguments)[1:]],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout, float(re.search(r"peak memory .*: ([\d.]+) MiB", done.stdout)[1])


@pytest.mark.parametrize("way", [[], ["--fsdp"], ["--tp"]], ids=["DDP", "FSDP2", "TP"])
def test_train_distributed_goes_as_in_one_process(way, tmp_path):
    text, cut = distributed(tmp_path, *way, "--check")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 5 and abs(losses[0] - math.log(8192)) < 1 and losses[-1] < losses[0]
    assert float(re.search(r"one process in eager: (\S+)", text)[1]) < 1e-4
    _, eager = distributed(tmp_path, *way, "--backend", "eager")
    logits = 512 * 8192 * 4 / 2**20  # of one process, whichever way they are divided
    assert cut < eager - logits


def test_train_distributed_says_how_it_is_started(tmp_path):
    done = subprocess.run(
        command("train_distributed.py"), env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and "torchrun" in done.stderr


def test_custom_pipeline_rewrites_and_declines(tmp_path):
    text = run(tmp_path, "custom_pipeline.py")
    assert text.count("1 loss(es) rewritten, 0 declined") == 2  # one on the graph, one through a rule
    assert "1 loss cut" in text  # inside inductor
    assert "declined: watermarked logits are not the head's" in text


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in text.split("def test_train_lm", 1)[1]] == []
