# SPDX-License-Identifier: Apache-2.0
"""The whole of `torch.compile(model, backend="cce")` on a small model, with the GPU's kernels at the end of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import cce_fx
from cce_fx.kernels import triton
from cce_fx.options import Options


class Model(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 24)
        self.head = nn.Linear(24, 97, bias=bias)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        logits = self.head(torch.tanh(self.embed(tokens))).float()
        return F.cross_entropy(logits.view(-1, 97), labels.view(-1), label_smoothing=smoothing)


pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_model_trains_through_the_triton_kernels(device, bias, smoothing, monkeypatch):
    calls = []
    for name in ("forward", "forward_backward"):
        real = getattr(triton, name)
        monkeypatch.setattr(triton, name, lambda *a, _real=real, _name=name, **k: calls.append(_name) or _real(*a, **k))
    torch.manual_seed(0)
    model, tokens = Model(bias).to(device), torch.randint(97, (3, 11), device=device)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = -100
    expected = model(tokens, labels, smoothing)
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    compiled = torch.compile(model, backend="cce", options={"inner": "aot_eager", "min_vocab": 0})
    loss = compiled(tokens, labels, smoothing)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, labels, smoothing), expected)
    assert calls == ["forward_backward", "forward"]
    assert "rewritten" in str(cce_fx.explain(model, tokens, labels, smoothing, options=Options(min_vocab=0)))
