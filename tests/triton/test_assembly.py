# SPDX-License-Identifier: Apache-2.0
"""What the compiler makes of the kernels for machines that are not there: nothing spilled, everything fits, and every
inner loop of a matrix product runs on the tensor cores. A sample here, the whole table behind the marker `slow`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if torch.__version__ < "2.12":
    pytest.skip("torch 2.11 takes addmm's out_dtype for its beta on tensors without data", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes the compiler's place in this process", allow_module_level=True)

from cce_fx.kernels.spec import Epilogue, Needs, Norm, Problem, RowGrads
from cce_fx.kernels.triton import aot, backward, forward, forward_backward
from cce_fx.kernels.triton.device import Launch, record
from cce_fx.kernels.triton.machines import BY_ARCH, Machine

ARCHS = ["sm_80", "sm_90", "sm_100", "gfx942"]
# Kernels that only select or add rows.
NO_PRODUCTS = {"_select", "_join", "_release"}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(
    machine: Machine, dtype: torch.dtype = torch.bfloat16, n: int = 8192, d: int = 4096, v: int = 128256, **how: object
) -> list[Launch]:
    """The kernels of forward and backward, of every strategy and with either product, at Llama-3's hidden size."""
    problem = Problem(
        hidden=meta(n, d, dtype=dtype),
        target=meta(n, dtype=torch.int64),
        **{"weight": meta(v, d, dtype=dtype), "bias": None, **how},  # type: ignore[arg-type]
    )
    row = meta(n, dtype=torch.float32)
    with record(machine) as found:
        forward(problem)
        for strategy, products in (("recompute", "auto"), ("chunked", "auto"), ("chunked", "triton")):
            backward(problem, Norm(row, row), RowGrads(row), Needs(), strategy=strategy, products=products)
            forward_backward(problem, RowGrads(row), Needs(), strategy=strategy, products=products)
    # One of each kernel and layout of the scratch; the last piece of several, whose masks differ, comes last.
    return list({(x.kernel.__name__, x.args.get("BY_ROW")): x for x in found}.values())


def names(found: list[Launch]) -> set[str]:
    return {launch.kernel.__name__ for launch in found}


def check(machine: Machine, found: list[Launch], tensor_cores: bool = True) -> None:
    for launch in found:
        name, r = launch.kernel.__name__, aot.compile_for(launch, machine)
        # Outside half precision ptxas keeps up to four values in memory to fit one more program, by its own choice.
        allowed = 16 if r.registers < 240 and not tensor_cores else 0
        assert r.spills <= allowed, f"{name} spills {r.spills} bytes on {machine.arch} with {r.registers} registers"
        assert r.shared <= machine.shared, f"{name} needs {r.shared} bytes of shared memory on {machine.arch}"
        assert r.programs >= 1, f"{name} does not fit on a multiprocessor of {machine.arch}"
        if name not in NO_PRODUCTS and tensor_cores:
            assert r.loops > 0, f"{name} has no loop on {machine.arch}"
            assert r.bare == 0, f"{r.bare} of {r.loops} inner loops of {name} leave tensor cores idle on {machine.arch}"


@pytest.mark.sample(2)
@pytest.mark.parametrize("arch", ARCHS)
def test_default_kernels(arch: str) -> None:
    found = launches(BY_ARCH[arch])
    products = {"_sweep", "_hidden_gradient", "_weight_gradient", "_write_gradient", "_into_hidden", "_into_weight"}
    assert products <= names(found)
    check(BY_ARCH[arch], found)


@pytest.mark.sample(4)
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_that_hold_few_rows(arch: str) -> None:
    found = launches(BY_ARCH[arch], n=64, top=True)
    assert {"_hold", "_release"} <= names(found)
    check(BY_ARCH[arch], found)


@pytest.mark.sample(4)
@pytest.mark.parametrize("arch", ARCHS)
def test_a_vocabulary_that_ends_within_a_tile(arch: str) -> None:
    check(BY_ARCH[arch], launches(BY_ARCH[arch], n=1000, v=50257))


VARIANTS: dict[str, Callable[[torch.dtype], dict[str, Any]]] = {
    "plain": lambda dtype: {},
    "softcap": lambda dtype: {"epilogue": Epilogue(1.0, 30.0, 1.0)},
    "bias": lambda dtype: {"bias": meta(128256, dtype=dtype)},
    "smooth": lambda dtype: {"smooth": True},
    "likeliest class": lambda dtype: {"top": True},
    "class weights": lambda dtype: {"smooth": True, "class_weight": meta(128256, dtype=torch.float32)},
    "filter": lambda dtype: {"filter_eps": 2.0**-12},
    "all rows": lambda dtype: {"ignore_index": None},
    "transposed weight": lambda dtype: {"weight": meta(4096, 128256, dtype=dtype).T},
    "odd sizes": lambda dtype: {"n": 1000, "v": 50257, "d": 1001},
}


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(BY_ARCH))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_config(arch: str, dtype: torch.dtype, variant: str) -> None:
    found = launches(BY_ARCH[arch], dtype, **VARIANTS[variant](dtype))
    check(BY_ARCH[arch], found, tensor_cores=dtype.itemsize == 2)


def test_a_loop_is_all_its_blocks_wherever_they_stand() -> None:
    text = """
$L__BB0_1:                              // =>This Loop Header: Depth=1
    ld.global.b32 %r1, [%rd1];
$L__BB0_3:                              //   in Loop: Header=BB0_2 Depth=2
$L__tmp7:
    mma.sync.aligned.m16n8k16 {%f1}, {%r1};
$L__BB0_2:                              //   Parent Loop BB0_1 Depth=1
                                        // =>  This Inner Loop Header: Depth=2
    @%p1 bra $L__BB0_3;
// %bb.4:                               //   in Loop: Header=BB0_1 Depth=1
    @%p2 bra $L__BB0_1;
// %bb.5:
    st.global.b32 [%rd1], %r1;
$L__BB0_9:
    ret;
"""
    outer, inner = aot.find_loops(text)
    assert (outer.innermost, inner.innermost) == (False, True)
    assert (outer.parents, inner.parents) == (frozenset(), {outer.name})
    assert (outer.instructions, inner.instructions) == (2, 2)
    assert "mma.sync" in inner.body and "%p1" in inner.body
    assert "ld.global" in outer.body and "%p2" in outer.body and "st.global" not in outer.body
