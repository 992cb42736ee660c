# SPDX-License-Identifier: Apache-2.0
"""The data that passes between finding, deciding and rewriting.

A graph is read once, forwards, and every node that is a head's logits seen through row operations and elementwise
arithmetic gets a `LogitsView`: what the node equals, in terms of hidden, weight and bias. A loss on such a node is a
`Candidate`; legality turns it into a `LossSite`, and the rewriter takes nothing else.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Graph, Node

from .._torch import statically_known_true
from ..functional import LossSpec, statistics_dtype
from ..kernels.spec import Epilogue


class Reason(enum.Enum):
    """Why a loss was left as it was. The value is a sentence for the user; docs/troubleshooting.md has a remedy for each."""

    NO_LINEAR = "the loss's input does not come from a linear layer by operations that are understood"
    NO_RULE = "an operation between the linear layer and the loss has no rule"
    CLASS_DIM = "the loss is taken over a dimension that is not the vocabulary"
    CLASS_MIXED = "the vocabulary dimension is reshaped, cut or mixed on the way to the loss"
    ROWS_MIXED = "rows of the logits are mixed with each other on the way to the loss"
    OWN_GRADIENT = "an autograd.Function between the linear layer and the loss does not treat each row by itself"
    PROBABILITIES = "the target holds class probabilities, not class indices"
    TARGET = "the target is not an int64 tensor of one class index per row"
    CLASS_WEIGHT_GRAD = "the class weights require grad, which cross entropy does not differentiate"
    MUTATED = "hidden, weight, bias or logits are changed in place between the linear layer and the loss"
    HOOK = "a hook or retained gradient watches the logits"
    DTYPE = "the head's dtype is not float32, float64, bfloat16 or float16"
    SUBCLASS = (
        "hidden or weight is not a plain dense tensor, or divided among processes in a way that is not understood"
    )
    SMALL = "the logits are too small to be worth it"
    NO_META = "the shapes in the graph are not known; pass example inputs"
    DYNAMIC = "the number of classes, or whether a size equals another, is not known before the graph runs"
    TRANSFORM = "a transform of torch.func, or forward-mode differentiation, is active where the loss is taken"
    USED = "the logits are needed for something else as well, so leaving them out of this saves nothing"
    OPTION = "an argument of the loss is not a constant, or has a value that the loss itself would refuse"
    INTERNAL = "cce_fx itself failed; please report this"


ADVICE = {
    Reason.NO_LINEAR: "compute the logits with F.linear, matmul or einsum in the same graph as the loss; see docs/patterns.md",
    Reason.NO_RULE: "move the operation onto hidden or after the loss, or give it a rule with cce_fx.passes.rule",
    Reason.CLASS_DIM: "give the loss the vocabulary as its class dimension: (N, V) or (B, V, T)",
    Reason.CLASS_MIXED: "keep the vocabulary whole up to the loss, or take a leading slice of it",
    Reason.ROWS_MIXED: "reduce each row to few numbers first, and mix those",
    Reason.OWN_GRADIENT: "write it as plain operations, whose gradient is made anyway",
    Reason.PROBABILITIES: "pass class indices where you can, with label_smoothing for uniform noise",
    Reason.TARGET: "pass one int64 class index for each row",
    Reason.CLASS_WEIGHT_GRAD: "detach the class weights",
    Reason.MUTATED: "write to a copy, or after the loss",
    Reason.HOOK: "hook hidden instead: the logits have no gradient when they are never made",
    Reason.DTYPE: "cast hidden and weight to a floating dtype of 16, 32 or 64 bits",
    Reason.SUBCLASS: "nothing to do: such heads run as they were",
    Reason.SMALL: "nothing to do; options={'min_vocab': 0} cuts it all the same",
    Reason.NO_META: "pass example_inputs",
    Reason.DYNAMIC: "give the head a weight whose size the graph's inputs tell, or leave dynamic=True out",
    Reason.TRANSFORM: "nothing to do: such losses run as they were; take gradients by autograd instead where you can",
    Reason.USED: "drop the other use, or compute it from hidden",
    Reason.OPTION: "make the argument a Python constant",
    Reason.INTERNAL: "report it with the program",
}


@dataclass(frozen=True)
class OwnReason:
    """A reason of a rule that is not the project's: a name in capitals, a sentence, and what to change."""

    name: str
    value: str
    advice: str


@dataclass(frozen=True)
class Decline:
    """A reason, the node that gave it, and where that node stands in the user's program."""

    reason: Reason | OwnReason
    node: Node
    detail: str = ""

    def __str__(self) -> str:
        where = source_line(self.node)
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.reason.value}{detail} ({self.node.name}{', ' + where if where else ''})"

    @property
    def advice(self) -> str:
        """What the user can do about it."""
        return self.reason.advice if isinstance(self.reason, OwnReason) else ADVICE[self.reason]


@dataclass(frozen=True)
class Step:
    """One operation to replay on hidden, weight or bias: `apply(x, *args)`; args may hold graph nodes and operands."""

    name: str
    apply: Callable[..., Any]
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Operand:
    """A graph node and what is done to it before the kernel reads it."""

    node: Node
    steps: tuple[Step, ...] = ()

    @property
    def nodes(self) -> Iterator[Node]:
        """Every node that the operand reads."""
        yield self.node
        for step in self.steps:
            yield from _nodes_in(step.args)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient flows to any node that it reads."""
        if any(step.name == "detach" for step in self.steps):
            return False
        inner = [a for step in self.steps for a in step.args if isinstance(a, Operand)]
        value = value_of(self.node)
        return bool(getattr(value, "requires_grad", False)) or any(a.requires_grad for a in inner)

    def then(self, name: str, apply: Callable[..., Any], *args: Any) -> Operand:
        """This operand with one more step."""
        return replace(self, steps=(*self.steps, Step(name, apply, args)))


def _nodes_in(value: object) -> Iterator[Node]:
    if isinstance(value, Node):
        yield value
    elif isinstance(value, Operand):
        yield from value.nodes
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, slice):
        yield from _nodes_in((value.start, value.stop, value.step))


class Form(enum.Enum):
    """What a node's value is, where z are the logits of a view."""

    LOGITS = "z"
    SHIFTED = "z - shift"  # shift is one number a row
    LOG_SOFTMAX = "log_softmax(z)"
    NEG_LOG_SOFTMAX = "-log_softmax(z)"
    SOFTMAX = "softmax(z)"
    EXP = "exp(z - shift)"
    PICKED = "one_hot(picked) times another form"


@dataclass(frozen=True)
class Scale:
    """A number for each class that its logits are multiplied with, or divided by, before the bias."""

    apply: Callable[[Any, Any], Any]
    operand: Operand  # (V,)


def _between(x: Any, start: int, stop: int) -> Any:
    return x[start:stop]


def _first(x: Any, dim: int, like: Any) -> Any:
    # By their numbers: a slice would ask whether there are as many.
    return x.index_select(dim, torch.arange(like.size(dim), device=value_of(like.node).device))


@dataclass(frozen=True)
class LogitsView:
    """A node's value as a function of a head.

    Laid out with the class dimension last and the rest flattened, the value is the `form` of the logits
    `epilogue(hidden.flatten(0, -2) @ weight.T + bias)`. The replayed hidden has the shape of the value, with D in place of
    V at `class_dim`.
    """

    linear: Node
    hidden: Operand
    weight: Operand  # (V, D)
    bias: Operand | None  # (V,)
    dtype: torch.dtype  # in which the program multiplies
    hidden_size: Any  # D, an int or a SymInt
    class_dim: int
    shape: tuple[Any, ...]
    epilogue: Epilogue = field(default_factory=Epilogue)
    form: Form = Form.LOGITS
    shift: Node | None = None  # of SHIFTED and EXP: the value's shape, with 1 at `class_dim`; None is 0
    picked: Node | None = None  # of PICKED: the classes, the value's shape without `class_dim`
    picked_from: Form | None = None  # of PICKED: what the one-hot is multiplied by
    path: tuple[Node, ...] = ()  # nodes from the linear to this one, both included
    # Of row programs:
    scales: tuple[Scale, ...] = ()
    turned: bool = False  # whether its rows were classes and its classes rows: bias and scales are of the rows then

    @property
    def classes(self) -> Any:
        """V, an int or a SymInt."""
        return self.shape[self.class_dim]

    @property
    def row_shape(self) -> tuple[Any, ...]:
        """The shape of one number a row, which targets and unreduced losses have."""
        return (*self.shape[: self.class_dim], *self.shape[self.class_dim + 1 :])

    @property
    def bias_dtype(self) -> torch.dtype:
        """What the bias is made in. A program that scales or adds up biases rounds in each logit, and never the sum."""
        steps = () if self.bias is None else self.bias.steps
        return statistics_dtype(self.dtype) if any(s.name in ("add", "div") for s in steps) else self.dtype

    @property
    def operands(self) -> tuple[Operand, ...]:
        """hidden, weight and, where there are any, bias and scales."""
        scales = (s.operand for s in self.scales)
        return tuple(o for o in (self.hidden, self.weight, self.bias, *scales) if o is not None)

    @property
    def reads(self) -> Iterator[Node]:
        """The nodes whose memory a rewritten loss reads at the loss's place, and those that the program computes on."""
        yield from self.path
        for operand in self.operands:
            yield from operand.nodes
        yield from (n for n in (self.shift, self.picked) if n is not None)

    def cut(self, node: Node, start: int, stop: int) -> LogitsView:
        """This view of the classes start..stop alone."""
        bias = None if self.bias is None else self.bias.then("cut", _between, start, stop)
        weight = self.weight.then("cut", _between, start, stop)
        return replace(self, weight=weight, bias=bias, shape=tuple(value_of(node).shape))

    def rows(self, node: Node, name: str, apply: Callable[..., Any], *args: Any, class_dim: int) -> LogitsView:
        """This view after an operation that moves rows about and leaves each row's classes alone."""
        return replace(
            self,
            hidden=self.hidden.then(name, apply, *args),
            class_dim=class_dim,
            shape=tuple(value_of(node).shape),
        ).at(node)

    def facing(self, dim: int) -> LogitsView | None:
        """This view with its classes along `dim`: itself, or of a product without bias the other way round, whose classes are
        the rows of this one. None where it cannot be turned."""
        if dim % len(self.shape) == self.class_dim:
            return self
        if len(self.shape) != 2 or self.bias is not None or self.form is not Form.LOGITS:
            return None
        rows = self.hidden if self.class_dim == 1 else self.hidden.then("t", torch.t)
        hidden = self.weight if self.class_dim == 0 else self.weight.then("t", torch.t)
        return replace(self, hidden=hidden, weight=rows, class_dim=1 - self.class_dim)

    def first_rows(self, given: dict[int, Node]) -> LogitsView:
        """This view of as many first rows, along some dimensions, as a tensor has there."""
        view = self
        for dim, node in given.items():
            size = value_of(node).shape[dim]
            shape = (*view.shape[:dim], size, *view.shape[dim + 1 :])
            view = replace(view, hidden=view.hidden.then("first", _first, dim, node), shape=shape)
        return view

    def at(self, node: Node, **changes: Any) -> LogitsView:
        """This view as the value of `node`, the next one on its path, with fields changed."""
        return replace(self, path=(*self.path, node), **changes)


class Result(enum.Enum):
    """What an anchor returns; all but LOSS are one number a row."""

    LOSS = "the loss of a LossSpec"
    LOG_PROB = "log_softmax(z) at the target"
    PROB = "softmax(z) at the target"
    LOGIT = "z at the target, less shift"
    LOG_SUM_EXP = "log sum exp z, less shift"
    SUM_EXP = "sum exp(z - shift)"
    MAX = "max z, less shift"
    SUM_LOG = "sum log_softmax(z)"
    MEAN_LOG = "mean log_softmax(z)"
    TOP = "the class of the largest z"
    MEAN = "mean z"


# What is only ever read beside a loss; by itself it is a row program.
READINGS = (Result.TOP, Result.MEAN)


@dataclass(frozen=True)
class Candidate:
    """A loss, or a statistic that losses are made of, found on a view, before any decision."""

    anchor: Node
    view: LogitsView
    target: Node | None  # flattened by the rewriter in the order of the view's rows; None where the result has none
    class_weight: Node | None
    loss: LossSpec  # epilogue included
    result: Result = Result.LOSS
    keepdim: bool = False  # whether the result keeps the class dimension, of size 1
    total: bool = False  # whether the result is the sum over all rows, of a mean the mean
    negated: bool = False


@dataclass(frozen=True)
class LossSite:
    """A loss that may be rewritten, and how. Built by `passes.decide` alone."""

    candidate: Candidate
    needs: tuple[bool, bool, bool] | None  # gradients to make in the forward; None recomputes in the backward
    saved_bytes: Any  # sympy expression, as of `passes.memory`
    saved_value: int | None  # its value at the example shapes, where they are known
    needed_bytes: Any  # likewise
    row_count: int | None  # N, where it is known
    readings: tuple[Candidate, ...] = ()  # what the same kernel tells besides; see `passes.beside`
    place: Node | None = None  # before which all of it is written; None is the anchor


def value_of(node: Any) -> Any:
    """The example value (a fake tensor, a SymInt, a constant) of a node, or None."""
    if not isinstance(node, Node):
        return node
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def output_of(graph: Graph) -> Node:
    """The node that returns a graph's results."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def behind(node: Node) -> set[Node]:
    """A node and all that it is made of."""
    found, stack = {node}, [node]
    while stack:
        more = [n for n in stack.pop().all_input_nodes if n not in found]
        found.update(more)
        stack += more
    return found


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for certain, without a guard."""
    return known(a == b)


def known(condition: Any) -> bool:
    """Whether a condition on sizes holds for certain, without a guard."""
    return condition if isinstance(condition, bool) else bool(statically_known_true(condition))


def constant(value: Any) -> Any:
    """A number that a graph is made for, of a symbol that it has fixed or of itself; anything else as it is.

    Dynamo fixes what a function of torch asks a number's value of, and leaves the symbol in the graph.
    """
    number = value_of(value)
    if isinstance(number, (torch.SymInt, torch.SymFloat)) and number.node.expr.is_number:
        return (int if isinstance(number, torch.SymInt) else float)(number.node.expr)
    return value


def example_size(size: Any) -> int:
    """A size, that of the example where it is a symbol, or 0 where not even the example has one.

    To ask what is worth it, and not what is right: no guard comes of it.
    """
    return size if isinstance(size, int) else int(size.node.hint or 0)


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
