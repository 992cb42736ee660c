# SPDX-License-Identifier: Apache-2.0
"""What cce_fx costs beside the loss itself, counted where it does not depend on a clock; `benchmarks overhead` has times."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cce_fx import op


def modules_after(code: str, *names: str) -> dict[str, bool]:
    """Whether each of some modules is loaded after a program."""
    code += f"\nimport json, sys; print(json.dumps({{n: n in sys.modules for n in {names!r}}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/")
    return json.loads(done.stdout.splitlines()[-1])


def test_being_installed_imports_nothing() -> None:
    code = (
        "import torch; torch.compile(lambda x: x.sin(), backend='eager')(torch.zeros(2)); torch._dynamo.list_backends()"
    )
    assert modules_after(code, "cce_fx") == {"cce_fx": False}


def test_the_functional_form_imports_no_compiler() -> None:
    code = "import torch, cce_fx; cce_fx.linear_cross_entropy"
    names = ("torch._dynamo", "torch._inductor", "sympy", "triton", "cce_fx.passes", "cce_fx.backend")
    assert modules_after(code, *names) == dict.fromkeys(names, False)


def test_the_distributed_form_imports_what_it_needs() -> None:
    assert modules_after("import torch, cce_fx.distributed", "cce_fx.distributed.vocab") == {
        "cce_fx.distributed.vocab": True
    }


def test_the_backend_imports_no_kernel_of_another_device() -> None:
    code = "import torch, cce_fx.backend"
    names = ("cce_fx.kernels.triton", "cce_fx.kernels.reference", "matplotlib", "rich", "transformers")
    assert modules_after(code, *names) == dict.fromkeys(names, False)


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("grads_in_forward", ["linear_cross_entropy_with_grads"]),
        ("recompute", ["linear_cross_entropy", "linear_cross_entropy_backward"]),
    ],
)
def test_a_training_step_calls_one_operator_for_each_pass(strategy: str, expected: list[str]) -> None:
    def loss(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w), y)

    h, w = torch.randn(6, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    run = torch.compile(loss, backend="cce", options={"inner": "eager", "strategy": strategy})
    run(h, w, torch.randint(50, (6,)))  # compiles
    with torch.profiler.profile() as profile:
        run(h, w, torch.randint(50, (6,))).backward()
    assert [e.name.removeprefix("cce::") for e in profile.events() if e.name.startswith("cce::")] == expected


def test_sizes_that_are_numbers_are_compared_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("torch._check was asked about two numbers that agree")

    monkeypatch.setattr(op, "check_condition", refuse)
    op.check(torch.zeros(3, 2), torch.zeros(5, 2), torch.zeros(5), torch.zeros(3, dtype=torch.int64), torch.zeros(5))


def test_operators_are_known_to_the_compiler() -> None:
    for name in ("linear_cross_entropy", "linear_cross_entropy_with_grads", "linear_cross_entropy_backward"):
        assert torch.Tag.pt2_compliant_tag in getattr(torch.ops.cce, name).default.tags
    with FakeTensorMode():
        head = (torch.empty(3, 2), torch.empty(5, 2), None, torch.empty(3, dtype=torch.int64), None)
        nll, *_ = torch.ops.cce.linear_cross_entropy(
            *head, -100, True, False, 1.0, None, 1.0, False, None, None, False, False
        )
    assert nll.shape == (3,)
