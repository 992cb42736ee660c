# SPDX-License-Identifier: Apache-2.0
"""Inputs that are wrong, odd or extreme: each does what it does in eager, or is refused in words.

The table holds, for each input, whether eager computes something or raises; compiled by cce it must compute the same or
raise as `torch.compile` does with a backend that changes nothing, and `cce_fx.linear_cross_entropy` must compute the same
or raise an error of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cce_fx

from .helpers import Outcome, Watch, assert_no_worse, step

N, D, V = 6, 4, 50
NAN, INF = float("nan"), float("inf")


class Tagged(Tensor):
    """A subclass that does nothing of its own."""


@dataclass(frozen=True)
class Case:
    """An input, and what the three ways of computing its loss do."""

    change: Callable[[dict[str, Any]], dict[str, Any]]  # of the good input
    eager: type[Exception] | None = None  # what eager raises
    function: type[Exception] | str | None = "as eager"  # what cce_fx.linear_cross_entropy raises
    rewritten: bool | None = None  # whether the pass takes the loss; None is either
    loss: dict[str, Any] = field(default_factory=dict)  # arguments of the loss


def good() -> dict[str, Any]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, generator=gen).requires_grad_() for s in ((N, D), (V, D)))
    return {"h": h, "w": w, "y": torch.randint(V, (N,), generator=gen), "b": None, "cw": None}


def to(**made: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Change some of the tensors, with their gradients' flags kept where the result can have one."""

    def change(given: dict[str, Any]) -> dict[str, Any]:
        out = dict(given)
        for name, make in made.items():
            needs = isinstance(given[name], Tensor) and given[name].requires_grad
            with torch.no_grad():
                value = make(given[name].detach() if isinstance(given[name], Tensor) else None)
            if needs and isinstance(value, Tensor) and value.is_floating_point() and value.layout == torch.strided:
                value = value.requires_grad_() if not value.requires_grad else value
            out[name] = value
        return out

    return change


def put(name: str, value: float, at: Any = (1, 2)) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def make(x: Tensor) -> Tensor:
        x = x.clone()
        x[at] = value
        return x

    return to(**{name: make})


def overlapping(rows: int) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.as_strided(x.clone(), (rows, D), (1, 1))


def weights(make: Callable[[], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return to(cw=lambda _: make())


ERROR, NONE = RuntimeError, NotImplementedError
CASES: dict[str, Case] = {
    # dtypes
    "hidden float64": Case(to(h=Tensor.double), ERROR, TypeError, rewritten=False),
    "hidden bfloat16": Case(to(h=Tensor.bfloat16), ERROR, TypeError, rewritten=False),
    "weight bfloat16": Case(to(w=Tensor.bfloat16), ERROR, TypeError, rewritten=False),
    "hidden int64": Case(to(h=Tensor.long), ERROR, TypeError),
    "hidden and weight int64": Case(to(h=Tensor.long, w=Tensor.long), NONE, TypeError),
    "hidden and weight bool": Case(to(h=Tensor.bool, w=Tensor.bool), NONE, TypeError),
    "complex": Case(to(h=lambda x: x.to(torch.complex64), w=lambda x: x.to(torch.complex64)), NONE, TypeError),
    "float8": Case(to(h=lambda x: x.to(torch.float8_e4m3fn), w=lambda x: x.to(torch.float8_e4m3fn)), NONE, TypeError),
    "all float64": Case(to(h=Tensor.double, w=Tensor.double), rewritten=True),
    "targets int32": Case(to(y=Tensor.int), ERROR, TypeError, rewritten=False),
    "targets uint8": Case(to(y=lambda y: y.to(torch.uint8)), None, TypeError, rewritten=False),
    "targets bool": Case(to(y=Tensor.bool), ERROR, TypeError, rewritten=False),
    "targets float": Case(to(y=Tensor.float), ERROR, TypeError, rewritten=False),
    "targets are probabilities": Case(to(y=lambda y: torch.full((N, V), 1 / V)), None, ValueError, rewritten=False),
    "targets are probabilities with a gradient": Case(
        to(y=lambda y: torch.full((N, V), 1 / V).requires_grad_()), None, ValueError, rewritten=False
    ),
    # shapes
    "hidden of another width": Case(to(h=lambda x: x[:, :3]), ERROR, ValueError),
    "fewer targets": Case(to(y=lambda y: y[1:]), ValueError),
    "more targets": Case(to(y=lambda y: torch.cat([y, y])), ValueError),
    "targets in a column": Case(to(y=lambda y: y[:, None]), ERROR, ValueError),
    "one target for all": Case(to(y=lambda y: y[0]), ValueError),
    "weight of one dimension": Case(to(w=lambda w: w[0]), ERROR, ValueError),
    "one row without a batch": Case(to(h=lambda x: x[0], y=lambda y: y[0])),
    "no rows": Case(to(h=lambda x: x[:0], y=lambda y: y[:0])),
    "no width": Case(to(h=lambda x: x[:, :0], w=lambda w: w[:, :0])),
    "no classes": Case(to(w=lambda w: w[:0]), IndexError, ValueError, rewritten=False),
    "no classes and no rows": Case(
        to(w=lambda w: w[:0], h=lambda x: x[:0], y=lambda y: y[:0]), None, ValueError, rewritten=False
    ),
    "one class": Case(to(w=lambda w: w[:1], y=torch.zeros_like)),
    "class weights too short": Case(weights(lambda: torch.ones(V - 1)), ERROR, ValueError, rewritten=False),
    # targets
    "target V": Case(put("y", V, 1), IndexError),
    "target -1": Case(put("y", -1, 1), IndexError),
    "target -101": Case(put("y", -101, 1), IndexError),
    "target huge": Case(put("y", 2**62, 1), IndexError),
    "target least": Case(put("y", -(2**63), 1), IndexError),
    "target ignored": Case(put("y", -100, 1), rewritten=True),
    "target V, ignored": Case(put("y", V, 1), rewritten=True, loss={"ignore_index": V}),
    "all targets ignored": Case(to(y=lambda y: torch.full_like(y, -100)), rewritten=True),
    "targets expanded": Case(to(y=lambda y: y[:1].expand(N)), rewritten=True),
    "targets strided": Case(to(y=lambda y: y.repeat_interleave(2)[::2]), rewritten=True),
    # values
    **{
        f"{value} in {name}": Case(put(name, value), rewritten=True)
        for name in ("h", "w")
        for value in (NAN, INF, -INF, 1e30, 1e-40)
    },
    "huge logits": Case(to(h=lambda x: x * 1e4, w=lambda w: w * 1e4), rewritten=True),
    "logits beyond float32": Case(to(h=lambda x: x.abs() * 1e30, w=lambda w: w.abs() * 1e30), rewritten=True),
    "all NaN": Case(to(h=lambda x: x * NAN), rewritten=True),
    "zeros": Case(to(h=torch.zeros_like, w=torch.zeros_like), rewritten=True),
    "class weights zero": Case(weights(lambda: torch.zeros(V)), rewritten=True),
    "class weights negative": Case(weights(lambda: -torch.ones(V)), rewritten=True),
    "class weights NaN": Case(weights(lambda: torch.full((V,), NAN)), rewritten=True),
    "class weights with a gradient": Case(
        weights(lambda: torch.ones(V, requires_grad=True)), ERROR, ValueError, rewritten=False
    ),
    # memory
    "hidden transposed": Case(to(h=lambda x: x.t().contiguous().t()), rewritten=True),
    "weight transposed": Case(to(w=lambda w: w.t().contiguous().t()), rewritten=True),
    "every other column": Case(to(h=lambda x: x.repeat_interleave(2, 1)[:, ::2], w=lambda w: w.repeat(2, 1)[::2])),
    "hidden expanded": Case(to(h=lambda x: x[:1].expand(N, D)), rewritten=True),
    "weight expanded": Case(to(w=lambda w: w[:1].expand(V, D)), rewritten=True),
    "hidden overlapping": Case(to(h=overlapping(N)), rewritten=True),
    "weight overlapping": Case(to(w=overlapping(V)), rewritten=True),
    "hidden and weight share memory": Case(lambda g: {**g, "h": g["w"][:N]}, rewritten=True),
    "flipped": Case(to(h=lambda x: x.flip(0), w=lambda w: w.flip(1)), rewritten=True),
    # kinds of tensors
    "hidden on meta": Case(to(h=lambda x: x.to("meta")), ERROR),
    "all on meta": Case(
        to(h=lambda x: x.to("meta"), w=lambda w: w.to("meta"), y=lambda y: y.to("meta")), rewritten=False
    ),
    "hidden sparse": Case(to(h=Tensor.to_sparse), None, TypeError, rewritten=False),
    "weight sparse": Case(to(w=Tensor.to_sparse), None, TypeError, rewritten=False),
    "targets sparse": Case(to(y=lambda y: (y + 1).to_sparse()), NONE, TypeError, rewritten=False),
    "weight quantised": Case(
        to(w=lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8)), NONE, TypeError, rewritten=False
    ),
    "weight of a subclass": Case(to(w=lambda w: w.as_subclass(Tagged))),
    "hidden of a subclass": Case(to(h=lambda x: x.as_subclass(Tagged))),
    "weight a parameter": Case(to(w=lambda w: torch.nn.Parameter(w)), rewritten=True),
    # arguments of the loss
    "smoothing of 1": Case(to(), rewritten=True, loss={"label_smoothing": 1.0}),
    "smoothing of 1.5": Case(to(), ERROR, ValueError, rewritten=False, loss={"label_smoothing": 1.5}),
    "smoothing of -0.1": Case(to(), None, ValueError, rewritten=False, loss={"label_smoothing": -0.1}),
    "another reduction": Case(to(), ValueError, ValueError, rewritten=False, loss={"reduction": "average"}),
    "a reduction that is a number": Case(to(), ValueError, ValueError, rewritten=False, loss={"reduction": 3}),
}


def program(given: dict[str, Any], loss: dict[str, Any]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """eager's function of the tensors that are there, and those."""
    names = [n for n in ("h", "w", "y", "b", "cw") if given[n] is not None]

    def run(*tensors: Tensor) -> Tensor:
        t = dict(zip(names, tensors, strict=True))
        return F.cross_entropy(F.linear(t["h"], t["w"], t.get("b")), t["y"], weight=t.get("cw"), **loss)

    return run, [given[n] for n in names]


def outcome(fn: Callable[..., Any], tensors: list[Tensor]) -> Outcome | Exception:
    """Results and gradients, with the tensors' own strides, or the error."""
    for t in tensors:
        if t.is_leaf:
            t.grad = None
    try:
        out = fn(*tensors)
        if out.requires_grad:
            leaves = [t for t in tensors if t.requires_grad]
            grads = list(torch.autograd.grad(out.sum(), leaves, allow_unused=True))
        else:
            grads = []
        return Outcome([out.detach()], grads)
    except Exception as error:
        return error


def kinds(error: BaseException | None) -> set[type]:
    """The types of an error and of what it was raised from."""
    found: set[type] = set()
    while error is not None:
        found.add(type(error))
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return found


def assert_same(name: str, eager: Any, ours: Any, exact: Any) -> None:
    assert isinstance(ours, Outcome), f"{name}: eager computes, and here {type(ours).__name__}: {ours}"
    for number, (a, b, e) in enumerate(zip(eager.results, ours.results, exact.results, strict=True)):
        assert (a is None) == (b is None), (name, number)
        if a is None or b is None:
            continue
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), (name, number)
        if a.device.type != "meta":
            assert_no_worse(f"{name}, result {number}", e, a, b, ulps=64)


def in_double(given: dict[str, Any]) -> dict[str, Any]:
    """The same input in float64, where that is a thing to do."""

    def double(t: Any) -> Any:
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        plain = t.detach().as_subclass(Tensor) if isinstance(t, Tagged) else t.detach()
        return plain.double().requires_grad_(t.requires_grad)

    return {name: double(t) for name, t in given.items()}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", CASES)
def test_compiled(name: str) -> None:
    case = CASES[name]
    given = case.change(good())
    run, tensors = program(given, case.loss)
    eager = outcome(run, tensors)
    assert (None if isinstance(eager, Outcome) else type(eager)) == case.eager, f"eager: {eager!r}"
    torch._dynamo.reset()
    plain = outcome(torch.compile(run, backend="aot_eager"), tensors)
    torch._dynamo.reset()
    watch = Watch()
    ours = outcome(torch.compile(run, backend="cce", options={"inner": watch, "min_vocab": 0}), tensors)
    if case.rewritten is not None:
        assert bool(watch.calls("cce.linear_cross_entropy")) == case.rewritten
    if isinstance(eager, Outcome) and isinstance(plain, Outcome):
        exact = outcome(*program(in_double(given), case.loss))
        # On meta torch.compile itself gives other gradients than eager: none.
        assert_same(name, plain if plain.outputs[0].is_meta else eager, ours, exact)
    elif isinstance(ours, Outcome):
        # torch.compile itself computes something where eager raises, or the other way round.
        assert isinstance(plain, Outcome), f"{name}: computed {ours.outputs}, and eager raises {eager!r}"
        assert_same(name, plain, ours, plain)
    else:
        known = kinds(eager if isinstance(eager, Exception) else None) | kinds(
            plain if isinstance(plain, Exception) else None
        )
        assert kinds(ours) & known, f"{name}: {ours!r}, and eager {eager!r}, and torch.compile {plain!r}"


@pytest.mark.parametrize("strategy", ["grads_in_forward", "recompute"])
@pytest.mark.parametrize("name", CASES)
def test_function(name: str, strategy: str) -> None:
    case = CASES[name]
    given = case.change(good())
    run, tensors = program(given, case.loss)
    eager = outcome(run, tensors)
    names = {"h": "hidden", "w": "weight", "y": "target", "b": "bias", "cw": "class_weight"}
    there = [n for n in names if given[n] is not None]

    def ours(*values: Tensor) -> Tensor:
        arguments = {names[n]: v for n, v in zip(there, values, strict=True)}
        return cce_fx.linear_cross_entropy(**arguments, **case.loss, strategy=strategy)  # type: ignore[arg-type]

    got = outcome(ours, tensors)
    wanted = case.eager if case.function == "as eager" else case.function
    if wanted is None:
        assert_same(name, eager, got, outcome(*program(in_double(given), case.loss)))
    else:
        assert type(got) is wanted, f"{name}: {got!r}"
        assert str(got), "an error without words"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"hidden": None}, TypeError, "hidden is a tensor, not NoneType"),
        ({"weight": [[1.0]]}, TypeError, "weight is a tensor, not list"),
        ({"target": 3}, TypeError, "target is a tensor, not int"),
        ({"bias": 1.0}, TypeError, "bias is a tensor, not float"),
        ({"bias": torch.zeros(V - 1)}, ERROR, "bias has 49 entries for 50 classes"),
        ({"bias": torch.zeros(V, 1)}, ValueError, "bias must be one-dimensional"),
        ({"bias": torch.zeros(V, dtype=torch.int64)}, TypeError, "bias must have the dtype"),
        ({"reduction": None}, ValueError, "reduction is"),
        ({"softcap": 0.0}, ValueError, "softcap is positive"),
        ({"softcap": NAN}, ValueError, "softcap is positive"),
        ({"softcap": INF}, ValueError, "softcap is positive and finite"),
        ({"scale": NAN}, ValueError, "scale and post_scale are finite"),
        ({"post_scale": INF}, ValueError, "scale and post_scale are finite"),
        ({"label_smoothing": NAN}, ValueError, "label_smoothing is within"),
        ({"label_smoothing": "x"}, TypeError, "label_smoothing"),
        ({"ignore_index": 1.5}, TypeError, "ignore_index"),
        ({"scale": "x"}, TypeError, "scale"),
        ({"scale": torch.ones(())}, TypeError, "scale"),
        ({"strategy": "fast"}, ValueError, "strategy is"),
        ({"workspace": 0}, ValueError, "workspace is a positive number"),
        ({"workspace": "1 MB"}, TypeError, "workspace"),
        ({"filter_eps": 1.0}, ValueError, "filter_eps is None, 'auto' or"),
    ],
    ids=str,
)
def test_arguments_of_the_function(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    given = good()
    with pytest.raises(error, match=words):
        cce_fx.linear_cross_entropy(**{"hidden": given["h"], "weight": given["w"], "target": given["y"], **arguments})


@pytest.mark.parametrize(
    "factors", [(NAN,), (INF,), (0.0,), (1e200,), (1e-25, 1e25, 1e-25, 1e-25), (1e20, 1e20, 1e-35)]
)
def test_factors_that_leave_float32(factors: tuple[float, ...]) -> None:
    """One product of them is another number than their products in turn: 0 * inf, say."""

    def run(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = F.linear(h, w)
        for factor in factors:
            z = z * factor
        return F.cross_entropy(z, y)

    given, watch = good(), Watch()
    tensors = [given["h"].detach() * torch.arange(N)[:, None], given["w"], given["y"]]  # a row of zeros in it
    torch._dynamo.reset()
    ours = torch.compile(run, backend="cce", options={"inner": watch, "min_vocab": 0})(*tensors)
    assert watch.calls("cce.linear_cross_entropy") == 0
    torch.testing.assert_close(ours, run(*tensors), equal_nan=True)


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ({"options": {"logitz": "keep"}}, ValueError, "did you mean 'logits'"),
        ({"options": {"logits": 3}}, ValueError, "'logits' is one of"),
        ({"options": {"logits": []}}, ValueError, "'logits' is one of"),
        ({"options": {"workspace": "64 MB"}}, TypeError, "'workspace' is a positive number"),
        ({"options": {"workspace": True}}, TypeError, "'workspace' is a positive number"),
        ({"options": {"workspace": NAN}}, ValueError, "'workspace' is a positive number"),
        ({"options": {"min_vocab": -1}}, ValueError, "'min_vocab' is a number of classes"),
        ({"options": {"min_vocab": "all"}}, TypeError, "'min_vocab' is a number of classes"),
        ({"options": {"filter_eps": 1.0}}, ValueError, "'filter_eps' is None, 'auto' or"),
        ({"options": {"filter_eps": "x"}}, TypeError, "'filter_eps' is None, 'auto' or"),
        ({"options": {"strict": 1}}, ValueError, "'strict' is True or False"),
        ({"options": {"inner": 3}}, ValueError, "'inner' is a backend's name"),
        ({"options": {"inner": None}}, TypeError, "'inner' is a backend's name"),
        ({"options": {"inner": "cce"}}, ValueError, "cannot be 'cce' itself"),
        ({"options": {"inner": "nothing"}}, Exception, "nothing"),
        ({"options": {"inner": "eager", "max_autotune": True}}, ValueError, "no others have a meaning"),
        ({"options": {3: 4}}, TypeError, "named by strings"),
        ({"options": [("logits", "keep")]}, TypeError, "options is a dictionary"),
        ({"mode": "fastest"}, Exception, "fastest"),
    ],
    ids=str,
)
def test_options_of_the_backend(how: dict[str, Any], error: type[Exception], words: str) -> None:
    torch._dynamo.reset()
    given = good()
    run, tensors = program(given, {})
    with pytest.raises(Exception, match=words) as caught:
        torch.compile(run, backend="cce", **how)(*tensors)
    assert error in kinds(caught.value) or error is Exception, kinds(caught.value)
    torch._dynamo.reset()  # and the next one is no worse for it
    torch.testing.assert_close(torch.compile(run, backend="cce", options={"inner": "eager"})(*tensors), run(*tensors))


class Broken(Exception):
    """What a backend under test raises."""


def raises(gm: Any, inputs: Any) -> Any:
    raise Broken("on purpose")


def raises_later(gm: Any, inputs: Any) -> Any:
    def call(*args: Any) -> Any:
        raise Broken("on purpose")

    return call


def with_logits(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


@pytest.mark.parametrize("inner", [raises, raises_later, lambda gm, inputs: None], ids=["raises", "later", "None"])
@pytest.mark.parametrize("logits", ["lazy", "keep"])
def test_a_broken_inner_backend_is_told(inner: Any, logits: str) -> None:
    tensors = [good()[n] for n in "hwy"]
    errors = []
    for backend, options in ((inner, None), ("cce", {"inner": inner, "min_vocab": 0, "logits": logits})):
        torch._dynamo.reset()
        with pytest.raises(Exception) as caught:
            torch.compile(with_logits, backend=backend, options=options)(*tensors)
        errors.append(caught.value)
    if Broken in kinds(errors[0]):
        assert Broken in kinds(errors[1]) and "on purpose" in str(errors[1])
    else:
        assert "returned NoneType, not a callable" in str(errors[1])
    torch._dynamo.reset()
    got = torch.compile(with_logits, backend="cce", options={"inner": "eager", "min_vocab": 0})(*tensors)
    for a, b in zip(got, with_logits(*tensors), strict=True):
        torch.testing.assert_close(a + 0, b)


def test_results_do_not_alias_the_inputs() -> None:
    """Writing into a gradient must not change a weight, nor the other way round."""
    h, w, y = (good()[n] for n in "hwy")
    before = w.detach().clone()
    out = step(lambda *t: cce_fx.linear_cross_entropy(*t), [h, w, y])
    for g in out.grads:
        if g is not None:
            g.fill_(7)
    assert torch.equal(w.detach(), before)
