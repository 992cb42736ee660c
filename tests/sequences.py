# SPDX-License-Identifier: Apache-2.0
"""Random programs on returned logits: a pool of tensors that begins with them, and up to ten operations on its members.

Views, slices, casts, scales, softmaxes, reads, losses, in-place changes of any member, index assignments, `detach`, regions
without gradients, and a backward at the end; with lazy and with plain logits side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

B, T, D, V = 2, 3, 4, 7

# {a} and {b} are members of the pool; what an expression gives becomes a member.
VIEWS = """
{a}[0]
{a}[-1:]
{a}[:, :-1]
{a}[..., 1:, :]
{a}[..., :3]
{a}[None]
{a}.view(-1, {a}.size(-1))
{a}.reshape(-1, {a}.size(-1))
{a}.reshape({a}.size(0), -1)
{a}.flatten(0, 1)
{a}.transpose(0, 1)
{a}.transpose(-1, -2)
{a}.permute(*reversed(range({a}.dim())))
{a}.unsqueeze(0)
{a}.squeeze(0)
{a}.narrow(0, 0, 1)
{a}.select(0, 0)
{a}.unbind(0)[0]
{a}.split(2)[0]
{a}.chunk(2)[-1]
{a}.diagonal()
{a}.expand(2, *{a}.shape)
{a}.movedim(0, -1)
{a}.t()
{a}.detach()
{a}.data
{a}.view_as({b})
{a}.as_strided((2,), (1,))
torch.atleast_3d({a})
torch.swapaxes({a}, 0, 1)
"""
VALUES = """
{a}.contiguous()
{a}.clone()
{a}.float()
{a}.to(torch.float32)
{a}.half()
{a}.to(torch.bfloat16)
{a}.to("cpu")
{a}.type_as({b})
{a} * 2.0
0.5 * {a}
{a} / 3.0
-{a}
{a}.mul(1.5)
{a}.softmax(-1)
{a}.log_softmax(-1)
F.log_softmax({a}.float(), dim=-1)
{a}.softmax(0)
{a}.softmax(-1) * {a}.log_softmax(-1)
{a}.exp()
{a}[mask]
{a}[torch.tensor([1, 0])]
torch.index_select({a}, 0, index)
"""
READS = """
{a} + 1.0
{a} + {b}
{a} * {b}
{a}.sum()
{a}.sum(-1)
{a}.mean(dim=-1, keepdim=True)
{a}.max()
{a}.max(-1).values
{a}.amax(-1)
{a}.argmax(-1)
{a}.topk(2).indices
{a}.topk(2, dim=-1).values
{a}.logsumexp(-1)
{a}.norm()
{a} > 0
torch.cat([{a}, {a}])
torch.stack(list({a}))
torch.where({a} > 0, {a}, 0.0)
torch.einsum("...v->v", {a})
torch.tensor({a}.tolist())
"""
LOSSES = """
F.cross_entropy({a}.reshape(-1, {a}.size(-1)), y({a}))
F.cross_entropy({a}.reshape(-1, {a}.size(-1)), y({a}), reduction="none")
F.cross_entropy({a}.float().view(-1, {a}.size(-1)), y({a}), label_smoothing=0.1)
F.nll_loss(F.log_softmax({a}.reshape(-1, {a}.size(-1)), -1), y({a}))
{a}.log_softmax(-1).reshape(-1, {a}.size(-1)).gather(-1, y({a})[:, None])
"""
CHANGES = """
{a}.add_(1.0)
{a}.mul_(0.5)
{a}.zero_()
{a}.neg_()
{a}.exp_()
{a}.clamp_(max=0.3)
{a}.copy_({b})
{a}.add_({b})
{a}.detach_()
{a}.unsqueeze_(0)
{a}.t_()
{a}.fill_diagonal_(0.0)
{a}.requires_grad_()
{a}.masked_fill_({a} > 0, 0.0)
F.relu({a}, inplace=True)
torch.add({a}, 1.0, out={a})
"""
STATEMENTS = """
{a}[0] = 0.0
{a}[..., 0] = 1.5
{a}[{a} > 0] = 0.25
{a}[:] = {b}
{a} += 1.0
{a} *= 2.0
{a} -= 0.5
{a} /= 2.0
{a}.data.mul_(2.0)
{a}.data = {a}.data * 2.0
del {a}[0]
"""
KINDS = [(VIEWS, 6), (VALUES, 4), (READS, 3), (LOSSES, 2), (CHANGES, 3), (STATEMENTS, 2)]
LINES = [line for text, weight in KINDS for line in text.strip().splitlines() for _ in range(weight)]
_STATEMENTS = set(STATEMENTS.strip().splitlines())


@dataclass(frozen=True)
class Sequence:
    """Lines of a program on the pool `t0`, `t1`, ..., each with whether it runs without gradients."""

    lines: tuple[tuple[str, bool], ...]

    def __repr__(self) -> str:
        return "\n" + "\n".join(f"{'    ' * off}{line}" for line, off in self.lines) + "\n"


@st.composite
def sequences(draw: st.DrawFn) -> Sequence:
    lines, size = [], 1
    for _ in range(draw(st.integers(1, 10))):
        text = draw(st.sampled_from(LINES))
        # The logits and what was made last are met most.
        a, b = (draw(st.sampled_from([0, size - 1, *range(size)])) for _ in range(2))
        line = text.format(a=f"t{a}", b=f"t{b}")
        if text not in _STATEMENTS:
            line, size = f"t{size} = {line}", size + 1
        lines.append((line, draw(st.integers(0, 7)) == 0))
    return Sequence(tuple(lines))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(D, D).double(), nn.Linear(D, V).double()

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head(self.body(x).tanh())
        following = F.pad(y, (0, 1), value=-100)[..., 1:]  # the last row of each sequence is ignored
        return F.cross_entropy(logits.view(-1, V), following.reshape(-1)), logits


@dataclass
class Ran:
    """What became of a program: members of the pool, gradients, and how many lines ran before one raised."""

    pool: dict[str, Any]
    grads: Any  # of the parameters, or an error
    lines: int
    error: str = ""


def run(sequence: Sequence, model: nn.Module, call: Callable[..., Any], stop: int | None = None) -> Ran:
    """Run a program, at most `stop` lines of it."""
    torch.manual_seed(0)
    model.zero_grad()
    x, targets = torch.randn(B, T, D, dtype=torch.float64), torch.arange(B * T).view(B, T) % V
    loss, logits = call(x, targets)
    scope: dict[str, Any] = {
        "torch": torch,
        "F": F,
        "t0": logits,
        "y": lambda t: torch.arange(t.numel() // t.size(-1)) % t.size(-1),
        "mask": torch.tensor([True, False]),
        "index": torch.tensor([1, 1, 0]),
    }
    done, error = 0, ""
    for line, off in sequence.lines[:stop]:
        try:
            with torch.set_grad_enabled(not off):
                exec(line, scope)
        except Exception as raised:  # the plain tensor's ends the program for both
            error = f"{type(raised).__name__}: {raised}"
            break
        done += 1
    del logits
    pool = {k: v for k, v in scope.items() if k[0] == "t" and k[1:].isdigit() and isinstance(v, Tensor)}
    # A view that autograd forbids raises when it is asked for anything.
    facts = {name: _tried(facts_of, t) for name, t in pool.items()}
    values = {name: _tried(lambda t: (t + 0).detach().clone(), t) for name, t in pool.items()}
    grads = _tried(_gradients, model, loss, list(pool.values())) if not error else ""
    if isinstance(grads, str):
        error = error or grads
    return Ran({n: (facts[n], values[n]) for n in pool}, grads, done, error)


def _tried(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns, or the error as text."""
    try:
        return function(*args)
    except Exception as raised:  # compared
        return f"{type(raised).__name__}: {raised}"


def _gradients(model: nn.Module, loss: Tensor, pool: list[Tensor]) -> list[Tensor | None]:
    total = loss
    for at, t in enumerate(pool):
        if t.requires_grad and t.is_floating_point():
            total = total + (t.double() * (at + 1)).sin().sum()
    total.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def facts_of(t: Tensor) -> tuple[Any, ...]:
    strides = tuple(stride if size > 1 else 0 for size, stride in zip(t.shape, t.stride(), strict=True))
    return (tuple(t.shape), t.dtype, strides, t.requires_grad, t.is_leaf, t._is_view(), t.is_contiguous())


def difference(sequence: Sequence, model: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]) -> str:
    """What lazy logits do otherwise than plain ones; nothing where they do not."""
    half = any("half" in line or "bfloat16" in line for line, _ in sequence.lines)
    want = run(sequence, model, plain)
    # A line that raises with plain tensors ends the program; what it did before it raised is not looked at.
    raised_at = want.lines if want.error and want.lines < len(sequence.lines) else None
    if raised_at is not None:
        want = run(sequence, model, plain, raised_at)
    got = run(sequence, model, compiled, raised_at)
    if got.error and not want.error:
        return f"line {got.lines}: {got.error}"
    for name, (facts, value) in want.pool.items():
        if name not in got.pool:
            return f"{name} is no tensor"
        if not isinstance(facts, str) and got.pool[name][0] != facts:
            return f"{name} is {got.pool[name][0]} and not {facts}"
        if isinstance(value, str):
            continue
        try:
            torch.testing.assert_close(got.pool[name][1], value, rtol=3e-2 if half else 1e-5, atol=1e-5, equal_nan=True)
        except (AssertionError, TypeError) as error:
            return f"{name}: " + " ".join(str(error).split())
    # What autograd saved is changed behind its back through `.data`, and eager's gradients are then of the new values.
    if want.error or any(".data" in line for line, _ in sequence.lines):
        return ""
    # In half precision the order in which gradients are added up shows, and which of two equal values is the largest.
    if half and any("max(" in line or "topk" in line for line, _ in sequence.lines):
        return ""
    for at, (a, b) in enumerate(zip(got.grads, want.grads, strict=True)):
        if (a is None) != (b is None):
            return f"gradient {at}: {a} and not {b}"
        if b is not None and not torch.allclose(
            a, b, rtol=1e-3, atol=3e-2 * float(b.abs().max()) if half else 1e-3, equal_nan=True
        ):
            return f"gradient {at} is off by {float((a - b).abs().max())} of {float(b.abs().max())}"
    return ""
