# SPDX-License-Identifier: Apache-2.0
"""Arguments drawn at random, good and bad, for the public functions: no crash, and no wrong answer without an error.

`CCE_FX_FUZZ` is how many are drawn (500); `-m slow` draws `CCE_FX_FUZZ_MANY` of them (20,000).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import cce_fx
from cce_fx import Options
from cce_fx.options import split
from tests.helpers import assert_all
from tests.selection import shares

FEW, MANY = int(os.environ.get("CCE_FX_FUZZ", "500")), int(os.environ.get("CCE_FX_FUZZ_MANY", "20000"))
SEED = int(os.environ.get("CCE_FX_SEED", "0"))
CLEAR = (TypeError, ValueError, RuntimeError, IndexError)
NAN, INF = float("nan"), float("inf")
few = settings(
    deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.explicit, Phase.generate]
)
# (of the 500) calls of the function, compiled programs, options
SHARES = (0.86, 0.06, 0.08)

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "offset": lambda x: torch.cat([x, x])[x.shape[0] :],
}
FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": lambda x: x * 0,
    "large": lambda x: x * 30,
    "tiny": lambda x: x * 1e-30,
    "nan": lambda x: x.index_fill(0, torch.tensor([0]), NAN) if len(x) else x,
    "inf": lambda x: x.index_fill(0, torch.tensor([0]), INF) if len(x) else x,
}
good_or = lambda good, *bad: st.one_of(*[st.sampled_from(good)] * 9, st.sampled_from(bad))  # noqa: E731


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `linear_cross_entropy`; most of them are good."""
    rows = draw(st.sampled_from([(5,), (2, 3), (1,), (0,), (), (17,)]))
    width, classes = draw(st.integers(0, 6)), draw(st.integers(1, 24))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(good_or([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16], torch.int64))
    fill = FILLS[draw(good_or(["normal"], *FILLS))]

    def tensor(*shape: int) -> Tensor:
        values = fill(torch.randn(shape, generator=gen, dtype=torch.float64)).to(dtype)
        values = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))](values) if values.numel() and shape else values
        return values.detach().requires_grad_(dtype.is_floating_point and draw(st.booleans()))

    target = torch.randint(classes, rows, generator=gen)
    ignore = draw(st.sampled_from([-100, -100, -1, 0, classes, 2**40]))
    if target.numel() and draw(st.booleans()):
        target.view(-1)[0] = ignore
    if target.numel() and draw(good_or([False], True)):
        target.view(-1)[-1] = draw(st.sampled_from([classes, -1, -7, 2**50, -(2**63)]))
    target = draw(
        good_or(
            [lambda y: y], Tensor.int, Tensor.float, lambda y: y[..., None], lambda y: torch.cat([y.reshape(-1)] * 2)
        )
    )(target)
    found = {
        "hidden": tensor(*rows, width),
        "weight": tensor(classes, draw(good_or([width], width + 1))),
        "target": target,
        "ignore_index": ignore,
        "reduction": draw(good_or(["mean", "sum", "none"], "avg", None)),
        "label_smoothing": draw(good_or([0.0, 0.0, 0.1, 1.0], 1.5, -0.5, NAN)),
        "scale": draw(good_or([1.0, 0.5, -2, 0.0], NAN, "1")),
        "post_scale": draw(good_or([1.0, 0.5], None)),
        "softcap": draw(good_or([None, None, 5.0], 0.0, -1.0)),
        "strategy": draw(good_or(["auto", "grads_in_forward", "recompute"], "best")),
        "workspace": draw(good_or([None, 1, 4096, 1 << 20], 0, -5, 2.5)),
        "filter_eps": draw(good_or([None, 0.0], 1.0, -0.1, "all")),
    }
    if draw(st.booleans()):
        found["bias"] = tensor(draw(good_or([classes], classes + 1)))
    if draw(st.booleans()):
        size = draw(good_or([classes], classes - 1))
        found["class_weight"] = torch.rand(size, generator=gen).requires_grad_(draw(good_or([False], True)))
    return found


def dense(call: dict[str, Any], dtype: torch.dtype | None = None) -> Tensor:
    """The same loss from the logits, in `dtype` where one is given."""
    h, w, b, cw = (call.get(n) for n in ("hidden", "weight", "bias", "class_weight"))
    if dtype is not None:
        h, w, b, cw = (None if t is None else t.to(dtype) for t in (h, w, b, cw))
    assert h is not None and w is not None
    z = F.linear(h, w, b)
    z = z.float() if z.dtype in (torch.float16, torch.bfloat16) else z
    z = z * call["scale"]
    if call["softcap"] is not None:
        z = call["softcap"] * torch.tanh(z / call["softcap"])
    z = (z * call["post_scale"]).reshape(call["target"].numel(), w.shape[0])
    cw = None if cw is None else cw.to(z.dtype)
    loss = F.cross_entropy(
        z, call["target"].reshape(-1), weight=cw, ignore_index=call["ignore_index"], reduction=call["reduction"],
        label_smoothing=call["label_smoothing"],
    )  # fmt: skip
    return loss.view(call["target"].shape) if call["reduction"] == "none" else loss


def results(fn: Callable[[dict[str, Any]], Tensor], call: dict[str, Any]) -> list[Tensor | None] | Exception:
    """Loss and gradients, or the error."""
    leaves = [t for t in call.values() if isinstance(t, Tensor) and t.requires_grad]
    try:
        out = fn(call)
        grads = torch.autograd.grad(out.sum(), leaves, allow_unused=True) if out.requires_grad else [None] * len(leaves)
        return [out.detach(), *grads]
    except CLEAR as error:
        return error


def check_call(call: dict[str, Any]) -> None:
    ours = results(lambda c: cce_fx.linear_cross_entropy(**c), call)
    if isinstance(ours, Exception):
        assert str(ours), f"{type(ours).__name__} without words"
        assert isinstance(results(dense, call), Exception) or is_refused(call), f"refused without a reason: {ours}"
        return
    eager = results(dense, call)
    assert not isinstance(eager, Exception), f"computed, and eager raises {eager}"
    assert_near(call, eager, ours)


def assert_near(call: dict[str, Any], eager: list[Tensor | None], ours: list[Tensor | None]) -> None:
    """As near to float64 as twice eager's error and what the size of the numbers makes of a rounding."""
    exact = results(lambda c: dense(c, torch.float64), call)
    assert not isinstance(exact, Exception), exact
    size = max([1.0, *(float(t.detach().abs().nan_to_num(0, 0, 0).max()) for t in call.values() if is_some(t))])
    eps = torch.finfo(call["hidden"].dtype).eps if call["hidden"].is_floating_point() else 0.0
    for number, (a, e, b) in enumerate(zip(exact, eager, ours, strict=True)):
        assert (e is None) == (b is None), f"result {number}: {b}, and eager {e}"
        if a is None or b is None or e is None:
            continue
        assert a.shape == b.shape, f"result {number}"
        assert torch.equal(a.isnan(), b.isnan()) or torch.equal(e.isnan(), b.isnan()), f"result {number}: NaN elsewhere"
        both = a.isfinite() & b.isfinite() & e.isfinite()
        bound = 2 * (e[both] - a[both]).abs().double() + 256 * eps * size**2 * (1 + a[both].abs().double())
        assert bool(((a[both].double() - b[both].double()).abs() <= bound).all()), f"result {number}: {b} is not {a}"


def is_some(t: Any) -> bool:
    return isinstance(t, Tensor) and t.is_floating_point() and t.numel() > 0


def is_refused(call: dict[str, Any]) -> bool:
    """What eager computes and the function refuses, as its docstring says."""
    types = {call["hidden"].dtype, call["weight"].dtype} | ({call["bias"].dtype} if "bias" in call else set())
    cw = call.get("class_weight")
    return (
        len(types) > 1
        or not call["hidden"].is_floating_point()
        or call["target"].dtype != torch.int64
        or call["target"].shape != call["hidden"].shape[:-1]
        or (cw is not None and cw.requires_grad)
        or not 0 <= call["label_smoothing"] <= 1
        or (call["softcap"] is not None and not call["softcap"] > 0)
        or not math.isfinite(call["scale"])
        or call["strategy"] == "best"
        or call["workspace"] in (0, -5, 2.5)
        or call["filter_eps"] not in (None, 0.0)
    )


def check_compiled(call: dict[str, Any]) -> None:
    """The program `dense` on the same arguments, compiled: eager's results, or an error where eager has one."""
    torch._dynamo.reset()
    compiled = torch.compile(dense, backend="cce", options={"inner": "eager", "min_vocab": 0})
    try:
        ours: Any = results(compiled, call)
    except torch._dynamo.exc.TorchDynamoException as error:  # its own wrapping of what a fake tensor raised
        ours = error
    eager = results(dense, call)
    assert isinstance(ours, Exception) == isinstance(eager, Exception), f"{ours}, and eager {eager}"
    if isinstance(ours, Exception) or isinstance(eager, Exception):
        return
    assert_near(call, eager, ours)


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=2),
    st.sampled_from(["lazy", "keep", "auto", "recompute", "eager", "inductor", 0.1, 1 << 20]), st.just(print),
)  # fmt: skip
NAMES = st.one_of(
    st.sampled_from(["logits", "filter_eps", "strategy", "workspace", "inner", "strict", "min_vocab", "max_autotune"]),
    st.text(max_size=8), st.integers(),
)  # fmt: skip


def check_options(options: Any) -> None:
    """Taken apart into ours and inductor's, or refused in words."""
    try:
        ours, rest = split(options)
    except (TypeError, ValueError) as error:
        assert str(error)
        return
    assert isinstance(ours, Options) and all(getattr(ours, k, rest.get(k)) is v for k, v in (options or {}).items())


def counts(total: int) -> list[int]:
    return [max(1, round(share * total)) for share in SHARES]


@given(calls())
@settings(few, max_examples=counts(FEW)[0])
def test_calls(call: dict[str, Any]) -> None:
    check_call(call)


@given(calls())
@settings(few, max_examples=counts(FEW)[1])
def test_compiled(call: dict[str, Any]) -> None:
    check_compiled(call)


@given(st.one_of(st.dictionaries(NAMES, ANYTHING, max_size=3), ANYTHING))
@settings(few, max_examples=counts(FEW)[2])
def test_options(options: Any) -> None:
    check_options(options)


@pytest.mark.parametrize("share", shares(MANY, 2000))
def test_many(share: tuple[int, int]) -> None:
    """20,000 in all; every one that fails is told, and not the first alone."""
    at, count = share
    kinds: list[tuple[Any, Callable[[Any], None]]] = [
        (calls(), check_call),
        (calls(), check_compiled),
        (st.one_of(st.dictionaries(NAMES, ANYTHING, max_size=3), ANYTHING), check_options),
    ]
    for (strategy, check), examples in zip(kinds, counts(count), strict=True):
        assert_all(check, strategy, settings(few, max_examples=examples, derandomize=False), SEED + at)
