# SPDX-License-Identifier: Apache-2.0
"""Random losses of the rows: regions of 2 to 30 operations of every admitted kind on one to three heads.

Values of a region are of three kinds, rows of numbers per class, one number per row, and a class per row; an operation takes
some and makes one. Programs that mix rows have one operation more, at a random place, that does.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D = 1


@dataclass(frozen=True)
class Step:
    """An operation: of which values, with which numbers."""

    name: str
    of: tuple[int, ...]
    number: float


@dataclass(frozen=True)
class Program:
    """A loss: heads, steps on the values so far, and how what is left becomes a scalar."""

    heads: tuple[bool, ...]  # whether each has a bias
    shape: tuple[int, ...]  # of the rows
    classes: int
    dtype: torch.dtype
    steps: tuple[Step, ...]
    reduction: str
    metrics: bool
    seed: int

    def model(self) -> nn.Module:
        torch.manual_seed(self.seed)
        return nn.ModuleList([nn.Linear(D + n, self.classes, bias=b) for n, b in enumerate(self.heads)]).to(self.dtype)

    def inputs(self) -> list[Tensor]:
        g = torch.Generator().manual_seed(self.seed)
        hidden = [torch.randn(*self.shape, D + n, generator=g, dtype=torch.float64) for n in range(len(self.heads))]
        per_row = torch.rand(*self.shape, generator=g, dtype=torch.float64) + 0.5
        per_class = torch.randn(self.classes, generator=g, dtype=torch.float64)
        target = torch.randint(0, self.classes, self.shape, generator=g)
        floats = [t.to(self.dtype) for t in (*hidden, per_row, per_class)]
        return [*(t.requires_grad_() for t in floats[: len(hidden)]), *floats[len(hidden) :], target]

    def __call__(self, model: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.heads)
        hidden, (per_row, per_class, target) = inputs[:count], inputs[count:]
        wide = [head(h) for head, h in zip(model, hidden, strict=True)]  # type: ignore[call-overload]
        context = Context(per_row, per_class, target, self.classes, [], [])
        for step in self.steps:
            kind, function = OPERATIONS[step.name]
            arguments = [wide[i % len(wide)] for i in step.of]
            made = function(context, arguments, step.number)
            {"wide": wide, "row": context.rows, "class": context.numbers}[kind].append(made)
        rows = [r for r in context.rows if r.is_floating_point()] or [wide[-1].tanh().sum(-1)]
        total = REDUCTIONS[self.reduction](rows, context)
        extra = [n.float().mean() for n in context.numbers[-2:]] if self.metrics else []
        return (total, *(e.detach() for e in extra))


@dataclass
class Context:
    per_row: Tensor
    per_class: Tensor
    target: Tensor
    classes: int
    rows: list[Tensor]
    numbers: list[Tensor]  # a class per row


Operation = Callable[[Context, list[Tensor], float], Tensor]


def _one_hot(c: Context, like: Tensor) -> Tensor:
    return F.one_hot(c.target, c.classes).to(like.dtype)


def _in_place(c: Context, a: list[Tensor], n: float) -> Tensor:
    z = a[0].clone()
    z *= 1 + n
    z[..., 0] = n
    return z.masked_fill_(c.per_class > 1.0, n)


def _flat(c: Context, a: list[Tensor], n: float) -> Tensor:
    z = a[0].reshape(-1, c.classes)
    return (z * (1 + n)).log_softmax(-1).view_as(a[0])


def _no_grad(c: Context, a: list[Tensor], n: float) -> Tensor:
    with torch.no_grad():
        kept = a[0].softmax(-1)
    return kept * a[-1]


class Bent(torch.autograd.Function):
    """A gradient that is not quite the operation's."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, number: float) -> Tensor:
        y = (z * (1 + number)).tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y), None


class Clipped(torch.autograd.Function):
    """A gradient that is not in proportion to what comes from above."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z.sigmoid()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.1, 0.1)


class Surprise(torch.autograd.Function):
    """Cross entropy, with the gradient in the place of saved probabilities."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, target: Tensor) -> Tensor:
        logp = z - z.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logp.exp(), target)
        return -logp.gather(-1, target.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p, target = ctx.saved_tensors
        d = p.clone()
        d.scatter_add_(-1, target.unsqueeze(-1), -torch.ones_like(d[..., :1]))
        return d.mul_(grad.unsqueeze(-1)), None


class Centred(torch.autograd.Function):
    """A backward that mixes rows."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad - grad.mean(0)


OPERATIONS: dict[str, tuple[str, Operation]] = {
    "scale": ("wide", lambda c, a, n: a[0] * (1 + n)),
    "add": ("wide", lambda c, a, n: a[0] + n * a[1]),
    "times": ("wide", lambda c, a, n: a[0].tanh() * a[1].sigmoid()),
    "bias": ("wide", lambda c, a, n: a[0] - n * c.per_class),
    "temperature": ("wide", lambda c, a, n: a[0] / c.per_row.unsqueeze(-1)),
    "log_softmax": ("wide", lambda c, a, n: a[0].log_softmax(-1)),
    "softmax": ("wide", lambda c, a, n: F.softmax(a[0], dim=-1)),
    "shifted": ("wide", lambda c, a, n: a[0] - a[0].max(-1, keepdim=True).values),
    "normalised": ("wide", lambda c, a, n: F.layer_norm(a[0], (c.classes,)) * n),
    "masked": ("wide", lambda c, a, n: a[0].masked_fill(c.per_class > 1.0, n)),
    "where": ("wide", lambda c, a, n: torch.where(_one_hot(c, a[0]).bool(), a[0] - n, a[1])),
    "one_hot": ("wide", lambda c, a, n: a[0] * (_one_hot(c, a[0]) * n + 1)),
    "scattered": (
        "wide",
        lambda c, a, n: a[0] * torch.full_like(a[0], n).scatter_(-1, c.target.unsqueeze(-1), 1.0),
    ),
    "sorted": ("wide", lambda c, a, n: a[0].sort(-1, descending=n > 0).values),
    "summed": ("wide", lambda c, a, n: a[0].cumsum(-1) / c.classes),
    "rolled": ("wide", lambda c, a, n: torch.cat([a[0][..., 2:], a[0][..., :2]], -1)),
    "clamped": ("wide", lambda c, a, n: a[0].clamp(-1 - abs(n), 1.5)),
    "activation": ("wide", lambda c, a, n: F.gelu(a[0]) + F.softplus(a[0] * n)),
    "detached": ("wide", lambda c, a, n: a[0] * a[1].detach()),
    "no_grad": ("wide", _no_grad),
    "in_place": ("wide", _in_place),
    "flat": ("wide", _flat),
    "mixture": ("wide", lambda c, a, n: torch.logsumexp(torch.stack([a[0], a[1]]), 0)),
    "bent": ("wide", lambda c, a, n: Bent.apply(a[0], n)),
    "mask_of_places": ("wide", lambda c, a, n: a[0] * (torch.arange(c.classes) < 3 + c.target.unsqueeze(-1))),
    "picked": ("row", lambda c, a, n: a[0].gather(-1, c.target.unsqueeze(-1)).squeeze(-1) * n),
    "surprise": ("row", lambda c, a, n: Surprise.apply(a[0], c.target)),
    "lse": ("row", lambda c, a, n: a[0].logsumexp(-1)),
    "mean": ("row", lambda c, a, n: a[0].mean(dim=-1) + n),
    "square": ("row", lambda c, a, n: a[0].tanh().pow(2).sum(-1)),
    "product": ("row", lambda c, a, n: (a[0].tanh() * a[1].tanh()).sum(-1)),
    "norm": ("row", lambda c, a, n: a[0].tanh().norm(dim=-1)),
    "variance": ("row", lambda c, a, n: a[0].tanh().var(-1)),
    "top": ("row", lambda c, a, n: a[0].topk(3, -1).values.sum(-1) * n),
    "entropy": ("row", lambda c, a, n: -(a[0].softmax(-1) * a[0].log_softmax(-1)).sum(-1)),
    "kl": ("row", lambda c, a, n: F.kl_div(a[0].log_softmax(-1), a[1].softmax(-1), reduction="none").sum(-1)),
    "embedded": ("row", lambda c, a, n: (a[0].softmax(-1) @ c.per_class.unsqueeze(-1)).squeeze(-1)),
    "binary": (
        "row",
        lambda c, a, n: F.binary_cross_entropy_with_logits(a[0], _one_hot(c, a[0]), reduction="none").mean(-1),
    ),
    "largest": ("class", lambda c, a, n: a[0].argmax(-1)),
    "above": ("class", lambda c, a, n: (a[0] > a[0].gather(-1, c.target.unsqueeze(-1))).sum(-1)),
}
# What makes a row depend on others.
MIXERS: dict[str, tuple[str, Operation]] = {
    "softmax of rows": ("wide", lambda c, a, n: a[0].softmax(0)),
    "statistics": ("wide", lambda c, a, n: a[0] - a[0].mean(0, keepdim=True)),
    "rows added up": ("wide", lambda c, a, n: a[0].cumsum(0) * n),
    "the other way round": ("wide", lambda c, a, n: a[0] + n * a[0].flip(0)),
    "rows rolled": ("wide", lambda c, a, n: a[0] * a[0].roll(1, 0)),
    "rows sorted": ("wide", lambda c, a, n: a[0].sort(0).values),
    "all scaled": ("wide", lambda c, a, n: a[0] / (1 + a[0].abs().max())),
    "ranks of rows": ("row", lambda c, a, n: a[0].tanh().sum(-1).softmax(0)),
    "clipped gradient": ("wide", lambda c, a, n: Clipped.apply(a[0])),  # not where it would be run several times
    "centred gradient": ("wide", lambda c, a, n: Centred.apply(a[0])),
    "first row": ("wide", lambda c, a, n: a[0] - a[0][:1]),
}
OPERATIONS |= MIXERS
REDUCTIONS: dict[str, Callable[[list[Tensor], Context], Tensor]] = {
    "mean": lambda rows, c: sum((r.mean() for r in rows), torch.zeros((), dtype=c.per_row.dtype)),
    "sum": lambda rows, c: torch.stack([r.sum() for r in rows]).sum() / c.classes,
    "masked": lambda rows, c: sum(rows).mul(c.per_row > 0.8).sum() / (c.per_row > 0.8).sum().clamp(min=1),
    "weighted": lambda rows, c: (sum(rows) * c.per_row).mean(),
    "squared": lambda rows, c: (sum(rows) ** 2).mean(),
}


def draw(seed: int, mixes: bool = False) -> Program:
    """The program of a number."""
    r = random.Random(seed)
    plain = [name for name in OPERATIONS if name not in MIXERS]
    names = [r.choice(plain) for _ in range(r.randint(2, 30))]
    if mixes:
        names.insert(r.randint(0, len(names)), r.choice(list(MIXERS)))
    # Late values more often than early ones, so that programs are deep.
    steps = tuple(
        Step(
            n,
            (r.choice((-1, -1, -2, r.randint(0, 7))), r.choice((-1, -2, r.randint(0, 7)))),
            round(r.uniform(-0.9, 0.9), 2),
        )
        for n in names
    )
    shape = r.choice([(12,), (17,), (33,), (3, 5), (1, 9), (7, 1)])
    return Program(
        heads=tuple(r.random() < 0.5 for _ in range(r.randint(1, 3))),
        shape=shape,
        classes=r.choice([50, 56, 64]),
        dtype=r.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16]),
        steps=steps,
        reduction=r.choice(list(REDUCTIONS)),
        metrics=r.random() < 0.3,
        seed=seed % math.factorial(8),
    )


def outcome(run: Callable[..., Any], model: nn.Module, inputs: list[Tensor]) -> list[Tensor | None]:
    """The loss, metrics, and the gradients of parameters and inputs."""
    for t in (*model.parameters(), *inputs):
        t.grad = None
    out = run(model, *inputs)
    out[0].backward()
    return [*(o.detach() for o in out), *(t.grad for t in (*model.parameters(), *inputs) if t.requires_grad)]
