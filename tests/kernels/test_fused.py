# SPDX-License-Identifier: Apache-2.0
"""The head as compiled code: as good as dense arithmetic in whatever steps it takes, on each kind of processor."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._inductor.config as config
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_fx.kernels import fused, native, reference, tiled
from cce_fx.kernels.native import build, steps
from cce_fx.kernels.native import fused as native_fused
from cce_fx.kernels.native.fused import FILES, STORAGE, Compiled, compiled
from cce_fx.kernels.native.steps import Sizes
from cce_fx.kernels.spec import Epilogue, Needs, Problem, RowGrads
from tests.kernels.contract import ALL, check, in_torch_operations, prepared, problems, small, tensor


@pytest.fixture(autouse=True)
def for_any_size() -> Iterator[None]:
    with prepared():
        yield


pytestmark = pytest.mark.skipif(compiled(torch.float32) is None, reason="no compiled code for this processor")
HAS = torch.cpu.get_capabilities()
# Flags that take instructions away, and what a processor needs to have the others.
PROCESSORS = {"this": "", "AVX2": "-mno-avx512f", "without bfloat16": "-mno-avx512bf16"}


@functools.cache
def code_for(processor: str, dtype: torch.dtype) -> Compiled | None:
    if dtype not in STORAGE:
        return None
    folder = Path(tempfile.mkdtemp())
    made, code = folder / "code.so", folder / "code.cpp"
    code.write_text(build.source(*FILES, define=f"STORAGE {STORAGE[dtype]}"))
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    # GCC's own intrinsics; what one storage does not need.
    allowed = ["-Wno-maybe-uninitialized", "-Wno-unused-parameter"]
    command = ["g++", *flags, *allowed, *build.FLAGS, *PROCESSORS[processor].split(), str(code), "-o", str(made)]
    subprocess.run(command, check=True)
    return Compiled(ctypes.CDLL(str(made)))


@contextlib.contextmanager
def on(processor: str) -> Iterator[None]:
    code = functools.partial(code_for, processor)
    for cached in (steps.sums, steps.sums_and_gradients, steps.gradients):
        cached.cache_clear()
    with mock.patch.object(fused, "compiled", code), mock.patch.object(steps, "compiled", code):
        yield


@contextlib.contextmanager
def taken() -> Iterator[list[steps.Step]]:
    """The steps that are taken inside."""
    found: list[steps.Step] = []
    take = fused._Run._take

    def noted(self: fused._Run, chosen: steps.Steps) -> bool:
        found.extend(chosen)
        return take(self, chosen)

    with mock.patch.object(fused._Run, "_take", noted):
        yield found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Problems whose rows and classes are several blocks and chunks, with sizes that fill neither vectors nor blocks.
SHAPES = {
    "one block": (40, 33, 700, None),
    "narrow": (70, 1, 901, None),
    "held in the workspace": (150, 24, 1100, 1 << 20),
    "held in several blocks": (500, 40, 2500, 2 << 20),
    "lent, with a tail, and made again": (700, 200, 2003, 3 << 19),
    "made again": (300, 16, 9000, 1 << 20),
    "wide": (90, 1100, 800, 8 << 20),
}


def problem_of(shape: str, dtype: torch.dtype = torch.float32, **options: object) -> Problem:
    n, d, v, workspace = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (tensor((rows, d), torch.float32, generator) * d**-0.25 for rows in (n, v))
    problem = Problem(
        hidden.to(dtype), weight.to(dtype), None, torch.randint(v, (n,), generator=generator), workspace=workspace
    )
    return replace(problem, **options)


def row_grads(problem: Problem, all_three: bool = False) -> RowGrads:
    n, generator = len(problem.target), torch.Generator().manual_seed(1)
    nll, lse, smooth = (torch.randn(n, generator=generator) for _ in range(3))
    return RowGrads(nll, lse, smooth / len(problem.weight)) if all_three else RowGrads(nll)


OPTIONS = {
    "plain": {},
    "bias": {"bias": torch.randn(10_000)},
    "scale": {"epilogue": Epilogue(-0.5, None, 2.0)},
    "cap": {"epilogue": Epilogue(0.5, 3.0, 2.0)},
    "negative cap": {"epilogue": Epilogue(0.5, 3.0, -2.0)},
    "smooth": {"smooth": True},
    "smooth with a cap and class weights": {
        "smooth": True, "epilogue": Epilogue(0.5, 3.0), "class_weight": torch.rand(10_000),
    },
    "ignored rows": {"ignore_index": -100},
}  # fmt: skip


def with_options(problem: Problem, name: str) -> Problem:
    options, classes = dict(OPTIONS[name]), len(problem.weight)
    for field in ("bias", "class_weight"):
        if field in options:
            options[field] = options[field][:classes]
    if name == "ignored rows":
        options["target"] = problem.target.where(torch.arange(len(problem.target)) % 3 > 0, -100)
    return replace(problem, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_with_every_option(shape: str, options: str) -> None:
    p = with_options(problem_of(shape), options)
    check(p, row_grads(p, all_three=p.smooth), ALL, ways=["compiled"])


@pytest.mark.parametrize("processor", [name for name in PROCESSORS if name != "this"])
@pytest.mark.parametrize("shape", ["one block", "lent, with a tail, and made again", "wide"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_other_processors(dtype: torch.dtype, shape: str, processor: str) -> None:
    p = with_options(problem_of(shape, dtype), "ignored rows")
    with on(processor):
        check(p, row_grads(p), ALL, ways=["compiled"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["one block", "lent, with a tail, and made again"])
def test_half_precision(shape: str, options: str, dtype: torch.dtype) -> None:
    p = with_options(problem_of(shape, dtype), options)
    check(p, row_grads(p, all_three=p.smooth), ALL, ways=["compiled"])


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(list(PROCESSORS)), st.integers(1, 5))
def test_drawn_problems_on_any_number_of_threads(
    drawn: tuple[Problem, RowGrads, Needs], processor: str, count: int
) -> None:
    with on(processor), mock.patch.object(steps, "_WORK", 1), threads(count):
        check(*drawn, ways=["compiled"])


@pytest.mark.parametrize(
    "needs", [Needs(*map(bool, flags)) for flags in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]], ids=str
)
@pytest.mark.parametrize("dtype", STORAGE)
def test_each_gradient_alone(dtype: torch.dtype, needs: Needs) -> None:
    p = with_options(problem_of("held in several blocks", dtype), "bias")
    check(replace(p, bias=p.bias.to(dtype)), row_grads(p), needs, ways=["compiled"])


def test_the_shapes_of_these_tests_take_every_kind_of_step() -> None:
    kinds: Counter[str] = Counter()
    for shape in SHAPES:
        p = problem_of(shape)
        with taken() as found:
            tiled.forward_backward(p, row_grads(p), ALL)
            tiled.backward(p, tiled.forward(p).norm, row_grads(p), ALL)
        kinds.update(s.what for s in found)
        kinds["lent"] += sum(s.lent for s in found)
        kinds["tail"] += sum(s.tail > 0 for s in found)
        kinds["stretches"] += sum(s.rows > s.stretch for s in found)
    assert all(kinds[k] for k in ("sums", "held", "weights", "gradients", "lent", "tail", "stretches")), kinds


@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Sizes, dtype=st.sampled_from(list(STORAGE)), rows=st.integers(1, 70_000), classes=st.integers(1, 300_000),
        width=st.integers(1, 5000), capped=st.booleans(), smooth=st.booleans(), uniform=st.booleans(), hidden=st.booleans(),
        weight=st.booleans(), bias=st.booleans(), filtered=st.just(False), threads=st.integers(1, 100),
        budget=st.integers(1 << 14, 1 << 25),
    )
)  # fmt: skip
def test_steps_keep_to_the_workspace_and_make_each_row_once(sizes: Sizes) -> None:
    wanted = [name for name in ("hidden", "weight", "bias") if getattr(sizes, name)]
    for plan, makes in (
        (steps.sums, {"sums"}),
        (steps.sums_and_gradients, {"sums", *wanted}),
        (steps.gradients, {*wanted}),
    ):
        found = plan(sizes)
        if not found:
            continue
        assert max(s.size for s in found) <= sizes.budget
        done: dict[str, list[tuple[int, ...]]] = {}
        for step in found:
            made = ["sums"] * (step.what in ("sums", "held")) + ["hidden"] * step.hidden
            made += [n for n in ("weight", "bias") if step.weights and n in wanted]
            for name in made:
                done.setdefault(name, []).append((step.first, step.last, *(step.classes or (0, sizes.classes))))
        assert set(done) == makes
        for parts in done.values():  # of the rows by classes: apart from each other, and all of them together
            assert sum((b - a) * (d - c) for a, b, c, d in parts) == sizes.rows * sizes.classes
            for (a, b, _, d), (e, f, g, _) in pairwise(parts):
                assert (e, g) == (b, 0) or (e, f, g) == (a, b, d)


def test_it_repeats_bit_by_bit() -> None:
    p = problem_of("lent, with a tail, and made again")
    first, second = (tiled.forward_backward(p, row_grads(p), ALL) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True) if x is not None)


@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_left_to_torch_operations(where: str, value: float) -> None:
    p = problem_of("one block")
    getattr(p, where)[3, 2] = value
    found = tiled.forward_backward(p, row_grads(p), ALL)
    with in_torch_operations():
        expected = tiled.forward_backward(p, row_grads(p), ALL)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


def test_a_sum_over_many_classes_is_exact() -> None:
    """A hundred thousand numbers of one sign, added one by one, would be off by a hundred roundings."""
    p = problem_of("made again", epilogue=Epilogue(0.0))
    p = replace(p, weight=torch.rand(100_000, 16), target=p.target * 11)
    rows = RowGrads(torch.full((300,), 1 / 300))
    stats, grads = tiled.forward_backward(p, rows, ALL)
    exact, exact_grads = reference.forward_backward(p, rows, ALL)
    assert (stats.sumexp - exact.sumexp).abs().max() <= 8 * torch.finfo(torch.float32).eps * 1e5
    torch.testing.assert_close(grads.hidden.double(), exact_grads.hidden, rtol=0, atol=0)  # a scale of zero


def test_layouts_of_hidden_and_weight() -> None:
    for layout in ("columns", "strided", "expanded"):
        generator = torch.Generator().manual_seed(2)
        p = Problem(
            tensor((50, 40), torch.float32, generator, layout), tensor((600, 40), torch.float32, generator, layout), None,
            torch.randint(600, (50,), generator=generator),
        )  # fmt: skip
        check(p, row_grads(p), ALL, ways=["compiled"])


def test_a_gradient_that_is_one_number_for_all_rows() -> None:
    p = problem_of("one block", smooth=True)
    one = lambda: torch.tensor([0.5]).expand(len(p.target))  # noqa: E731
    check(p, RowGrads(one(), one(), one()), ALL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_exact_with_a_filter(dtype: torch.dtype) -> None:
    p, report = problem_of("one block", dtype), []
    exact = tiled.forward_backward(p, row_grads(p), ALL)[1]
    found = tiled.forward_backward(replace(p, filter_eps=0.2), row_grads(p), ALL, report=report)[1]
    assert not report and all(torch.equal(a, b) for a, b in zip(exact, found, strict=True) if a is not None)


def test_a_sum_of_one_keeps_many_parts_that_are_too_small_for_it() -> None:
    hidden, weight, target = torch.zeros(16, 16), torch.zeros(16000, 16), torch.zeros(16, dtype=torch.int64)
    hidden[:, 0], weight[0, 0] = 1.0, 17.5
    p = Problem(hidden, weight, None, target)
    with taken() as steps:
        found = tiled.forward(p).nll
    assert steps
    exact = torch.full((16,), 15999 * math.exp(-17.5), dtype=torch.float64).log1p().float()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0.0)


def test_without_code_for_the_processor_torch_operations_serve() -> None:
    compiled.cache_clear()
    try:
        with mock.patch.object(torch.cpu, "get_capabilities", dict):
            assert compiled(torch.float32) is None
            check(small(), RowGrads(torch.ones(6)), ALL, ways=["compiled"])
    finally:
        compiled.cache_clear()


def test_the_background_has_the_configuration_of_inductor() -> None:
    found, done = [], threading.Event()

    def code(dtype: torch.dtype) -> None:
        found.append(config.cpp.cxx)
        done.set()

    with (
        mock.patch.object(native_fused, "compiled", code),
        mock.patch.object(native_fused, "_prepared", set()),
        config.patch("cpp.cxx", ("a compiler",)),
    ):
        native_fused.prepare(torch.float32)
        assert done.wait(10)
    assert found == [("a compiler",)]


def test_every_file_of_the_code_is_compiled() -> None:
    folder = Path(native.__file__).parent
    assert {p.name for p in folder.iterdir() if p.suffix in (".h", ".cpp")} == {*FILES, "walks.cpp"}
