# SPDX-License-Identifier: Apache-2.0
"""The options of `torch.compile(model, backend="cce", options={...})`."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from .functional import is_filter
from .passes.policy import Policy

_CHOICES = {
    "logits": ("lazy", "keep"),
    "after_step": ("as_before", "error"),
    "strategy": ("auto", "grads_in_forward", "recompute"),
    "tiers": ("all", "kernel"),
}


@dataclass(frozen=True)
class Options:
    """What the backend does beside inductor's own options, which pass through.

    Attributes:
        logits: "lazy" hands out `LazyLogits` for logits that the program returns and that nothing else in the graph
            reads; "keep" computes them as before.
        after_step: what lazy logits that are read after an optimizer's step give: "as_before", their values from before it, for
            which a copy of the head's weights is taken at the step while unread logits are alive; or "error".
        filter_eps: None is exact; otherwise the largest part of a row's softmax that the gradients may replace by an
            estimate, in [0, 1), or "auto"; see `cce_fx.linear_cross_entropy`.
        strategy: "grads_in_forward", "recompute", or "auto".
        workspace: bytes that a kernel may hold beyond its results; None is the kernel's default.
        inner: the backend that compiles the rewritten graph: "inductor", any other name that `torch.compile` knows,
            or a callable `(gm, example_inputs) -> callable`.
        strict: raise if a graph holds a loss and none of its losses was rewritten.
        min_vocab: heads with fewer classes are left alone; None is max(hidden size, 32) + 1, 0 is never.
        tiers: "kernel" cuts only the losses that the kernels know; "all" also runs others some rows at a time.

    Raises:
        TypeError, ValueError: a value of the wrong type or outside its choices.
    """

    logits: Literal["lazy", "keep"] = "lazy"
    after_step: Literal["as_before", "error"] = "as_before"
    filter_eps: float | Literal["auto"] | None = None
    strategy: Literal["auto", "grads_in_forward", "recompute"] = "auto"
    workspace: int | None = None
    inner: str | Callable[..., Any] = "inductor"
    strict: bool = False
    min_vocab: int | None = None
    tiers: Literal["all", "kernel"] = "all"

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(
                    f"option {name!r} is one of {', '.join(map(repr, choices))}, not {value!r}{_hint(value, choices)}"
                )
        _expect("workspace", self.workspace, "a positive number of bytes or None", _is_count(self.workspace, 1))
        _expect("min_vocab", self.min_vocab, "a number of classes or None", _is_count(self.min_vocab, 0))
        _expect("filter_eps", self.filter_eps, "None, 'auto' or a number in [0, 1)", is_filter(self.filter_eps))
        _expect("strict", self.strict, "True or False", isinstance(self.strict, bool))
        good = callable(self.inner) or isinstance(self.inner, str)
        _expect("inner", self.inner, "a backend's name or a callable (gm, example_inputs) -> callable", good)
        if self.inner == "cce":
            raise ValueError("option 'inner' is the backend that compiles after cce; it cannot be 'cce' itself")

    @property
    def policy(self) -> Policy:
        return Policy(
            self.strategy, self.min_vocab, self.workspace, self.filter_eps, self.tiers, self.inner == "inductor"
        )


def split(options: dict[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options, and those that go on to inductor.

    Raises:
        ValueError: a name that neither knows, with the nearest that one of them does.
        TypeError: options that are no dictionary, or a name that is no string.
    """
    if options is not None and not isinstance(options, Mapping):
        raise TypeError(f"options is a dictionary of names and values, not {type(options).__name__}")
    given = dict(options or {})
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"options are named by strings, not {name!r}")
    names = [f.name for f in fields(Options)]
    ours = Options(**{name: given.pop(name) for name in names if name in given})
    if given and ours.inner == "inductor":
        from ._torch import inductor_config

        known = inductor_config.get_config_copy()
        for name in given:
            if name.replace("-", "_") not in known:
                raise ValueError(
                    f"unknown option {name!r}{_hint(name, [*names, *known])}; "
                    f"cce's options are {', '.join(names)}, and inductor's go on to inductor"
                )
    elif given:
        name = next(iter(given))
        raise ValueError(
            f"unknown option {name!r}{_hint(name, names)}; cce's options are {', '.join(names)}, "
            f"and with inner={ours.inner!r} no others have a meaning"
        )
    return ours, given


def _hint(value: Any, choices: Any) -> str:
    close = difflib.get_close_matches(str(value), [str(c) for c in choices], 1, 0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _is_count(value: Any, least: int) -> bool:
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)


def _expect(name: str, value: Any, what: str, good: bool) -> None:
    if not good:
        kind = ValueError if isinstance(value, (int, float)) and not isinstance(value, bool) else TypeError
        raise kind(f"option {name!r} is {what}, not {value!r}")
