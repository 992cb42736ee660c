# SPDX-License-Identifier: Apache-2.0
"""Random training programs that vary what surrounds the loss, as source text that a failing test prints.

    python -m tests.surroundings --count 3000 --seed 0 [--inner inductor]

A program is a module and a function `train(model, compiled, log)`, which runs a few steps of the compiled module and logs what
a user could see: losses, gradients, values of what was returned, parameters and buffers. Where `backend="inductor"` runs it,
`backend="cce"` has to run it as well and log what eager logs in float64, within eager's own error; where inductor raises, cce
raises the same or runs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
import warnings
from dataclasses import dataclass
from typing import Any

import hypothesis
import torch
import torch._functorch.config
from hypothesis import strategies as st

# Statements on the hidden states h (B, T, D); `self` has buffers `count` () and `mean` (D,).
BEFORE = [
    "h = F.gelu(h)",
    "h = self.norm(h)",
    "h = h.clone(); h.add_(0.5)",
    "h = h.clone(); h[..., 0] = 0.0",
    "h = h + h.mean(-1, keepdim=True)",
    "h = checkpoint(self.inner, h, use_reentrant=False)",
    "h = Doubled.apply(h)",
    "h = h * 1.0; h.register_hook(lambda g: g * 0.5)",
    "self.count.add_(1.0)",
    "self.mean.mul_(0.9).add_(h.detach().mean((0, 1)), alpha=0.1)",
    "with torch.no_grad(): h = h + h.std()",
    "h = h + torch.func.vmap(lambda r: r * 0.5)(h)",
    "h = h + torch.func.grad(lambda q: q.sin().sum())(h.detach())",
    "h = h.to(torch.bfloat16).to(h.dtype)",
]
BREAKS = [
    "torch._dynamo.graph_break()",
    "print('a line')",
    "scale = 1.0 + 0.0 * h.detach().mean().item(); h = h * scale",
    "h = outside(h)",
]
# Statements on the logits z (B, T, V) before the loss.
HEADS = [
    "z = self.head(h)",
    "z = self.head(h)",
    "z = F.linear(h, self.head.weight)",
    "z = h @ self.head.weight.t() + self.head.bias",
    "z = F.linear(h, self.head.weight * 0.5)",
    "z = self.head(h) / 2.0",
    "z = 5.0 * torch.tanh(self.head(h) / 5.0)",
]
ON_LOGITS = [
    "z = z.float() if z.dtype != torch.float64 else z",
    "z.mul_(0.5)",
    "z = z.clone(); z[..., 0] = 0.25",
    "z = z * 1.0; z.register_hook(lambda g: g * 2.0)",
    "z.retain_grad()",
    "top = z.argmax(-1)",
    "z = Doubled.apply(z)",
    "z = checkpoint(lambda q: q * 2.0, z, use_reentrant=False)",
    "entropy = -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean()",
]
LOSSES = [
    "loss = F.cross_entropy(z.flatten(0, 1), y.flatten())",
    "loss = F.cross_entropy(z.reshape(-1, V), y.reshape(-1), label_smoothing=0.1)",
    "loss = F.cross_entropy(z[:, :-1].reshape(-1, V), y[:, 1:].reshape(-1))",
    "loss = F.cross_entropy(z.transpose(1, 2), y, reduction='none').mean()",
    "loss = F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction='sum', ignore_index=1) / y.numel()",
    "loss = -z.log_softmax(-1).gather(-1, y[..., None]).mean()",
    "loss = (z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)).mean()",
    "loss = F.cross_entropy(z.flatten(0, 1), y.flatten()) + 1e-3 * z.logsumexp(-1).square().mean()",
    "loss = torch.func.vmap(F.cross_entropy)(z, y).mean()",
    "loss = checkpoint(lambda q: F.cross_entropy(q.flatten(0, 1), y.flatten()), z, use_reentrant=False)",
    "with torch.no_grad(): aside = F.cross_entropy(z.flatten(0, 1), y.flatten())\nloss = aside + z.square().mean()",
    "loss = F.cross_entropy(z.flatten(0, 1), y.flatten()); loss.register_hook(lambda g: g * 0.5)",
]
AFTER = [
    "z = z.detach()",
    "z.add_(1.0)",
    "z = z.float() * 2.0",
    "z = z[:, -1]",
    "z[0] = 0.0",
    "self.count.add_(loss.detach())",
]
RETURNS = [
    "return loss",
    "return loss, z",
    "return loss, z",
    "return {'loss': loss, 'logits': z}",
    "return loss, z, z.flatten(0, 1)",
    "return loss, z, z",
    "return loss, z.detach(), h",
    "return z, loss, z.argmax(-1)",
    "return loss, z.softmax(-1)",
    "return z",
]
# Statements of a step; `out` is what the model returned, `loss` and `rest` its tensors.
STEPS = [
    "loss.backward()",
    "loss.backward()",
    "loss.backward(retain_graph=True); loss.backward()",
    "grads = torch.autograd.grad(loss, used); log(grads)",
    "(loss + sum(r.float().square().mean() for r in rest if r.requires_grad)).backward()",
    "loss.backward(); model.zero_grad(); compiled_loss(x, y).backward()",
]
READS = [
    "log([r.float() for r in rest])",
    "log([r.argmax(-1) for r in rest])",
    "log([r[0] for r in rest])",
    "log([r.detach().cpu() for r in rest])",
    "log([F.cross_entropy(r.float().flatten(0, -2), y.flatten()) for r in rest if r.dim() == 3])",
    "log([torch.stack(list(r.detach())) for r in rest])",
    "[r.detach().mul_(2.0) for r in rest]; log(rest)",
    "log(copy.deepcopy([r.detach() for r in rest]))",
    "rest[0] += 1.0 if False else 0.0; log(rest)",
]
BETWEEN = [
    "with torch.no_grad(): log(tensors(compiled(x[:, :3], y[:, :3])))",
    "with torch.inference_mode(): log(tensors(compiled(x, y)))",
    "model.eval(); log(tensors(compiled(x, y))[0]); model.train()",
    "x, y = x[:, :-1], y[:, :-1]",
    "x, y = torch.cat([x, x], 1), torch.cat([y, y], 1)",
    "saved = copy.deepcopy(model.state_dict()); model.load_state_dict(saved)",
    "twin = copy.deepcopy(model); log([p for p in twin.parameters()])",
    "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
    "for p in model.body.parameters(): p.requires_grad_(False)",
    "for p in model.head.parameters(): p.requires_grad_(False)",
]
# Their `eps` is of the gradients' size: with torch's, a step is as large for a rounding as for a gradient.
OPTIMIZERS = [
    "torch.optim.SGD(model.parameters(), lr=0.1)",
    "torch.optim.AdamW(model.parameters(), lr=0.01, eps=0.01, fused=True)",
    "torch.optim.Adam(model.parameters(), lr=0.01, eps=0.01, foreach=True)",
    "torch.optim.Adagrad(model.parameters(), lr=0.01, eps=0.01)",
]

_FRAME = """
class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2.0

    @staticmethod
    def backward(ctx, g):
        return g * 2.0


@torch.compiler.disable
def outside(x):
    return x * 1.0


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(V, D), nn.Linear(D, D), nn.Linear(D, V)
        self.norm, self.inner = nn.LayerNorm(D), nn.Sequential(nn.Linear(D, D), nn.Tanh())
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x, y):
{forward}


def tensors(out):
    found = list(out.values()) if isinstance(out, dict) else list(out) if isinstance(out, tuple) else [out]
    return sorted(found, key=lambda t: t.dim())


def train(model, compiled, log, x, y):
    optimizer = {optimizer}
    compiled_loss = lambda x, y: tensors(compiled(x, y))[0].sum()
    for step in range({steps}):
        optimizer.zero_grad()
        {context}
            loss, *rest = tensors(compiled(x, y))
        if loss.dim():
            loss, rest = F.cross_entropy(loss.flatten(0, -2).float(), y.flatten()), [loss]
        used = [p for p in model.parameters() if p.requires_grad]
        log(loss)
{body}
        log([p.grad for p in model.parameters()])
        log([*model.parameters(), *model.buffers()])
"""


@dataclass(frozen=True)
class Surrounding:
    source: str
    seed: int

    def __repr__(self) -> str:
        return f"\n{self.source}\n# seed {self.seed}\n"


@st.composite
def surroundings(draw: st.DrawFn) -> Surrounding:
    def some(lines: list[str], most: int) -> list[str]:
        return draw(st.lists(st.sampled_from(lines), max_size=most))

    def one(lines: list[str]) -> str:
        return draw(st.sampled_from(lines))

    forward = ["h = self.body(self.embed(x))", *some(BEFORE, 2)]
    if draw(st.integers(0, 3)) == 0:
        forward.append(one(BREAKS))
    forward.append(one(HEADS))
    if draw(st.integers(0, 2)) == 0:
        forward.append(one(ON_LOGITS))
    if draw(st.integers(0, 4)) == 0:
        forward.append(one(BREAKS))
    returned = one(RETURNS)
    forward += one(LOSSES).splitlines() if "loss" in returned else []
    if draw(st.integers(0, 3)) == 0 and "loss" in returned:
        forward.append(one(AFTER))
    if draw(st.integers(0, 4)) == 0:
        forward.insert(
            draw(st.integers(1, len(forward))), "with torch.autocast('cpu', torch.bfloat16): h = self.body(h)"
        )
    forward.append(returned)
    body = []
    if draw(st.integers(0, 2)) == 0:
        body.append(one(READS))
    body.append(one(STEPS))
    if draw(st.integers(0, 2)) == 0:
        body.append(one(READS))
    body.append("optimizer.step()")
    if draw(st.booleans()):
        body.append(one(READS))
    body += some(BETWEEN, 1)
    context = "with torch.autocast('cpu', torch.bfloat16):" if draw(st.integers(0, 5)) == 0 else "if True:"
    source = _FRAME.format(
        forward="\n".join(f"        {line}" for line in forward),
        body="\n".join(f"        {line}" for line in body),
        optimizer=one(OPTIMIZERS),
        steps=draw(st.integers(1, 3)),
        context=context,
    )
    return Surrounding(source, draw(st.integers(0, 10**6)))


B, T, D, V = 2, 5, 8, 44


@dataclass
class Ran:
    logged: list[Any]
    error: BaseException | None = None


def run(program: Surrounding, backend: str | None, dtype: torch.dtype, options: dict[str, Any] | None = None) -> Ran:
    """One run; with no backend, in eager."""
    torch._dynamo.reset()
    scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn, "V": V, "D": D}
    prelude = "import copy\nfrom torch.utils.checkpoint import checkpoint\n"
    exec(compile(prelude + program.source, "<program>", "exec"), scope)
    torch.manual_seed(program.seed)
    model = scope["Model"]().to(dtype)
    x, y = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    y[0, 0] = 1
    logged: list[Any] = []

    def log(value: Any) -> None:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        logged.extend(None if v is None else (v * 1).detach().clone() for v in values)

    call = (
        model if backend is None else torch.compile(model, backend=backend, **({"options": options} if options else {}))
    )
    try:
        # A graph from autograd's cache raises with `retain_graph`, with any backend, if the program that left it there had none.
        without = torch._functorch.config.patch(enable_autograd_cache=False)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), without:
            warnings.simplefilter("ignore")
            scope["train"](model, call, log, x, y)
    except Exception as error:  # compared
        return Ran(logged, error)
    return Ran(logged)


def told(program: Surrounding, inner: str) -> str:
    """What cce does otherwise than inductor (or `inner`) and eager; nothing where it does not.

    Where cce does what eager does, the other backend is not asked: it would only be allowed more.
    """
    ours = run(program, "cce", torch.float32, {"inner": inner} if inner != "inductor" else None)
    eager, exact = run(program, None, torch.float32), run(program, None, torch.float64)
    runs = ours.error is eager.error is exact.error is None
    if runs and not _compared(program, ours, exact, eager, eager):
        return ""
    theirs = run(program, inner, torch.float32)
    if theirs.error is not None:
        if ours.error is None or _kind(ours.error) == _kind(theirs.error):
            return ""
        return f"raises {ours.error!r:.300} and not {theirs.error!r:.300}"
    if ours.error is not None:
        return f"raises {type(ours.error).__name__}: {ours.error}"[:600]
    if any("modified by an inplace operation" in str(r.error) for r in (eager, exact)):
        return ""  # inductor differentiates what was written over, without a word: its numbers are no measure
    if eager.error is not None or exact.error is not None:
        eager = exact = theirs
    return _compared(program, ours, exact, eager, theirs)


def _compared(program: Surrounding, ours: Ran, exact: Ran, eager: Ran, theirs: Ran) -> str:
    """The first value logged that is not as it should be; nothing where all are."""
    logs = ours.logged, exact.logged, eager.logged, theirs.logged
    if len({len(log) for log in logs}) > 1:
        return f"{len(ours.logged)} values are logged and not {len(exact.logged)}"
    low = "bfloat16" in program.source
    for at, values in enumerate(zip(*logs, strict=True)):
        wrong = _far(*values, low)
        if wrong:
            return f"value {at}: {wrong}"
    return ""


def _kind(error: BaseException) -> str:
    """The type of an error, or of the one inside Dynamo's."""
    inner = getattr(error, "inner_exception", None) or error.__cause__
    return type(inner if inner is not None else error).__name__


def _far(ours: Any, exact: Any, eager: Any, theirs: Any, low: bool) -> str:
    if exact is None or ours is None:
        return "" if ours is exact or ours is theirs is None else f"{ours} and not {exact}"
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"{tuple(ours.shape)} {ours.dtype} and not {tuple(theirs.shape)} {theirs.dtype}"
    if not ours.dtype.is_floating_point:
        return "" if low or torch.equal(ours, theirs) or torch.equal(ours, exact) else "other integers"
    a, b, c, t = (v.double() for v in (ours, exact, eager, theirs))
    size = max(float(b.abs().max()) if b.numel() else 0.0, 1e-3)
    own = max(float((c - b).abs().max()), float((t - b).abs().max())) if b.numel() else 0.0
    error = float((a - b).abs().max()) if b.numel() else 0.0
    allowed = 3.0 * own + (3e-2 if low else 2e-5) * size
    return (
        ""
        if error <= allowed or ((a.isnan() == b.isnan()).all() and a.isnan().any())
        else f"off by {error:.3g} of {size:.3g}, {own:.3g} in eager"
    )


def check_all(count: int, seed: int, inner: str) -> list[str]:
    """What differs in `count` programs, each with its source; printed as it is found."""
    wrong: list[str] = []

    @hypothesis.given(surroundings())
    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.seed(seed)
    def look(program: Surrounding) -> None:
        seen[0] += 1
        text = told(program, inner)
        if text:
            wrong.append(f"{text}\n{program!r}")
            print("---", wrong[-1], flush=True)
        if seen[0] % 100 == 0:
            print(f"{seen[0]} of {count} programs, {len(wrong)} differ, {time.time() - begin:.0f} s", flush=True)

    seen, begin = [0], time.time()
    look()
    torch._dynamo.reset()
    print(f"{seen[0]} programs from seed {seed}, {len(wrong)} differ, {time.time() - begin:.0f} s", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inner", default="inductor")
    args = parser.parse_args()
    return len(check_all(args.count, args.seed, args.inner))


if __name__ == "__main__":
    sys.exit(main())
