"""A generator of programs that end in a language-model loss, as source text that a failing test prints.

Each program is a function `program(h, W, b, cw, y)` of hidden (B, T, D), weight (V, D), bias (V,), class weights (V,) and
targets (B, T), which returns a loss and, sometimes, the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

HEADS = {
    "linear": "F.linear(h, W)",
    "linear_bias": "F.linear(h, W, b)",
    "matmul_t": "h @ W.t()",
    "matmul_T": "torch.matmul(h, W.T)",
    "matmul_transpose": "h.matmul(W.transpose(0, 1))",
    "linear_then_bias": "F.linear(h, W) + b",
    "mm": "torch.mm(h.reshape(-1, h.shape[-1]), W.t())",
    "addmm": "torch.addmm(b, h.view(-1, h.size(-1)), W.t())",
}
FLAT_HEADS = {"mm", "addmm"}

ELEMENTWISE = [
    "z = z * {c}",
    "z = {c} * z",
    "z = z / {c}",
    "z = z.div({c})",
    "z = {c} * torch.tanh(z / {c})",
    "z = torch.tanh(z * {c})",
    "z = z.float() if z.dtype != torch.float64 else z",
    "z = z.to(z.dtype)",
    "z = z.contiguous()",
    "z = z.clone()",
]
# Operations on (B, T, V) logits with (B, T) targets, keeping that layout.
SHIFTS = [
    "z = z[..., :-1, :]; y = y[..., 1:]",
    "z = z[:, :-1]; y = y[:, 1:]",
    "z = z[:, :-1, :].contiguous(); y = y[:, 1:].contiguous()",
    "z = z.narrow(1, 0, z.size(1) - 1); y = y.narrow(1, 1, y.size(1) - 1)",
    "y = F.pad(y, (0, 1), value={ignore})[..., 1:]",
]
FLATTENS = [
    "z = z.view(-1, {V}); y = y.view(-1)",
    "z = z.reshape(-1, z.size(-1)); y = y.reshape(-1)",
    "z = z.flatten(0, 1); y = y.flatten()",
    "z = z.reshape(-1, {V})[1:]; y = y.reshape(-1)[1:]",
]
CLASS_SECOND = ["z = z.transpose(1, 2)", "z = z.permute(0, 2, 1)", "z = z.movedim(-1, 1)", "z = z.transpose(-1, -2)"]


@dataclass(frozen=True)
class Program:
    source: str
    shape: tuple[int, int, int, int]  # B, T, D, V
    dtype: torch.dtype
    grads: tuple[bool, bool]  # whether hidden, and weight with bias, require grad
    ignored: float  # share of targets that are ignored
    ignore_index: int
    seed: int

    def function(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn}
        exec(compile(self.source, "<program>", "exec"), scope)
        return scope["program"]

    def tensors(self) -> list[Tensor]:
        b, t, d, v = self.shape
        gen = torch.Generator().manual_seed(self.seed)
        rand = [torch.randn(s, generator=gen, dtype=torch.float64) for s in ((b, t, d), (v, d), (v,))]
        class_weight = torch.rand(v, generator=gen, dtype=torch.float64) + 0.1
        y = torch.randint(0, v, (b, t), generator=gen)
        y[torch.rand((b, t), generator=gen) < self.ignored] = self.ignore_index
        h, w, bias = (x.to(self.dtype) for x in rand)
        needs = (self.grads[0], self.grads[1], self.grads[1])
        return [
            *(x.requires_grad_(n) for x, n in zip((h, w, bias), needs, strict=True)),
            class_weight.to(self.dtype),
            y,
        ]

    def __repr__(self) -> str:
        return f"\n{self.source}\n# {self.shape=} {self.dtype=} {self.grads=} {self.ignored=} {self.seed=}\n"


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs that the pass rewrites."""
    b, t, d, v = (draw(st.integers(*r)) for r in ((1, 4), (2, 6), (1, 9), (2, 40)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    ignore = draw(st.sampled_from([-100, -100, -1, 0, 7000]))
    head = draw(st.sampled_from(sorted(HEADS)))
    lines = [f"z = {HEADS[head]}"]
    if draw(st.booleans()):
        lines.append("logits = z")
    scale = draw(st.sampled_from([0.5, 2.0, 3.0, 30.0]))
    some = st.lists(st.sampled_from(ELEMENTWISE), max_size=2).filter(lambda ops: sum("tanh" in o for o in ops) <= 1)
    capped = draw(some)
    lines += [op.format(c=scale) for op in capped]
    flat = head in FLAT_HEADS
    if flat:
        lines.append("y = y.view(-1)")
    elif draw(st.booleans()):
        lines.append(draw(st.sampled_from(SHIFTS)).format(ignore=ignore))
    if not flat and draw(st.integers(0, 2)):
        # Only a tensor that was not cut can be viewed; the rest has to be reshaped.
        whole = not any("..." in line or "[:" in line or "narrow" in line for line in lines)
        lines.append(draw(st.sampled_from(FLATTENS[0 if whole else 1 :])).format(V=v))
        flat = True
    elif not flat:
        lines.append(draw(st.sampled_from(CLASS_SECOND)))
    lines += [op.format(c=scale) for op in draw(some) if "tanh" not in op]
    lines.append(_loss(draw, ignore))
    lines.append("return loss, logits" if "logits = z" in lines else "return loss")
    body = "\n".join(f"    {line}" for line in lines)
    return Program(
        source=f"def program(h, W, b, cw, y):\n{body}\n",
        shape=(b, t, d, v),
        dtype=dtype,
        grads=draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True), (False, False)])),
        ignored=draw(st.sampled_from([0.0, 0.3, 1.0])),
        ignore_index=ignore,
        seed=draw(st.integers(0, 10**6)),
    )


def _loss(draw: st.DrawFn, ignore: int) -> str:
    reduction = draw(st.sampled_from(["mean", "mean", "sum", "none"]))
    weight = draw(st.sampled_from([None, None, "cw"]))
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1]))
    cast = "cw.to(z.dtype)" if weight else "None"
    common = f"weight={cast}, ignore_index={ignore}, reduction={reduction!r}"
    return "loss = " + draw(
        st.sampled_from(
            [
                f"F.cross_entropy(z, y, {common}, label_smoothing={smoothing})",
                f"nn.CrossEntropyLoss({common}, label_smoothing={smoothing})(z, y)",
                f"F.nll_loss(F.log_softmax(z, dim=1), y, {common})",
                f"F.nll_loss(torch.log_softmax(z, 1), y, {common})",
            ]
        )
    )
