# SPDX-License-Identifier: Apache-2.0
"""Every form of head, chain and loss that is known, by name, as source text; `docs/patterns.md` is made of it.

A form is the body of a function of hidden h (B, T, D), weight W (V, D), bias b (V,), targets y (B, T) in [0, V), a second
weight W2 (V, D), an adapter A (R, D) and C (V, R), and a number t (1,) that is a temperature.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    family: str
    name: str
    body: str
    verdict: str = "kernel"  # or "rows", "lazy" or the name of the Reason why not
    why: str = ""

    @property
    def source(self) -> str:
        lines = "\n".join(f"    {line}" for line in self.body.strip().splitlines())
        return f"def program(h, W, b, y, W2, A, C, t):\n{lines}\n"

    def function(self) -> Callable[..., Any]:
        scope: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn, "V": V}
        if "rearrange" in self.body:
            scope["rearrange"] = importlib.import_module("einops").rearrange
        exec(compile(self.source, f"<{self.name}>", "exec"), scope)
        return scope["program"]


B, T, D, V, R = 2, 5, 6, 41, 2


def tensors(dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    new = lambda *s: torch.randn(*s, generator=gen, dtype=torch.float64).to(device, dtype).requires_grad_()  # noqa: E731
    y = torch.randint(0, V, (B, T), generator=gen).to(device)
    t = torch.full((1,), 0.7, dtype=dtype, device=device)
    return [new(B, T, D), new(V, D), new(V), y, new(V, D), new(R, D), new(V, R), t]


_FLAT = "z = F.linear(h, W).view(-1, V); y = y.view(-1)\n"
_CE = "return F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1))"

FORMS = [
    Form("loss", "cross_entropy", _FLAT + "return F.cross_entropy(z, y)"),
    Form("loss", "CrossEntropyLoss", _FLAT + "return nn.CrossEntropyLoss()(z, y)"),
    Form("loss", "label smoothing", _FLAT + "return F.cross_entropy(z, y, label_smoothing=0.1)"),
    Form("loss", "sum over num_items_in_batch", _FLAT + "return F.cross_entropy(z, y, reduction='sum') / 7"),
    Form("loss", "log_softmax, nll_loss", _FLAT + "return F.nll_loss(F.log_softmax(z, -1), y)"),
    Form("loss", "LogSoftmax, NLLLoss", _FLAT + "return nn.NLLLoss()(nn.LogSoftmax(dim=-1)(z), y)"),
    Form("loss", "softmax, log, nll_loss", _FLAT + "return F.nll_loss(z.softmax(-1).log(), y)"),
    Form("loss", "cross_entropy of log-probabilities", _FLAT + "return F.cross_entropy(z.log_softmax(-1), y)"),
    Form("loss", "an accuracy beside it", _FLAT + "right = (z.argmax(-1) == y).float().mean()\nreturn F.cross_entropy(z, y) * right"),
    Form("loss", "the mean logit beside it", _FLAT + "return F.cross_entropy(z, y) * z.detach().mean()"),
    Form("loss", "log_softmax, gather", "z = F.linear(h, W)\nreturn -z.log_softmax(-1).gather(-1, y.unsqueeze(-1)).mean()"),
    Form("loss", "log_softmax, take_along_dim",
         _FLAT + "return -torch.take_along_dim(z.log_softmax(-1), y[:, None], 1).squeeze(1).sum()"),
    Form("loss", "log_softmax, advanced indexing", _FLAT + "return -z.log_softmax(1)[torch.arange(y.numel(), device=y.device), y].mean()"),
    Form("loss", "softmax, gather, log", _FLAT + "return -z.softmax(-1).gather(1, y[:, None]).log().mean()"),
    Form("loss", "logsumexp minus gather",
         "z = F.linear(h, W)\nreturn (z.logsumexp(-1) - z.gather(-1, y[..., None]).squeeze(-1)).mean()"),
    Form("loss", "logits minus logsumexp, gather",
         "z = F.linear(h, W)\nlogp = z - z.logsumexp(-1, keepdim=True)\nreturn -logp.gather(-1, y[..., None]).mean()"),
    Form("loss", "one-hot product", _FLAT + "return -(F.one_hot(y, V) * z.log_softmax(-1)).sum(-1).mean()"),
    Form("loss", "one-hot product, summed at once", _FLAT + "return -(z.log_softmax(-1) * F.one_hot(y, V).float()).sum()"),
    Form("loss", "hand-written stable softmax",
         "z = F.linear(h, W)\nm = z.amax(-1, keepdim=True)\ns = (z - m).exp().sum(-1, keepdim=True)\n"
         "return (s.log() + m - z.gather(-1, y[..., None])).mean()", verdict="rows"),
    Form("loss", "hand-written, max and shifted gather",
         "z = F.linear(h, W)\nx = z - z.max(-1, keepdim=True)[0]\nlse = x.exp().sum(-1).log()\n"
         "return (lse - x.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()", verdict="rows"),
    Form("loss", "hand-written, detached max",
         "z = F.linear(h, W)\nx = z - z.max(dim=-1, keepdim=True).values.detach()\n"
         "return (torch.log(torch.exp(x).sum(-1)) - x.gather(-1, y.unsqueeze(-1)).squeeze(-1)).mean()", verdict="rows"),
    Form("loss", "label smoothing of the transformers Trainer",
         "z = F.linear(h, W)\nsurprise = -F.log_softmax(z, dim=-1)\nnll = surprise.gather(-1, y.unsqueeze(-1))\n"
         "smooth = surprise.sum(dim=-1, keepdim=True, dtype=torch.float32)\n"
         "return 0.9 * nll.mean() + 0.1 * smooth.mean() / V", verdict="rows"),
    Form("loss", "timm label smoothing",
         _FLAT + "logp = F.log_softmax(z, dim=-1)\nnll = -logp.gather(dim=-1, index=y.unsqueeze(1)).squeeze(1)\n"
         "return (0.9 * nll + 0.1 * -logp.mean(dim=-1)).mean()", verdict="rows"),
    Form("loss", "z-loss beside cross entropy",
         _FLAT + "return F.cross_entropy(z, y) + 1e-4 * torch.logsumexp(z, -1).square().mean()", verdict="rows"),
    Form("loss", "per-token log-probabilities (DPO)",
         "z = F.linear(h, W)[:, :-1, :]\nlogps = torch.gather(z.log_softmax(-1), dim=2, index=y[:, 1:].unsqueeze(2)).squeeze(2)\n"
         "return (logps * (y[:, 1:] != 3)).sum(-1).mean()"),
    Form("loss", "selective_log_softmax of trl (GRPO)",
         "z = F.linear(h, W) / t\nchosen = torch.gather(z, -1, y.unsqueeze(-1)).squeeze(-1)\n"
         "lse = torch.stack([torch.logsumexp(x, dim=-1) for x in z])\nreturn (chosen - lse).mean()"),
    Form("loss", "row by row log_softmax (trl, half precision)",
         "z = F.linear(h, W)\nrows = [F.log_softmax(x, -1).gather(-1, i[:, None]).squeeze(-1) for x, i in zip(z, y)]\n"
         "return -torch.stack(rows).mean()"),
    Form("loss", "several losses on one logits",
         _FLAT + "return F.cross_entropy(z, y) + F.cross_entropy(z[:-1], y[1:], reduction='sum')"),
    Form("loss", "several heads (MTP, Medusa)",
         "one = F.cross_entropy(F.linear(h, W).flatten(0, 1), y.flatten())\n"
         "return one + F.cross_entropy(F.linear(h[:, :-1], W2).flatten(0, 1), y[:, 1:].flatten())"),
    Form("loss", "chunks of the sequence in a loop",
         "total = 0\nfor x, i in zip(h.chunk(2, 1), y.chunk(2, 1)):\n"
         "    total = total + F.cross_entropy(F.linear(x, W).flatten(0, 1), i.flatten(), reduction='sum')\nreturn total / y.numel()"),
    Form("loss", "chunks of the logits in a loop",
         "total = 0\nz = F.linear(h, W)\nfor x, i in zip(z.split(2, 1), y.split(2, 1)):\n"
         "    total = total + F.cross_entropy(x.flatten(0, 1), i.flatten(), reduction='sum')\nreturn total / y.numel()"),
    Form("loss", "probability targets", _FLAT + "return F.cross_entropy(z, F.one_hot(y, V).float() * 0.9 + 0.1 / V)",
         "rows"),
    Form("loss", "entropy", "z = F.linear(h, W)\np = z.softmax(-1)\nreturn -(p * z.log_softmax(-1)).sum(-1).mean()", "rows"),
    Form("head", "nn.Linear's form with a bias", "z = F.linear(h, W, b)\n" + _CE),
    Form("head", "matmul", "z = torch.matmul(h, W.t())\n" + _CE),
    Form("head", "@ with .T", "z = h @ W.T\n" + _CE),
    Form("head", "mm", "z = torch.mm(h.view(-1, h.size(-1)), W.t())\n" + _CE),
    Form("head", "addmm (GPT-2's Conv1D)", "z = torch.addmm(b, h.view(-1, h.size(-1)), W.t())\n" + _CE),
    Form("head", "einsum", "z = torch.einsum('btd,vd->btv', h, W)\n" + _CE),
    Form("head", "einsum, vocabulary second", "z = torch.einsum('btd,vd->bvt', h, W)\nreturn F.cross_entropy(z, y)"),
    Form("head", "tensordot", "z = torch.tensordot(h, W, dims=([2], [1]))\n" + _CE),
    Form("head", "conv1d with kernel size 1", "z = F.conv1d(h.transpose(1, 2), W.unsqueeze(-1), b)\nreturn F.cross_entropy(z, y)"),
    Form("head", "conv2d with kernel size 1",
         "z = F.conv2d(h.transpose(1, 2).unsqueeze(-1), W[..., None, None], b)\nreturn F.cross_entropy(z, y.unsqueeze(-1))"),
    Form("head", "conv3d with kernel size 1",
         "z = F.conv3d(h.transpose(1, 2)[..., None, None], W[..., None, None, None], b)\nreturn F.cross_entropy(z, y[..., None, None])"),
    Form("head", "vocabulary first", "z = W @ h.flatten(0, 1).T\nreturn F.cross_entropy(z.T, y.flatten())"),
    Form("head", "vocabulary second", "z = W @ h.transpose(1, 2)\nreturn F.cross_entropy(z, y)"),
    Form("head", "rows against rows, both ways",
         "z = h.flatten(0, 1) @ (W[:10] * 2).T\ni = torch.arange(z.size(0), device=z.device)\n"
         "return F.cross_entropy(z, i) + F.cross_entropy(z.T, i)"),
    Form("head", "rows against rows, both ways by hand",
         "z = h.flatten(0, 1) @ (W[:10] * 2).T\nreturn -(z.log_softmax(0).diagonal() + z.log_softmax(1).diagonal()).mean()", "rows"),
    Form("head", "bmm with one batch", "z = torch.bmm(h.view(1, -1, h.size(-1)), W.t().unsqueeze(0)).squeeze(0)\n" + _CE),
    Form("head", "a weight computed in the graph", "z = F.linear(h, (W + W2) * 0.5)\n" + _CE),
    Form("head", "two weights joined", "z = F.linear(h, torch.cat([W, W2]))\n" + _CE),
    Form("head", "two heads joined", "z = torch.cat([F.linear(h, W), F.linear(h, W2)], -1)\n" + _CE),
    Form("head", "cosine head", "z = F.linear(F.normalize(h, dim=-1), F.normalize(W, dim=-1)) * 10\n" + _CE),
    Form("head", "LoRA", "z = F.linear(h, W, b) + F.linear(F.linear(h, A), C) * 0.5\n" + _CE),
    Form("chain", "rearrange (einops) to rows",
         "z = rearrange(F.linear(h, W), 'b t v -> (b t) v')\nreturn F.cross_entropy(z, rearrange(y, 'b t -> (b t)'))"),
    Form("chain", "rearrange (einops) to (B, V, T)",
         "return F.cross_entropy(rearrange(F.linear(h, W), 'b t v -> b v t'), y)"),
    Form("chain", "shift by slices", "z = F.linear(h, W)[..., :-1, :].contiguous(); y = y[..., 1:].contiguous()\n" + _CE),
    Form("chain", "shift by narrow", "z = F.linear(h, W).narrow(1, 0, 4); y = y[:, 1:]\n" + _CE),
    Form("chain", "roll", "z = F.linear(h, W).roll(1, 1)\n" + _CE),
    Form("chain", "index_select", "z = F.linear(h, W).flatten(0, 1)\ni = torch.arange(3, device=h.device)\n"
         "return F.cross_entropy(z.index_select(0, i), y.flatten().index_select(0, i))"),
    Form("chain", "boolean mask", "z = F.linear(h, W)\nreturn F.cross_entropy(z[y > 5], y[y > 5])", "lazy",
         "Dynamo ends its graph at the mask; the logits stay lazy, and the loss outside is cut"),
    Form("chain", "permute to (B, V, T)", "return F.cross_entropy(F.linear(h, W).permute(0, 2, 1), y)"),
    Form("chain", "casts", "z = F.linear(h, W).double().float()\n" + _CE),
    Form("chain", "temperature", "z = F.linear(h, W) / 0.7\n" + _CE),
    Form("chain", "temperature in a tensor", "z = F.linear(h, W) / t\n" + _CE),
    Form("chain", "temperature of each row", "z = F.linear(h, W) * h.sum(-1, keepdim=True)\n" + _CE),
    Form("chain", "temperature in a tensor, half precision",
         "z = F.linear(h.bfloat16(), W.bfloat16()) / t.bfloat16()\n" + _CE, "rows"),
    Form("chain", "soft cap", "z = 5 * torch.tanh(F.linear(h, W) / 5)\n" + _CE),
    Form("chain", "a bias afterwards", "z = F.linear(h, W) + b\n" + _CE),
    Form("chain", "a bias after a bias and a scale", "z = F.linear(h, W, b) * 2 + W2.sum(-1)\n" + _CE),
    Form("chain", "additive mask of classes", "z = F.linear(h, W) + torch.zeros(V, device=h.device).masked_fill(torch.arange(V, device=h.device) >= 60, -torch.inf)\n" + _CE),
    Form("chain", "masked_fill of padded classes",
         "z = F.linear(h, W, b).masked_fill((torch.arange(V, device=h.device) >= 40)[None, None], -torch.inf); y = y.clamp(max=39)\n" + _CE),
    Form("chain", "real classes alone", "z = F.linear(h, W, b)[..., :40]; y = y.clamp(max=39)\n" + _CE),
    Form("chain", "a finite fill", "z = F.linear(h, W).masked_fill(torch.arange(V, device=h.device) > 39, -1e9); y = y.clamp(max=39)\n" + _CE,
         "rows"),
    Form("chain", "an activation", "z = F.linear(h, W).relu()\n" + _CE, "rows"),
    Form("chain", "a mask that differs by row", "z = F.linear(h, W).masked_fill(F.one_hot(y, V).bool().roll(1, -1), -torch.inf)\n" + _CE,
         "rows"),
    Form("chain", "changed in place", "z = F.linear(h, W)\nz[..., 0] = -1.0\n" + _CE, "rows"),
    Form("chain", "logits read elsewhere", "z = F.linear(h, W)\nreturn z.logsumexp(-1).mean() + z.relu().sum()", "rows"),
    Form("chain", "loss over another dimension", "return F.cross_entropy(F.linear(h, W), torch.zeros(y.size(0), V, dtype=torch.long, device=h.device))",
         "CLASS_DIM", "time stands where the vocabulary should"),
    Form("chain", "log_softmax over another dimension",
         "return F.nll_loss(F.linear(h, W).log_softmax(1).flatten(0, 1), y.flatten())", "CLASS_DIM", "time is normalised, not the vocabulary"),
    Form("chain", "statistics over rows", "z = F.linear(h, W).flatten(0, 1)\nreturn ((z - z.mean(0)) / z.std(0)).square().sum(-1).mean()",
         "ROWS_MIXED", "each row's value depends on all others"),
    Form("chain", "softmax over rows", "return F.linear(h, W).softmax(1).square().sum(-1).mean()",
         "ROWS_MIXED", "each row's value depends on all others"),
    Form("chain", "vocabulary reshaped away", "z = F.linear(h, W[:40]).reshape(-1, 20)\nreturn F.cross_entropy(z, torch.zeros(z.size(0), dtype=torch.long, device=h.device))",
         "rows"),
]  # fmt: skip


_FAMILIES = {"head": "Heads", "chain": "Between head and loss", "loss": "Losses"}
_INTRO = """# Forms that are understood

Made by `python -m tests.forms > docs/patterns.md` from the forms that `tests/test_forms.py` runs: each is compiled and compared
with eager and with float64, and no graph may hold a tensor of rows times vocabulary. Where no loss is shown, it is
`F.cross_entropy(z.reshape(-1, z.size(-1)), y.reshape(-1))`. `h` is hidden (B, T, D), `W` and `W2`
weights (V, D), `b` a bias (V,), `y` targets (B, T), `A` (R, D) and `C` (V, R) an adapter, `t` a temperature (1,).

A form marked *kernel* goes to the kernels, and one marked *rows* is run some rows at a time as a program of its own. One marked
*declined* runs as it was written, and `cce_fx.explain` says why.
"""


def markdown() -> str:
    from cce_fx.passes.values import ADVICE

    lines = [_INTRO]
    for family, title in _FAMILIES.items():
        lines += [f"## {title}", "", "| form | as written | |", "|---|---|---|"]
        for form in (f for f in FORMS if f.family == family):
            code = "<br>".join(f"`{line}`" for line in (form.body.removesuffix(_CE).strip() or form.body).splitlines())
            code = code.replace("|", "\\|")
            verdict = {"kernel": "kernel", "rows": "rows", "lazy": f"rewritten outside: {form.why}"}.get(form.verdict)
            reason = "" if form.verdict == "NONE" else f" (`{form.verdict}`)"
            lines.append(f"| {form.name} | {code} | {verdict or f'*declined*{reason}: {form.why}'} |")
        lines.append("")
    lines += ["## Reasons", "", "| reason | meaning | what to change |", "|---|---|---|"]
    lines += [f"| `{reason.name}` | {reason.value} | {advice} |" for reason, advice in ADVICE.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
