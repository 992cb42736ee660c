# SPDX-License-Identifier: Apache-2.0
"""The default kernels beside the peers', by what the compiler makes of them and by the roofline; nothing is run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.__version__ < "2.12":
    pytest.skip("torch 2.11 takes addmm's out_dtype for its beta on tensors without data", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place in this process", allow_module_level=True)

from benchmarks import passes, static_gpu
from benchmarks.__main__ import main
from cce_fx.kernels.triton.machines import BY_ARCH, MACHINES

PAPER = (8192, 2304, 256000)


def densities(made: passes.Pass, arch: str) -> dict[str, float]:
    found = static_gpu.rows(made, BY_ARCH[arch], 1.0)
    return {r.kernel: r.density for r in found if r.tensor}


@pytest.mark.parametrize("arch", static_gpu.ARCHS)
def test_loops_do_as_much_on_tensor_cores_as_the_peers(arch: str) -> None:
    problem = passes.bfloat16_problem(*PAPER)
    ours = densities(passes.ours(problem, BY_ARCH[arch]), arch)
    apple, liger = (densities(peer(problem), arch) for peer in (passes.apple, passes.liger))
    assert ours.pop("_sweep") >= apple["_cce_lse_forward_kernel"]
    assert ours and min(ours.values()) >= apple["_cce_backward_kernel"]
    assert not liger  # its products are BLAS's


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
@pytest.mark.parametrize("shape", [PAPER, (8192, 4096, 128256)], ids=str)
def test_tensor_descriptors_cost_fewer_instructions(arch: str, shape: tuple[int, int, int]) -> None:
    problem, machine = passes.bfloat16_problem(*shape), BY_ARCH[arch]
    without, through = (densities(passes.ours(problem, machine, tma=tma), arch) for tma in (False, True))
    assert set(through) == {f"{name}_tma" for name in without}
    for name, density in without.items():
        assert through[f"{name}_tma"] >= density


@pytest.mark.parametrize("card", static_gpu.CARDS)
def test_no_slower_than_locks_and_no_memory_where_that_is_asked_for(card: str) -> None:
    problem, machine = passes.bfloat16_problem(*PAPER), MACHINES[card]
    default, recompute = passes.ours(problem, machine), passes.ours(problem, machine, "recompute")
    assert default.seconds(machine, torch.bfloat16) <= passes.apple(problem).seconds(machine, torch.bfloat16)
    logits = 2 * PAPER[0] * PAPER[2]
    assert recompute.scratch == 0 < default.scratch < logits / 10


def test_the_model_counts_the_products_of_the_cost_table() -> None:
    problem, machine = passes.bfloat16_problem(4096, 2048, 65536), MACHINES["A100"]
    one = 2.0 * 4096 * 2048 * 65536
    count = lambda made: sum(w.flops for w in made.works(2)) / one  # noqa: E731
    assert count(passes.ours(problem, machine)) == pytest.approx(4)
    assert count(passes.ours(problem, machine, "recompute")) == pytest.approx(1 + 2 * (2048 / 256 + 1))
    assert count(passes.apple(problem)) == pytest.approx(4)
    assert count(passes.liger(problem)) == pytest.approx(3)


def test_the_command_prints_tables_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "static.json"
    static_gpu.main(["--shape", "8192,256,4096", "--arch", "sm_90", "--json", str(path)])
    printed, rows = capsys.readouterr().out, json.loads(path.read_text())["rows"]
    kernels = [r for r in rows if r["table"] == "kernels"]
    assert "cut-cross-entropy" in printed and "liger-kernel" in printed and "MI300X" in printed
    assert {r["kernel"] for r in kernels} >= {"_sweep", "_sweep_tma", "_hidden_gradient", "_cce_backward_kernel"}
    assert all(r["spills"] == 0 for r in kernels if r["implementation"].startswith("cce_fx"))
    main(["report", str(path)])
    assert "`_sweep_tma`" in capsys.readouterr().out
