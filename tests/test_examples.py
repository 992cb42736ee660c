# SPDX-License-Identifier: Apache-2.0
"""Each example, run as a user runs it, in a short mode: it ends well, its files are there, its figures make sense."""

import getpass
import hashlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
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
def cache() -> Path:
    """One tokenizer for all examples of this file, kept from run to run: a file's name has a digest of the text."""
    digest = hashlib.sha256((EXAMPLES / "support" / "corpus.py").read_bytes()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"cce_fx_tests_{getpass.getuser()}" / digest


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


@pytest.fixture
def here(monkeypatch):
    """An example's module in this process, where nothing is trained."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda script: importlib.import_module(script.removesuffix(".py"))


@pytest.mark.parametrize("script", USERS)
def test_help_says_what_it_does(script, here, capsys):
    with pytest.raises(SystemExit) as stop:
        here(script).parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "usage" in text and "--steps" in text


def test_no_example_imports_the_package():
    """The point of the examples: one string is all that a program has to know."""
    for script in USERS:
        assert "cce_fx" not in (EXAMPLES / script).read_text(encoding="utf-8")


@pytest.mark.parametrize("only", ["eager,cce", pytest.param("eager,inductor,cce", marks=pytest.mark.slow)])
def test_train_lm_compares_ways(tmp_path, cache, only):
    # With this batch the logits (256 x 2048 x 4 bytes = 2 MiB) are most of what a step takes.
    text = run(tmp_path, "train_lm.py", *SMALL, "--steps", "6", "--only", only, "--cache", cache)
    assert "loss at the last step" in text and "peak memory above the model's own" in text
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    summary = figures["summary"]
    assert list(summary) == only.split(",")
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


@pytest.mark.slow
def test_train_lm_under_autocast_as_on_a_gpu(tmp_path, cache):
    small = [*SMALL, "--device", "cpu", "--dtype", "bfloat16", "--steps", "3", "--only", "eager,cce"]
    text = run(tmp_path, "train_lm.py", *small, "--cache", cache)
    assert "bfloat16 by autocast, CPU" in text
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    assert figures["settings"]["rate"] == 2e-3 and figures["settings"]["dtype"] == "bfloat16"
    assert figures["summary"]["cce"]["largest_difference"] < 0.05


@pytest.mark.slow
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
def test_a_gpu_that_is_not_there_is_told(script, here):
    with pytest.raises(SystemExit, match=r"torch.cuda.is_available\(\) is False"):
        here(script).main(["--device", "cuda"])


@pytest.mark.slow  # an example from its start to its end, as others are that run by default
def test_train_lm_fits_the_steps_to_the_minutes(tmp_path, cache):
    run(tmp_path, "train_lm.py", *SMALL, "--minutes", "0.01", "--only", "eager", "--cache", cache)
    figures = json.loads((tmp_path / "out" / "train_lm.json").read_text())
    assert len(figures["runs"]["eager"]["steps"]) == 10  # the least that a curve is drawn from
    assert list(figures["runs"]) == ["eager"]


def test_train_lm_refuses_an_unknown_way(here, capsys):
    with pytest.raises(SystemExit) as stop:
        here("train_lm.py").main(["--only", "eagre"])
    text = capsys.readouterr().err
    assert stop.value.code == 2 and "eagre" in text and "inductor" in text


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


@pytest.mark.slow
def test_hf_trainer_reads_the_logits_in_evaluation(tmp_path, cache, here):
    small = [*SMALL, "--steps", "10", "--eval-batches", "2", "--cache", cache]
    run(tmp_path, "hf_trainer.py", *small)
    eager = map(str, [*small, "--backend", "eager", "--out", tmp_path / "eager"])
    assert here("hf_trainer.py").main(list(eager)) == 0
    cut = json.loads((tmp_path / "out" / "hf_trainer.json").read_text())
    eager = json.loads((tmp_path / "eager" / "hf_trainer.json").read_text())
    assert abs(cut["eval_loss"] - eager["eval_loss"]) < 1e-3
    assert cut["eval_loss"] < math.log(2048)
    # An argmax may flip between two equal logits, on few of the 512 tokens.
    assert abs(cut["accuracy"] - eager["accuracy"]) < 0.01
    assert (tmp_path / "out" / "hf_trainer" / "model.safetensors").exists()


RECOMMENDER = ["--items", "20000", "--width", "32", "--users", "4", "--length", "16", "--steps", "2"]


@pytest.mark.slow
def test_recommender_with_a_loss_over_all_items(tmp_path):
    run(tmp_path, "recommender.py", *RECOMMENDER, "--only", "cce")
    (found,) = json.loads((tmp_path / "out" / "recommender.json").read_text()).values()
    scores = 4 * 16 * 20000 * 4  # bytes
    assert found["peak_above_own_bytes"] < scores, "they were made"


@pytest.mark.slow
def test_recommender_needs_less_memory(tmp_path):
    run(tmp_path, "recommender.py", *RECOMMENDER)
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


# Each way starts eight processes; tests/distributed has what they rest on.
WAYS = [
    pytest.param([], id="DDP"),
    pytest.param(["--fsdp"], id="FSDP2", marks=pytest.mark.slow),
    pytest.param(["--tp"], id="TP", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_train_distributed_goes_as_in_one_process(way, tmp_path):
    text, _ = distributed(tmp_path, *way, "--check")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", text)]
    assert len(losses) == 5 and abs(losses[0] - math.log(8192)) < 1 and losses[-1] < losses[0]
    assert float(re.search(r"one process in eager: (\S+)", text)[1]) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_train_distributed_needs_less_memory(way, tmp_path):
    (_, cut), (_, eager) = (distributed(tmp_path, *way, "--backend", backend) for backend in ("cce", "eager"))
    logits = 512 * 8192 * 4 / 2**20  # of one process, whichever way they are divided
    assert cut < eager - logits


@pytest.fixture
def gpus(monkeypatch) -> None:
    """Two GPUs, as far as the examples ask before they use them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_on_a_gpu_models_are_larger_and_in_bfloat16(gpus, here):
    train_lm, recommender = here("train_lm.py"), here("recommender.py")
    found = train_lm.parse_arguments([])
    assert (found.device, found.dtype, found.vocab, found.batch * found.length) == ("cuda", "bfloat16", 50304, 16384)
    with torch.device("meta"):
        model = train_lm.GPT(found.vocab, found.width, found.layers, found.length)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(124e6, rel=0.01)
    items = recommender.parse_arguments([])
    assert (items.device, items.dtype, items.items) == ("cuda", "bfloat16", 1_000_000)
    small = train_lm.parse_arguments(["--device", "cpu", "--width", "128"])
    assert (small.device, small.dtype, small.vocab, small.width) == ("cpu", "float32", 32000, 128)


def test_with_a_gpu_for_each_process_they_talk_through_nccl(gpus, here, monkeypatch, capsys):
    train_distributed, called = here("train_distributed.py"), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: called.append(device))
    monkeypatch.setattr(train_distributed.dist, "init_process_group", lambda backend: called.append(backend))
    monkeypatch.setattr(train_distributed.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(train_distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(train_distributed.dist, "destroy_process_group", lambda: called.append("destroyed"))
    monkeypatch.setattr(train_distributed, "work", lambda arguments, *ranks: called.append((arguments, ranks)) or 0)
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert train_distributed.main(["--fsdp"]) == 0
    (arguments, ranks) = called.pop(2)
    assert called == ["cuda:1", "nccl", "destroyed"] and ranks == (1, 2)
    assert (arguments.device, arguments.dtype, arguments.vocab) == ("cuda:1", "bfloat16", 131072)
    assert train_distributed.parse_arguments(["--check"]).dtype == "float32"
    # More processes than GPUs: on the CPU, unless a GPU was asked for.
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert train_distributed.parse_arguments([]).device == "cpu"
    with pytest.raises(SystemExit):
        train_distributed.parse_arguments(["--device", "cuda"])
    assert "a GPU for each process" in capsys.readouterr().err


def test_train_distributed_says_how_it_is_started(here, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit) as stop:
        here("train_distributed.py").main([])
    assert stop.value.code == 2 and "torchrun" in capsys.readouterr().err


def test_custom_pipeline_rewrites_and_declines(tmp_path):
    text = run(tmp_path, "custom_pipeline.py")
    assert text.count("1 loss(es) rewritten, 0 declined") == 2  # one on the graph, one through a rule
    assert "1 loss cut" in text  # inside inductor
    assert "declined: watermarked logits are not the head's" in text


def test_every_example_is_run_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [p.name for p in EXAMPLES.glob("*.py") if f'"{p.name}"' not in text.split("def test_train_lm", 1)[1]] == []
