# SPDX-License-Identifier: Apache-2.0
"""Losses that no kernel knows, run some rows at a time: the same numbers as eager, and the logits gone."""

from __future__ import annotations

import copy
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

import cce_fx
from cce_fx import row_op
from cce_fx.functional import Output, RowProgram
from cce_fx.passes.programs.runs import runs_alike
from tests import row_losses
from tests.helpers import assert_no_worse
from tests.row_losses import LOSSES, MIXED, Data, Heads, Loss, data
from tests.row_programs import Program, draw
from tests.row_programs import outcome as outcome_of
from tests.selection import shares

OPTIONS = {"inner": "aot_eager", "min_vocab": 0, "logits": "keep"}


def outcome(loss: Loss, heads: Heads, given: Data, compiled: Any = None) -> list[Tensor | None]:
    """What a loss returns, and its gradients with respect to the input and every parameter."""
    for p in heads.parameters():
        p.grad = None
    given.x.grad = None
    out = (compiled or loss)(heads, given)
    found = list(out) if isinstance(out, tuple) else [out]
    sum(o.sum() for o in found if o.requires_grad).backward()
    return [*(o.detach() for o in found), given.x.grad, *(p.grad for p in heads.parameters())]


def check(loss: Loss, given: Data, heads: Heads, compiled: Any) -> None:
    exact = outcome(loss, copy.deepcopy(heads).double(), given.to(torch.float64))
    eager, ours = (outcome(loss, heads, given.to(given.x.dtype), run) for run in (None, compiled))
    for number, values in enumerate(zip(exact, eager, ours, strict=True)):
        assert_no_worse(f"{loss.__name__}, result {number}", *values, ulps=64)


@pytest.fixture
def heads() -> Heads:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Heads()


@pytest.mark.sample(3)
@pytest.mark.parametrize("strategy", ["auto", "recompute"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_the_rows_is_cut_and_right(name: str, strategy: str, heads: Heads) -> None:
    loss, given = LOSSES[name], data()
    report = cce_fx.explain(loss, heads, given, options=cce_fx.Options(**OPTIONS))
    assert report.rewritten and all(r.logits == "unused" for r in report.rewritten), report
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="cce", options={**OPTIONS, "strategy": strategy})
    check(loss, given, heads, compiled)


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", LOSSES)
def test_rows_of_any_number(name: str, heads: Heads) -> None:
    if "B" in LOSSES[name].__code__.co_names:
        pytest.skip("its sizes are fixed")
    compiled = torch.compile(LOSSES[name], backend="cce", options=OPTIONS, dynamic=True)
    for n in (24, 7, 33):
        check(LOSSES[name], data(n, n), heads, compiled)


@pytest.mark.parametrize("name", MIXED)
def test_a_loss_that_mixes_rows_is_left_alone_or_right(name: str, heads: Heads) -> None:
    check(MIXED[name], data(), heads, torch.compile(MIXED[name], backend="cce", options=OPTIONS))


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", MIXED)
def test_the_same_at_lengths_that_change(name: str, heads: Heads) -> None:
    if {"B", "N"} & set(MIXED[name].__code__.co_names):
        pytest.skip("its sizes are fixed")
    compiled = torch.compile(MIXED[name], backend="cce", options=OPTIONS, dynamic=True)
    for n in (24, 7):
        check(MIXED[name], data(n, n), heads, compiled)


@pytest.mark.parametrize("workspace", [1, 1 << 12, None])
def test_any_workspace(workspace: int | None, heads: Heads) -> None:
    loss = LOSSES["kl_distillation"]
    check(loss, data(), heads, torch.compile(loss, backend="cce", options={**OPTIONS, "workspace": workspace}))


def test_a_block_compiled_by_inductor(heads: Heads) -> None:
    loss = LOSSES["cross_entropy_with_entropy"]
    check(loss, data(), heads, torch.compile(loss, backend="cce", options={"min_vocab": 0}))


def test_left_alone_where_only_kernels_are_wanted(heads: Heads) -> None:
    report = cce_fx.explain(LOSSES["focal"], heads, data(), options=cce_fx.Options(**OPTIONS, tiers="kernel"))
    assert not report.rewritten


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_results_that_are_part_of_the_logits(inner: str, heads: Heads) -> None:
    """Gradients take the place of a block's logits, which the results must not follow."""

    def loss(heads: Heads, d: Data) -> tuple[Tensor, Tensor]:
        z = heads.s(d.x)
        return (z.softmax(-1) * z.tanh()).sum(-1).mean(), z[:, 3] * 1

    check(loss, data(), heads, torch.compile(loss, backend="cce", options={**OPTIONS, "inner": inner}))


def test_a_block_that_cannot_be_compiled_in_place_is_compiled_otherwise(
    heads: Heads, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_, tried = torch._inductor.compile, []

    def refused(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        tried.append(any(n.target is torch.ops.aten.copy_.default for n in gm.graph.nodes))
        if tried[-1]:
            raise torch._inductor.exc.InductorError(KeyError("buf1"), None)
        return compile_(gm, inputs)

    monkeypatch.setattr("cce_fx._torch.inductor_compile", refused, raising=False)
    loss = LOSSES["cross_entropy_with_entropy"]
    row_op._compiled.cache_clear()
    check(loss, data(), heads, torch.compile(loss, backend="cce", options={"min_vocab": 0, "logits": "keep"}))
    assert tried == [True, False]


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_shared_tensors_of_any_strides(inner: str, heads: Heads) -> None:
    columns = torch.randn(6, heads.s.out_features).double()

    def loss(heads: Heads, d: Data) -> Tensor:
        z = heads.s(d.x)
        return (z.softmax(-1) @ columns.to(z.dtype).T).pow(2).sum(-1).mean()

    check(loss, data(), heads, torch.compile(loss, backend="cce", options={**OPTIONS, "inner": inner}))


@pytest.mark.parametrize("strategy", ["auto", "recompute"])
def test_a_mean_over_no_row_has_no_gradient(strategy: str, heads: Heads) -> None:
    def loss(heads: Heads, d: Data) -> Tensor:
        return F.cross_entropy(heads.b(d.x).relu(), torch.full_like(d.y, -100))

    compiled = torch.compile(loss, backend="cce", options={**OPTIONS, "strategy": strategy})
    eager, ours = (outcome(loss, heads, data(), run) for run in (None, compiled))
    for a, b in zip(eager, ours, strict=True):
        assert (a is None and b is None) or torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def products_of(loss: Loss, heads: Heads, **options: Any) -> tuple[list[str], int]:
    """The tiers of what is cut, and how many of the head's products a step takes, each 2NDV operations."""
    given, n = data(), 0
    report = cce_fx.explain(loss, heads, given, options=cce_fx.Options(**{**OPTIONS, **options}))
    for r in report.rewritten:
        n += 3 if r.strategy == "grads_in_forward" else 4
    return [r.tier for r in report.rewritten], n


def with_z_loss(heads: Heads, d: Data) -> Tensor:
    z = heads.b(d.x)
    return F.cross_entropy(z, d.y) + 1e-2 * z.logsumexp(-1).square().mean()


def with_entropy(heads: Heads, d: Data) -> Tensor:
    z = heads.b(d.x)
    return F.cross_entropy(z, d.y) + 0.1 * (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()


def with_distillation(heads: Heads, d: Data) -> Tensor:
    z, t = heads.b(d.x), heads.t(d.e)
    return F.cross_entropy(z, d.y) + F.kl_div(z.log_softmax(-1), t.softmax(-1), reduction="batchmean")


@pytest.mark.parametrize("loss", [with_z_loss, with_entropy, with_distillation])
def test_what_would_take_several_programs_of_a_head_is_one(loss: Loss, heads: Heads) -> None:
    assert products_of(loss, heads, inner="inductor") == (["rows"], 3)
    torch._dynamo.reset()
    check(loss, data(), heads, torch.compile(loss, backend="cce", options={**OPTIONS, "inner": "inductor"}))


def test_a_program_that_is_not_compiled_leaves_losses_to_the_kernels(heads: Heads) -> None:
    assert products_of(with_z_loss, heads, inner="aot_eager") == (["kernel", "kernel"], 7)


def with_metrics(heads: Heads, d: Data) -> tuple[Tensor, Tensor, Tensor]:
    z = heads.b(d.x)
    with torch.no_grad():
        accuracy, mean = (z.argmax(-1) == d.y).float().mean(), z.mean()
    return F.cross_entropy(z, d.y), accuracy, mean


def test_a_kernel_keeps_a_loss_with_metrics_beside_it(heads: Heads) -> None:
    report = cce_fx.explain(with_metrics, heads, data(), options=cce_fx.Options(**OPTIONS))
    assert [(r.tier, r.logits) for r in report.rewritten] == [("kernel", "unused")]
    torch._dynamo.reset()
    check(with_metrics, data(), heads, torch.compile(with_metrics, backend="cce", options=OPTIONS))


def test_losses_that_cannot_be_one_program_stay_the_kernels(heads: Heads) -> None:
    """Those of another head as well, which would be one."""

    def loss(heads: Heads, d: Data) -> Tensor:
        z = heads.b(d.x)
        mixed = (z.softmax(0) * z.softmax(1)).square().mean()
        other = F.cross_entropy(heads.s(d.x), d.y)
        return F.cross_entropy(z, d.y) + 1e-2 * z.logsumexp(-1).square().mean() + mixed + other

    report = cce_fx.explain(loss, heads, data(), options=cce_fx.Options(**{**OPTIONS, "inner": "inductor"}))
    assert [r.tier for r in report.rewritten] == ["kernel", "kernel"]
    torch._dynamo.reset()
    check(loss, data(), heads, torch.compile(loss, backend="cce", options=OPTIONS))


def test_layers_of_a_model_are_no_row_programs() -> None:
    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 8))
    report = cce_fx.explain(lambda x: model(x).pow(2).mean(), torch.randn(64, 8), options=cce_fx.Options(**OPTIONS))
    assert {r.classes for r in report.rewritten} <= {8}, "the last, whose numbers are summed up"


@pytest.mark.parametrize("early", [False, True])
def test_operators(early: bool) -> None:
    code = (
        ("aten.mul.Tensor", [{"head": 0}, {"row": 0}], {}),
        ("aten.logsumexp.default", [{"made": [0, None]}, [0]], {}),
    )
    program = RowProgram(code, (Output({"made": [1, None]}, (), "float32", True),)).text()
    hidden, weight = torch.randn(20, 4, requires_grad=True), torch.randn(30, 4, requires_grad=True)
    rows = torch.rand(20, requires_grad=True)
    if early:
        needs = [True, True, True]
        given = ([hidden], [weight], [rows], [], [torch.rand(20)], needs, program, None, False)
        torch.library.opcheck(torch.ops.cce.rows_with_grads.default, given)
    else:
        torch.library.opcheck(torch.ops.cce.rows.default, ([hidden], [weight], [rows], [], program, None, False))
    want = torch.logsumexp((hidden @ weight.T) * rows[:, None], -1)
    (got,) = torch.ops.cce.rows([hidden], [weight], [rows], [], program, None, False)
    torch.testing.assert_close(got, want)


def test_only_runs_that_do_the_same_are_alike() -> None:
    a, b = (torch.empty(4, 6, device="meta") for _ in range(2))

    def key(function: Any, *args: Any) -> Any:
        return runs_alike(function, args, {}, [t for t in args if isinstance(t, Tensor)])

    assert key(torch.mul, a, 2.0) == key(torch.mul, b, 2.0) is not None
    assert key(torch.mul, a, 0.0) != key(torch.mul, a, -0.0)
    assert key(torch.mul, a, 1) != key(torch.mul, a, True)
    assert key(torch.mul, a, a) != key(torch.mul, a, b)
    assert key(torch.mul, a, b.t().contiguous().t()) != key(torch.mul, a, b)
    assert key(operator.getitem, a, [0, 1]) is None or key(operator.getitem, a, [0, 1]) != key(
        operator.getitem, a, (0, 1)
    )
    assert key(torch.mul, a, torch.ones(())) is None, "whose number it may look at"
    assert key(lambda t: t, a) is None, "which may look at anything"


def the_same_operations_many_times(h: Heads, d: Data) -> Tensor:
    """With other numbers, and with one tensor in the place of two."""
    z = h.s(d.x)
    for number in (2.0, 0.5, 2.0):
        z = torch.mul(z, number).tanh().view(-1, z.size(-1))
        z = torch.where(z > 0.1, z, z.neg()) + torch.sub(z, z.amax(-1, keepdim=True)) * torch.mul(z, z)
    return z.softmax(-1).square().sum(-1).mean()


def test_operations_that_were_noted_before(heads: Heads) -> None:
    loss = the_same_operations_many_times
    report = cce_fx.explain(loss, heads, data(), options=cce_fx.Options(**OPTIONS))
    assert [(r.tier, r.logits) for r in report.rewritten] == [("rows", "unused")]
    torch._dynamo.reset()
    check(loss, data(), heads, torch.compile(loss, backend="cce", options=OPTIONS))


def test_the_losses_differ_from_each_other() -> None:
    """Two of one name would hide each other."""
    source = Path(row_losses.__file__).read_text()
    assert len(LOSSES) + len(MIXED) == source.count("\n@loss") + source.count("\n@mixed")


def double(inputs: list[Tensor]) -> list[Tensor]:
    return [t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t for t in inputs]


def check_drawn(program: Program) -> bool:
    """Whether a drawn program was cut; its loss, metrics and gradients are those of eager, within eager's own error."""
    torch._dynamo.reset()
    counters.clear()
    model, inputs = program.model(), program.inputs()
    compiled = torch.compile(program.__call__, backend="cce", options=OPTIONS)
    ours = outcome_of(compiled, model, inputs)
    eager, exact = (
        outcome_of(program, model, inputs),
        outcome_of(program, copy.deepcopy(model).double(), double(inputs)),
    )

    def nearby(number: int) -> float:
        """Eager's error on inputs that differ by less than a rounding of bfloat16."""
        found = [0.0]
        for seed in range(3):
            torch.manual_seed(seed)
            other = [
                (t.detach() * (1 + 2**-8 * torch.rand_like(t))).requires_grad_(t.requires_grad)
                if t.is_floating_point()
                else t
                for t in inputs
            ]
            a, e = (
                outcome_of(program, model, other)[number],
                outcome_of(program, model_in_double, double(other))[number],
            )
            if a is not None and e is not None and a.is_floating_point():
                found.append(float((a.double() - e).abs().nan_to_num().max()))
        return max(found)

    model_in_double = copy.deepcopy(model).double()
    # Gradients that are zero but for rounding are rounded like the others.
    size = max(float(t.abs().nan_to_num(0, 0, 0).max()) for t in exact if t is not None and t.is_floating_point())
    for number, (e, a, o) in enumerate(zip(exact, eager, ours, strict=True)):
        if a is not None and not a.isfinite().all():
            continue  # a program without a meaning
        if program.dtype == torch.bfloat16 and program.metrics and number in (1, 2):
            continue  # the largest class, or a rank, of numbers that a rounding makes equal
        if program.dtype == torch.bfloat16 and number and any(s.name == "top" for s in program.steps):
            continue  # which of such numbers is among the largest, and gets their gradient
        assert_no_worse(f"result {number}", e, a, o, 64, max(size, 1.0) / 64, nearby=lambda n=number: nearby(n))
    return bool(counters["cce_fx"]["rewritten"])


def check_all(seeds: range, *, mixes: bool) -> None:
    wrong = []
    for seed in seeds:
        try:
            assert check_drawn(draw(seed, mixes=mixes)) or mixes, "not cut"
        except Exception as error:
            wrong.append(f"{seed}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)} of them:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("mixes", [False, True], ids=["by rows", "that mix rows"])
def test_some_random_programs(mixes: bool) -> None:
    check_all(range(12), mixes=mixes)


@pytest.mark.parametrize("share", shares(5000, 250))
def test_random_row_programs_are_cut_and_right(share: tuple[int, int]) -> None:
    at, count = share
    check_all(range(1000 + at * 250, 1000 + at * 250 + count), mixes=False)


@pytest.mark.parametrize("share", shares(2000, 250))
def test_random_programs_that_mix_rows_are_declined_or_right(share: tuple[int, int]) -> None:
    at, count = share
    check_all(range(1000 + at * 250, 1000 + at * 250 + count), mixes=True)
