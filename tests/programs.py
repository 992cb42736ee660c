# SPDX-License-Identifier: Apache-2.0
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
    "einsum": "torch.einsum('btd,vd->btv', h, W)",
    "tensordot": "torch.tensordot(h, W, dims=([2], [1]))",
    "conv1d": "F.conv1d(h.transpose(1, 2), W.unsqueeze(-1), b).transpose(1, 2)",
    "computed": "F.linear(h, W * 0.5)",
    "joined": "torch.cat([F.linear(h, W[:1]), F.linear(h, W[1:])], -1)",
    "adapter": "F.linear(h, W) + F.linear(F.linear(h, W[:1]), W[:, :1]) * 0.5",
    "padded": "F.linear(h, torch.cat([W, W]), torch.cat([b, b]))[..., :{V}]",
    "mm": "torch.mm(h.reshape(-1, h.shape[-1]), W.t())",
    "addmm": "torch.addmm(b, h.view(-1, h.size(-1)), W.t())",
}
FLAT_HEADS = {"mm", "addmm"}
WITH_BIAS = {"linear_bias", "linear_then_bias", "conv1d", "addmm", "padded"}

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
# What the pass takes only before a cap; the first two only without a bias.
PLAIN = [
    "z = z / (y.sum().to(z.dtype) % 3 + 0.5)",
    "z = z * (h.sum(-1, keepdim=True).abs() + 0.1)",
    "z = z + cw.to(z.dtype)",
    "z = z.masked_fill(torch.arange({V}) == {V}, -torch.inf)",
]
# Near misses, on (B, T, V) logits, with the reason why the loss stays as it was.
MISSES = {
    "z = z.relu()": "no_rule",
    "z = z + z.mean(-1, keepdim=True)": "no_rule",
    "z = z.softmax(-1)": "no_rule",
    "z = z.softmax(1)": "class_dim",
    "z = z.flip(-1)": "no_rule",
    "z = z.cumsum(-1)": "no_rule",
    "z = z.sort(-1)[0]": "no_rule",
    "z = z * W.sum(-1)": "no_rule",
    "z = z + h.sum(-1, keepdim=True)": "no_rule",
    "z = z.roll(1, -1)": "class_mixed",
    "z = z.roll(1)": "class_mixed",
    "z = z[..., torch.arange({V})]": "class_mixed",
    "z = z.clone(); z[..., 0] = 0.5": "mutated",
    "z = z * 1.0; z.mul_(2)": "mutated",
    "z = z.masked_fill(z > 1, 0.0)": "no_rule",
    "z = F.dropout(z, 0.0)": "no_rule",
    "z = torch.where(z > 0, z, z * 0.1)": "no_rule",
    "z = z - z.mean(1, keepdim=True)": "no_rule",
    "z = z.clamp(max=3.0)": "no_rule",
    "z = (z.transpose(1, 2).reshape(z.shape[0], -1, z.shape[-1]))": "class_mixed",
}
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
    verdict: str = ""  # the reason why it is declined, or empty

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
def programs(draw: st.DrawFn, misses: bool = False) -> Program:
    """Programs that the pass rewrites; with `misses`, programs that it must leave alone."""
    b, t, d, v = (draw(st.integers(*r)) for r in ((1, 4), (2, 6), (1, 9), (2, 40)))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    ignore = draw(st.sampled_from([-100, -100, -1, 0, 7000]))
    ignored = draw(st.sampled_from([0.0, 0.3, 1.0]))
    head = draw(st.sampled_from(sorted(set(HEADS) - (FLAT_HEADS if misses else set()))))
    lines = [f"z = {HEADS[head].format(V=v)}"]
    if draw(st.booleans()):
        lines.append("logits = z")
    flat, verdict = head in FLAT_HEADS, ""
    # A loss written by hand looks every target up, so none is ignored.
    hand_written = not misses and ignored == 0.0 and draw(st.booleans())
    half = dtype in (torch.bfloat16, torch.float16)
    if not flat:
        plain = PLAIN[2 if head in WITH_BIAS or head == "adapter" or half else 0 :]
        lines += [op.format(V=v) for op in draw(st.lists(st.sampled_from(plain), max_size=1))]
    # Twice 30 overflows float16 in eager, and not here.
    scale = draw(st.sampled_from([0.5, 2.0, 3.0] + [30.0] * (dtype != torch.float16)))
    some = st.lists(st.sampled_from(ELEMENTWISE), max_size=2).filter(lambda ops: sum("tanh" in o for o in ops) <= 1)
    lines += [op.format(c=scale) for op in draw(some)]
    if misses:
        miss = draw(st.sampled_from(sorted(MISSES)))
        verdict = MISSES[miss]
        # A reshape that mixes classes with rows is none where there is one row to mix, or as many as classes.
        if "transpose(1, 2).reshape" in miss and (1 in (t, v) or t == v):
            miss, verdict = "z = z.relu()", "no_rule"
        lines.append(miss.format(V=v))
    if flat:
        lines.append("y = y.view(-1)")
    elif draw(st.booleans()):
        lines.append(draw(st.sampled_from(SHIFTS[: -1 if hand_written else None])).format(ignore=ignore))
    if not flat and draw(st.integers(0, 2)):
        # Only a tensor that was not cut can be viewed; the rest has to be reshaped.
        cut = ("..." in line or "[:" in line or "narrow" in line or "conv1d" in line for line in lines)
        lines.append(draw(st.sampled_from(FLATTENS[1 if any(cut) or misses else 0 :])).format(V=v))
        flat = True
    if not flat and not hand_written:
        lines.append(draw(st.sampled_from(CLASS_SECOND)))
    lines += [op.format(c=scale) for op in draw(some) if "tanh" not in op]
    lines.append(_by_hand(draw, v, half) if hand_written else _loss(draw, ignore))
    if draw(st.integers(0, 4)) == 0:
        lines.append("loss = loss + loss.detach() * 0.5")
    lines.append("return loss, logits" if "logits = z" in lines else "return loss")
    body = "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())
    return Program(
        source=f"def program(h, W, b, cw, y):\n{body}\n",
        shape=(b, t, d, v),
        dtype=dtype,
        grads=draw(st.sampled_from([(True, True), (True, True), (True, False), (False, True), (False, False)])),
        ignored=ignored,
        ignore_index=ignore,
        seed=draw(st.integers(0, 10**6)),
        verdict=verdict,
    )


BY_HAND = [
    "loss = -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()",
    "loss = -torch.take_along_dim(F.log_softmax(z, dim=-1), y[..., None], -1).squeeze(-1)",
    "loss = (z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)).mean()",
    "logp = z - torch.logsumexp(z, -1, keepdim=True)\nloss = -logp.gather(-1, y[..., None]).sum()",
    "loss = -(F.one_hot(y, {V}) * z.log_softmax(-1)).sum(-1)",
    "m = z.amax(-1, keepdim=True)\nlse = (z - m).exp().sum(-1, keepdim=True).log() + m\n"
    "loss = (lse - z.gather(-1, y[..., None])).mean()",
    "x = z - z.max(-1, keepdim=True)[0].detach()\nloss = x.exp().sum(-1).log() - x.gather(-1, y[..., None]).squeeze(-1)",
    "logp = z.log_softmax(-1)\nloss = (-0.9 * logp.gather(-1, y[..., None]).squeeze(-1) - 0.1 * logp.mean(-1)).mean()",
    "loss = -z.softmax(-1).gather(-1, y[..., None]).mean()",
    "loss = z.logsumexp(-1).square().mean()",
]


def _by_hand(draw: st.DrawFn, v: int, half: bool) -> str:
    loss = draw(st.sampled_from(BY_HAND)).replace("{V}", str(v))
    # A maximum in half precision is not subtracted: it is rounded otherwise than the logits.
    return f"z = z if z.dtype == torch.float64 else z.float()\n{loss}" if half and "max(-1" in loss else loss


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
