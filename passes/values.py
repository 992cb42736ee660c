"""The data that passes between finding, deciding and rewriting.

A graph is read once, forwards, and every node that is a head's logits seen through row operations and elementwise
arithmetic gets a `LogitsView`: what the node equals, in terms of hidden, weight and bias. A loss on such a node is a
`Candidate`; legality turns it into a `LossSite`, and the rewriter takes nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from ..functional import LossSpec
from ..kernels.spec import Epilogue


class Reason(enum.Enum):
    """Why a loss was left as it was. The value is a sentence for the user; see docs/patterns.md."""

    NO_LINEAR = "the loss's input does not come from a linear layer by operations that are understood"
    NO_RULE = "an operation between the linear layer and the loss has no rule"
    CLASS_DIM = "the loss is taken over a dimension that is not the vocabulary"
    CLASS_MIXED = "the vocabulary dimension is reshaped, cut or mixed on the way to the loss"
    PROBABILITIES = "the target holds class probabilities, not class indices"
    TARGET = "the target is not an int64 tensor of one class index per row"
    CLASS_WEIGHT_GRAD = "the class weights require grad, which cross entropy does not differentiate"
    MUTATED = "hidden, weight, bias or logits are changed in place between the linear layer and the loss"
    HOOK = "a hook or retained gradient watches the logits"
    DTYPE = "the head's dtype is not float32, float64, bfloat16 or float16"
    SUBCLASS = "hidden or weight is not a plain dense tensor"
    SMALL = "the logits are too small to be worth it"
    NO_META = "the shapes in the graph are not known; pass example inputs"
    OPTION = "an argument of the loss is not a constant, or has a value that the loss itself would refuse"
    INTERNAL = "the rewritten loss would differ in shape or dtype; please report this"


@dataclass(frozen=True)
class Decline:
    """A reason, the node that gave it, and where that node stands in the user's program."""

    reason: Reason
    node: Node
    detail: str = ""

    def __str__(self) -> str:
        where = source_line(self.node)
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.reason.value}{detail} ({self.node.name}{', ' + where if where else ''})"


@dataclass(frozen=True)
class Step:
    """One operation to replay on hidden, weight or bias: `apply(x, *args)`; args may hold graph nodes."""

    name: str
    apply: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Operand:
    """A graph node and what is done to it before the kernel reads it."""

    node: Node
    steps: tuple[Step, ...] = ()

    def then(self, name: str, apply: Callable[..., Any], *args: Any) -> Operand:
        return replace(self, steps=(*self.steps, Step(name, apply, args)))


@dataclass(frozen=True)
class LogitsView:
    """A node's value as a function of a head.

    Laid out with the class dimension last and the rest flattened, the value is
    `epilogue(hidden.flatten(0, -2) @ weight.T + bias)`, or its log-softmax where `log` is set. The replayed hidden has
    the shape of the value, with D in place of V at `class_dim`.
    """

    linear: Node
    hidden: Operand
    weight: Operand  # (V, D)
    bias: Operand | None  # (V,)
    dtype: torch.dtype  # in which the program multiplies
    hidden_size: int  # D
    class_dim: int
    shape: tuple[Any, ...]
    epilogue: Epilogue = field(default_factory=Epilogue)
    log: bool = False
    path: tuple[Node, ...] = ()  # nodes from the linear to this one, both included

    @property
    def classes(self) -> Any:
        return self.shape[self.class_dim]

    def rows(self, node: Node, name: str, apply: Callable[..., Any], *args: Any, class_dim: int) -> LogitsView:
        """This view after an operation that moves rows about and leaves each row's classes alone."""
        return replace(
            self,
            hidden=self.hidden.then(name, apply, *args),
            class_dim=class_dim,
            shape=tuple(value_of(node).shape),
        ).at(node)

    def at(self, node: Node, **changes: Any) -> LogitsView:
        return replace(self, path=(*self.path, node), **changes)


@dataclass(frozen=True)
class Candidate:
    """A loss found on a view, before any decision."""

    anchor: Node
    view: LogitsView
    target: Operand  # flattened by the rewriter in the order of the view's rows
    class_weight: Node | None
    loss: LossSpec  # epilogue included
    # What the anchor returns: "loss", or per-token "log_prob" in `shape`.
    result: str = "loss"


@dataclass(frozen=True)
class LossSite:
    """A loss that may be rewritten, and how. Built by `passes.decide` alone."""

    candidate: Candidate
    needs: tuple[bool, bool, bool] | None  # gradients to make in the forward; None recomputes in the backward
    saved_bytes: Any  # sympy expression
    saved_value: int | None  # its value at the example shapes, where they are known


def value_of(node: Any) -> Any:
    """The example value (a fake tensor, a SymInt, a constant) of a node, or None."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def source_line(node: Node) -> str:
    """`file:line, code` of the statement that made the node, or an empty string."""
    trace = node.meta.get("stack_trace") or getattr(node, "stack_trace", None)
    if not trace:
        return ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    for at in range(len(lines) - 1, -1, -1):
        if lines[at].startswith("File "):
            parts = lines[at].split('"')
            number = lines[at].split("line ")[-1].split(",")[0]
            code = f", `{lines[at + 1]}`" if at + 1 < len(lines) else ""
            return f"{parts[1]}:{number}{code}" if len(parts) > 1 else ""
    return ""
