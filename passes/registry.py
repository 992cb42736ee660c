# SPDX-License-Identifier: Apache-2.0
"""The rules: one operation, one rule.

A rule is a function `(call: Call) -> LogitsView | Candidate | Decline | None` registered under the operation's
canonical name, or under a callable of your own:

    @rule("contiguous")
    def contiguous(call):
        view = call.view()
        return view and view.at(call.node)

It is called for every node of that operation that reads a view, with `begins=True` for every other one as well: a linear
layer's rule. It returns what the node equals, a loss it found, a reason why a view ends here, or None where the node has
nothing to do with a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .._torch import OpOverload
from .values import Candidate, Decline, Form, LogitsView, OwnReason, Reason, value_of

Outcome = LogitsView | Candidate | Decline | None
Rule = Callable[["Call"], Outcome]
RULES: dict[Any, Rule] = {}
BEGINNERS: set[Any] = set()  # operations whose rules need no view
# Forms that hold nothing but rows of classes, so that rows can be moved about; the others carry a shift or a target along.
WHOLE = (Form.LOGITS, Form.LOG_SOFTMAX, Form.NEG_LOG_SOFTMAX, Form.SOFTMAX)


def rule(*operations: str | Callable[..., Any], begins: bool = False) -> Callable[[Rule], Rule]:
    """Register a rule for operations, given by canonical name or as the callable that stands in the graph.

    Raises ValueError for an operation that has one. `begins` says that the rule can begin a view.
    """

    def register(function: Rule) -> Rule:
        for operation in operations:
            if isinstance(operation, OpOverload):
                operation = operation.overloadpacket  # an operator's overloads share its rule
            if operation in RULES:
                raise ValueError(f"{operation!r} has a rule already: {RULES[operation].__qualname__}")
            RULES[operation] = function
            BEGINNERS.update([operation] if begins else [])
        return function

    return register


@dataclass(frozen=True)
class Call:
    """A node with its arguments, as a rule sees it."""

    node: Node
    values: dict[Node, LogitsView]

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or by keyword, or the default."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def sizes(self, position: int, name: str) -> tuple[Any, ...]:
        """Arguments that may be spread, `x.view(2, 3)`, or one sequence, `x.view((2, 3))`."""
        rest = self.node.args[position:]
        if not rest:
            rest = (self.node.kwargs.get(name, ()),)
        if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
            return tuple(rest[0])
        return tuple(rest)

    def view(self, position: int = 0, name: str = "input", forms: Collection[Form] = WHOLE) -> LogitsView | None:
        """The view that the argument is, if it is one of those `forms`."""
        found = self.arg(position, name)
        if found is None and position == 0:
            found = self.node.kwargs.get("self")
        view = self.values.get(found) if isinstance(found, Node) else None
        return view if view is not None and view.form in forms else None

    def value(self, position: int, name: str, default: Any = None) -> Any:
        """The argument's example value: a fake tensor, a number, or itself where it is no node."""
        return value_of(self.arg(position, name, default))

    @property
    def result(self) -> Any:
        """The node's own example value."""
        return value_of(self.node)

    def decline(self, reason: Reason | OwnReason, detail: str = "") -> Decline:
        """What a rule returns to end the view here."""
        return Decline(reason, self.node, detail)


def rules_text() -> str:
    """The source of every rule in force: part of the pass's cache key."""
    seen: dict[str, str] = {}
    for key, function in RULES.items():
        name = key if isinstance(key, str) else f"{getattr(key, '__module__', '')}.{getattr(key, '__qualname__', key)}"
        try:
            seen[name] = inspect.getsource(function)
        except (OSError, TypeError):  # defined where there is no source: its name and identity must do
            seen[name] = f"{function.__module__}.{function.__qualname__}@{id(function)}"
    return "\n".join(f"{name}\n{seen[name]}" for name in sorted(seen))


def is_constant(value: Any) -> bool:
    """A plain Python number: the only scale that a rule folds into the epilogue."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not isinstance(value, torch.SymInt)
