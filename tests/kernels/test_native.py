# SPDX-License-Identifier: Apache-2.0
"""The compiled kernel: as good as dense arithmetic in whatever steps it takes, on each kind of processor and without a compiler."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch._inductor.config as config
from hypothesis import given, settings
from hypothesis import strategies as st

from cce_fx.kernels import choose, native, portable, reference
from cce_fx.kernels.native import build, common_case, library, plan, products, run
from cce_fx.kernels.native.library import FILES, STORAGE, Library, Step, compiled
from cce_fx.kernels.spec import Epilogue, Needs, Problem, RowGrads, Sizes
from tests.kernels.contract import ALL, check, problems, small, tensor, threads

needs_code = pytest.mark.skipif(compiled(torch.float32) is None, reason="no compiled code for this processor")
# Compilers, and flags that take something away.
VARIANTS = {
    "this": ["g++"],
    "AVX2": ["g++", "-mno-avx512f"],
    "without bfloat16": ["g++", "-mno-avx512bf16"],
    "without OpenMP": ["g++", "-fno-openmp"],
    "clang": ["clang++"],
    "clang without OpenMP": ["clang++", "-fno-openmp"],
}
VARIANTS = {name: command for name, command in VARIANTS.items() if shutil.which(command[0])}
PLANS = {"sums": plan.sums, "both": plan.sums_and_gradients, "gradients": plan.gradients}


@functools.cache
def code_for(variant: str, dtype: torch.dtype) -> Library | None:
    if dtype not in STORAGE:
        return None
    folder = Path(tempfile.mkdtemp())
    made, code = folder / "code.so", folder / "code.cpp"
    code.write_text(build.source(*FILES, define=f"STORAGE {STORAGE[dtype]}"))
    compiler, *less = VARIANTS[variant]
    flags = ["-march=native", "-fopenmp", "-shared", "-fPIC", "-std=c++17", "-Wall", "-Wextra", "-Werror"]
    # GCC's own intrinsics; what one storage does not need; pragmas where there is no OpenMP.
    allowed = [
        "maybe-uninitialized",
        "unused-parameter",
        "unused-function",
        "unknown-pragmas",
        "unknown-warning-option",
    ]
    allowed = [f"-Wno-{name}" for name in allowed]
    subprocess.run([compiler, *flags, *allowed, *build.FLAGS, *less, str(code), "-o", str(made)], check=True)
    return Library(ctypes.CDLL(str(made)), dtype)


@contextlib.contextmanager
def on(variant: str) -> Iterator[None]:
    code = functools.partial(code_for, variant)
    for cached in (*PLANS.values(), plan.products, plan.given, common_case.prepared):
        cached.cache_clear()
    with contextlib.ExitStack() as patches:
        for module in (run, plan, products):
            patches.enter_context(mock.patch.object(module, "compiled", code))
        yield


# Problems whose rows and classes are several blocks and chunks, with sizes that fill neither vectors nor blocks.
SHAPES = {
    "one block": (40, 33, 700, None),
    "narrow": (70, 1, 901, None),
    "stored in the workspace": (150, 24, 1100, 1 << 20),
    "stored in several blocks": (500, 40, 2500, 2 << 20),
    "stored in the gradient, and made again": (700, 200, 2003, 3 << 19),
    "made again": (300, 16, 9000, 1 << 20),
    "the smallest workspace": (90, 200, 700, 1),
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
    "plain": {"top": True},
    "bias": {"bias": torch.randn(10_000)},
    "scale": {"epilogue": Epilogue(-0.5, None, 2.0)},
    "cap": {"epilogue": Epilogue(0.5, 3.0, 2.0), "top": True},
    "negative cap": {"epilogue": Epilogue(0.5, 3.0, -2.0)},
    "smooth": {"smooth": True},
    "smooth with a cap and class weights": {
        "smooth": True, "epilogue": Epilogue(0.5, 3.0), "class_weight": torch.rand(10_000),
    },
    "ignored rows": {"ignore_index": -100, "top": True},
}  # fmt: skip


def with_options(problem: Problem, name: str) -> Problem:
    options, classes = dict(OPTIONS[name]), len(problem.weight)
    for field in ("bias", "class_weight"):
        if field in options:
            options[field] = options[field][:classes]
    if name == "ignored rows":
        options["target"] = problem.target.where(torch.arange(len(problem.target)) % 3 > 0, -100)
    return replace(problem, **options)


@pytest.mark.sample(4)
@needs_code
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_step_with_every_option(shape: str, options: str) -> None:
    p = with_options(problem_of(shape), options)
    check(p, row_grads(p, all_three=p.smooth), ALL, native)


@pytest.mark.sample(24)
@needs_code
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "this"])
@pytest.mark.parametrize("shape", ["one block", "stored in the gradient, and made again", "wide"])
@pytest.mark.parametrize("dtype", STORAGE)
def test_other_processors_and_compilers(dtype: torch.dtype, shape: str, variant: str) -> None:
    p = with_options(problem_of(shape, dtype), "ignored rows")
    with on(variant):
        check(p, row_grads(p), ALL, native)


@pytest.mark.sample(4)
@needs_code
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", ["one block", "stored in the gradient, and made again"])
def test_half_precision(shape: str, options: str, dtype: torch.dtype) -> None:
    p = with_options(problem_of(shape, dtype), options)
    check(p, row_grads(p, all_three=p.smooth), ALL, native)


@needs_code
# CCE_FX_PROBLEMS draws more: under a sanitizer 2,000 (`nox -s sanitized`).
@settings(max_examples=int(os.environ.get("CCE_FX_PROBLEMS", "6")), deadline=None)
@given(problems(), st.sampled_from(list(VARIANTS)), st.sampled_from([1, 2, 3, 7]))
def test_drawn_problems_on_any_number_of_threads(
    drawn: tuple[Problem, RowGrads, Needs], variant: str, count: int
) -> None:
    with on(variant), mock.patch.object(plan, "_WORK", 1), threads(count):
        if drawn[0].hidden.dtype in STORAGE:
            check(*drawn, native)


@needs_code
@pytest.mark.parametrize(
    "needs", [Needs(*map(bool, flags)) for flags in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]], ids=str
)
@pytest.mark.parametrize("dtype", STORAGE)
def test_each_gradient_alone(dtype: torch.dtype, needs: Needs) -> None:
    p = with_options(problem_of("stored in several blocks", dtype), "bias")
    check(replace(p, bias=p.bias.to(dtype)), row_grads(p), needs, native)


def sizes_of(p: Problem) -> Sizes:
    return Sizes(p.hidden.dtype, len(p.target), *p.weight.shape, hidden=True, weight=True, workspace=p.workspace)


@needs_code
def test_the_shapes_of_these_tests_take_every_kind_of_step() -> None:
    kinds: Counter[str] = Counter()
    for shape in SHAPES:
        for make in PLANS.values():
            for step in make(sizes_of(problem_of(shape)), threads=2).steps:
                kinds[("sums", "tiles", "weights", "gradients")[step.kind]] += 1
                kinds["in the gradient"] += step.in_weight
                kinds["row blocks"] += step.rows > step.block
                kinds["repeated"] += step.last - step.first > step.rows
    wanted = ("sums", "tiles", "weights", "gradients", "in the gradient", "row blocks", "repeated")
    assert all(kinds[k] for k in wanted), kinds


@needs_code
@settings(max_examples=200, deadline=None)
@given(
    st.builds(
        Sizes, dtype=st.sampled_from(list(STORAGE)), rows=st.integers(1, 70_000), classes=st.integers(1, 300_000),
        width=st.integers(1, 5000), capped=st.booleans(), smooth=st.booleans(), uniform=st.booleans(), hidden=st.booleans(),
        weight=st.booleans(), bias=st.booleans(), workspace=st.integers(1 << 16, 1 << 27),
    ),
    st.integers(1, 100),
)  # fmt: skip
def test_steps_keep_to_the_workspace_and_make_each_row_once(sizes: Sizes, count: int) -> None:
    wanted = [name for name in ("hidden", "weight", "bias") if getattr(sizes, name)]
    # Twelve columns of the weight and sixteen rows of hidden, each with its gradient, are held whatever the workspace.
    least = 4 * (2 * 12 + 3 * 16) * (sizes.width + 64) + 64 * sizes.rows
    for name, makes in (("sums", {"sums"}), ("both", {"sums", *wanted}), ("gradients", {*wanted})):
        found = PLANS[name](sizes, count)
        assert 4 * found.size <= max(sizes.workspace, least)
        done: dict[str, list[tuple[int, int]]] = {}
        for step in found.steps:
            assert (step.begin, step.end) == (0, sizes.classes)
            assert (
                step.rows > 0 and step.classes > 0 and (step.rows >= step.last - step.first or step.classes >= step.end)
            )
            for made in made_by(step, wanted):
                done.setdefault(made, []).append((step.first, step.last))
        assert set(done) == makes
        for parts in done.values():  # one after the other, and all of them together
            assert [a for a, _ in parts] == [0, *(b for _, b in parts[:-1])] and parts[-1][1] == sizes.rows


def made_by(step: Step, wanted: list[str]) -> list[str]:
    sums = step.kind in (plan.SUMS, plan.TILES)
    return ["sums"] * sums + ["hidden"] * step.hidden + [n for n in ("weight", "bias") if step.weights and n in wanted]


REPEATED = """
import hashlib, sys, torch
torch.manual_seed(0)  # options have random numbers
from unittest import mock
from cce_fx.kernels import native
from cce_fx.kernels.native import plan
from tests.kernels.test_native import SHAPES, STORAGE, problem_of, row_grads, with_options
from tests.kernels.contract import ALL
torch.set_num_threads(int(sys.argv[1]))
with mock.patch.object(plan, "_WORK", 1):
    for shape in SHAPES:
        for dtype in STORAGE:
            p, digest = with_options(problem_of(shape, dtype), "smooth with a cap and class weights"), hashlib.sha256()
            for p in (p, problem_of(shape, dtype)):
                g, stats = row_grads(p, all_three=p.smooth), native.forward(p)
                for found in (stats, native.backward(p, stats.norm, g, ALL), *native.forward_backward(p, g, ALL)):
                    for t in found:
                        if t is not None:
                            digest.update(t.view(torch.uint8).numpy().tobytes())
            print(shape, dtype, digest.hexdigest())
"""


@pytest.mark.sample(3)
@needs_code
@pytest.mark.parametrize("count", [1, 2, 7])
def test_every_step_repeats_bit_by_bit_in_another_process(count: int) -> None:
    command = [sys.executable, "-c", REPEATED, str(count)]
    first, second = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == second and len(first.splitlines()) == len(SHAPES) * len(STORAGE)


@needs_code
@pytest.mark.parametrize("where", ["hidden", "weight"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_is_as_in_torch_operations(where: str, value: float) -> None:
    p = problem_of("one block")
    getattr(p, where)[3, 2] = value
    found = native.forward_backward(p, row_grads(p), ALL)
    expected = portable.forward_backward(p, row_grads(p), ALL)
    for a, b in zip(found, expected, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)


@pytest.mark.sample(24)
@needs_code
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["in rows", "in columns"])
@pytest.mark.parametrize("shape", [(16, 1, 7), (48, 33, 700), (64, 200, 2003), (128, 40, 5)])
@pytest.mark.parametrize("count", [1, 3])
def test_products_of_a_block(count: int, shape: tuple[int, int, int], layout: str, variant: str) -> None:
    r, d, v = shape
    generator = torch.Generator().manual_seed(0)
    hidden, weight, given = (tensor(s, torch.float32, generator) for s in ((r, d), (v, d), (r, v)))
    if layout == "in columns":
        hidden, weight = (t.T.contiguous().T for t in (hidden, weight))
    before = tensor((v, d), torch.float32, generator)
    with on(variant), threads(count):
        made = products.NativeProducts(weight, r)
        made.logits(hidden)
        close(made.tile, hidden.double() @ weight.double().T)
        made.tile.copy_(given)
        exact = given.double() @ weight.double(), given.double().T @ hidden.double()
        for adds in (False, True):
            d_hidden, d_weight = torch.full((r, d), torch.nan), before.clone()
            made.gradients(hidden, d_hidden, d_weight, adds)
            close(d_hidden, exact[0])
            close(d_weight, exact[1] + before if adds else exact[1])
        alone = torch.full((r, d), torch.nan), torch.full((v, d), torch.nan)
        made.gradients(hidden, alone[0], None, False)
        made.gradients(hidden, None, alone[1], False)
        close(alone[0], exact[0])
        close(alone[1], exact[1])
        assert torch.equal(made.tile, given)


@needs_code
def test_a_block_of_few_rows_is_the_codes_and_one_as_wide_as_the_classes_a_blas_librarys() -> None:
    made = [choose.products(torch.empty(classes, 16), 64, 1 << 20) for classes in (512, 511)]
    assert [isinstance(m, products.NativeProducts) for m in made] == [True, False]


def close(found: torch.Tensor, exact: torch.Tensor) -> None:
    assert (found - exact).abs().max() <= 1e-5 * exact.abs().max()


@needs_code
def test_a_sum_over_many_classes_is_exact() -> None:
    """A hundred thousand numbers of one sign, added one by one, would be off by a hundred roundings."""
    p = problem_of("made again", epilogue=Epilogue(0.0))
    p = replace(p, weight=torch.rand(100_000, 16), target=p.target * 11)
    rows = RowGrads(torch.full((300,), 1 / 300))
    stats, grads = native.forward_backward(p, rows, ALL)
    exact, exact_grads = reference.forward_backward(p, rows, ALL)
    assert (stats.sumexp - exact.sumexp).abs().max() <= 8 * torch.finfo(torch.float32).eps * 1e5
    torch.testing.assert_close(grads.hidden.double(), exact_grads.hidden, rtol=0, atol=0)  # a scale of zero


@needs_code
def test_layouts_of_hidden_and_weight() -> None:
    for layout in ("columns", "strided", "expanded"):
        generator = torch.Generator().manual_seed(2)
        p = Problem(
            tensor((50, 40), torch.float32, generator, layout), tensor((600, 40), torch.float32, generator, layout), None,
            torch.randint(600, (50,), generator=generator),
        )  # fmt: skip
        check(p, row_grads(p), ALL, native)


@needs_code
def test_a_gradient_that_is_one_number_for_all_rows() -> None:
    p = problem_of("one block", smooth=True)
    one = lambda: torch.tensor([0.5]).expand(len(p.target))  # noqa: E731
    check(p, RowGrads(one(), one(), one()), ALL, native)


@needs_code
def test_a_sum_of_one_keeps_many_parts_that_are_too_small_for_it() -> None:
    hidden, weight, target = torch.zeros(16, 16), torch.zeros(16000, 16), torch.zeros(16, dtype=torch.int64)
    hidden[:, 0], weight[0, 0] = 1.0, 17.5
    p = Problem(hidden, weight, None, target)
    found = native.forward(p).nll
    exact = torch.full((16,), 15999 * math.exp(-17.5), dtype=torch.float64).log1p().float()
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=0.0)


@needs_code
def test_a_long_call_returns_every_half_second_for_whoever_waits_to_interrupt_it() -> None:
    p = small(2048, 256, 32000)
    code, calls = compiled(torch.float32), []

    def counted(*arguments: object) -> int:
        calls.append(code.run(*arguments))
        return calls[-1]

    with threads(1), mock.patch.object(run, "compiled", lambda dtype: mock.Mock(run=counted)):
        found = native.forward_backward(p, row_grads(p), ALL)
        assert len(calls) > 1 and calls == [library.MORE] * (len(calls) - 1) + [library.DONE]
    for a, b in zip(found, native.forward_backward(p, row_grads(p), ALL), strict=True):
        for x, y in zip(a, b, strict=True):
            assert y is None or torch.allclose(x, y, rtol=1e-4, atol=1e-4)


# --- which problems it serves ---------------------------------------------------------------------------------------------


def chosen(p: Problem) -> object:
    return choose.choose(p)


@pytest.fixture
def unprepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_prepared", set())


@needs_code
def test_large_problems_are_served_and_small_ones_where_it_was_prepared(unprepared: None) -> None:
    large = small(1 << 12, 1, 1 << 12)
    assert chosen(large) is native and chosen(small()) is portable
    native.prepare(torch.float32)
    assert chosen(small()) is native
    assert chosen(small(dtype=torch.float64)) is portable and chosen(small(dtype=torch.bfloat16)) is portable


def test_without_code_for_the_processor_torch_operations_serve(unprepared: None) -> None:
    compiled.cache_clear()
    try:
        with mock.patch.object(torch.cpu, "get_capabilities", dict):
            native.prepare(torch.float32)
            assert compiled(torch.float32) is None and chosen(small(1 << 12, 1, 1 << 12)) is portable
    finally:
        compiled.cache_clear()


def test_without_a_compiler_torch_operations_serve(unprepared: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise OSError("no compiler")

    monkeypatch.setattr("torch._inductor.codecache.CppCodeCache.load", missing)
    caches = build.library, compiled
    for cache in caches:
        cache.cache_clear()
    try:
        with mock.patch.object(build._log, "info") as said:
            assert chosen(small(1 << 12, 1, 1 << 12)) is portable
        assert not library.on_this_machine() or "no compiler" in str(said.call_args)
    finally:
        for cache in caches:
            cache.cache_clear()


def test_the_background_has_the_configuration_of_inductor(unprepared: None) -> None:
    found, done = [], threading.Event()

    def code(dtype: torch.dtype) -> None:
        found.append(config.cpp.cxx)
        done.set()

    with mock.patch.object(library, "compiled", code), config.patch("cpp.cxx", ("a compiler",)):
        library.prepare(torch.float32)
        assert done.wait(10) or not library.on_this_machine()
    assert found == [("a compiler",)] * library.on_this_machine()


def test_every_file_of_the_code_is_compiled() -> None:
    folder = Path(native.__file__).parent
    assert {p.name for p in folder.iterdir() if p.suffix in (".h", ".cpp")} == {*FILES}


@pytest.mark.sample(3)  # a compilation each
@needs_code
@pytest.mark.parametrize("storage", STORAGE.values())
def test_every_step_is_right_without_python(storage: int, tmp_path: Path) -> None:
    """The program that `nox -s aarch64` runs under an emulator, here with this processor's instructions."""
    program = tmp_path / "check_steps"
    flags = ["-march=native", "-fopenmp"]
    here = Path(__file__).parent
    source = ["-I", str(Path(build.__file__).parent), str(here / "check_steps.cpp")]
    compiler = ["g++", "-std=c++17", f"-DSTORAGE={storage}", *build.FLAGS, *flags, *source, "-o", str(program)]
    subprocess.run(compiler, check=True)
    found = subprocess.run([program], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"})
    assert found.returncode == 0 and found.stdout.startswith("0 of "), found.stdout + found.stderr


@needs_code
def test_the_common_loss_takes_one_call_of_the_library() -> None:
    p = small(64, 64, 1000)
    library.prepare(torch.float32)
    with mock.patch.object(native._kernel.__class__, "forward_backward", side_effect=AssertionError):
        native.forward_backward(p, row_grads(p), ALL)
    some = replace(p, target=p.target.where(torch.arange(64) % 3 > 0, -100))
    with pytest.raises(IndexError):
        native.forward_backward(replace(p, target=p.target + 1000), row_grads(p), ALL)
    assert native.forward(some).nll[0] == 0.0


@needs_code
def test_the_common_loss_is_made_again_where_it_is_not_finite() -> None:
    p = small(64, 64, 1000)
    hidden = p.hidden.clone()
    hidden[3, 5] = math.inf
    p = replace(p, hidden=hidden)
    (stats, grads), (expected, wanted) = (
        f(p, row_grads(p), ALL) for f in (native.forward_backward, native._kernel.forward_backward)
    )
    for a, b in zip((*stats, *grads), (*expected, *wanted), strict=True):
        assert a is None or torch.equal(a.isnan(), b.isnan())


@needs_code
@pytest.mark.parametrize("common", [True, False], ids=["the common loss", "another"])
def test_defaults_of_the_program_are_not_the_kernels(common: bool) -> None:
    """Compiled code writes float32 numbers into memory of the CPU, whatever `torch.empty` makes for the program."""
    p = small(64, 64, 1000)
    p = p if common else replace(p, bias=torch.zeros(1000))
    library.prepare(torch.float32)
    expected = native.forward_backward(p, row_grads(p), ALL)
    grads, before = row_grads(p), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"):
            found = native.forward_backward(p, grads, ALL)
    finally:
        torch.set_default_dtype(before)
    for a, b in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
        assert a is b is None or torch.equal(a, b)
