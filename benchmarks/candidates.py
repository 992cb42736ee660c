# SPDX-License-Identifier: Apache-2.0
"""Every way to compute the loss of a head that a benchmark compares, as functions of hidden, weight and target."""

from __future__ import annotations

import importlib.util
import itertools
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Call = Callable[[], object]
_numbers = itertools.count()
MODES = ("train", "forward", "eval")  # forward and backward; forward of a training step; without gradients


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        make: gives the mean loss of hidden (N, D), weight (V, D) and target (N,).
        missing: why it cannot run here; empty where it can.
        dense: how many tensors of N by V in float32 it holds at once.
    """

    name: str
    make: Callable[[], Loss]
    missing: str = ""
    dense: int = 0

    def calls(self, hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Call]:
        """A call for each mode, for hidden and weight that require gradients."""
        loss = self.make()
        # The same memory as tensors of its own: a peer may mark sizes as dynamic on those that it is given, for all after it.
        hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
        target = target.detach()

        def train() -> object:
            return torch.autograd.grad(loss(hidden, weight, target), (hidden, weight))

        def evaluate() -> object:
            with torch.no_grad():
                return loss(hidden, weight, target)

        return dict(zip(MODES, (train, lambda: loss(hidden, weight, target), evaluate), strict=True))


@dataclass(frozen=True)
class Bare:
    """The matrix products alone, into buffers that are there beforehand: what no exact implementation can be faster than.

    Attributes:
        products: of a training step; the other modes are one.
    """

    name: str
    products: int
    missing: str = ""
    dense: int = 1

    def calls(self, hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, Call]:
        h, w = hidden.detach(), weight.detach()
        logits = h.new_empty(h.shape[0], w.shape[0])
        d_hidden, d_weight = torch.empty_like(h), torch.empty_like(w)

        def one() -> object:
            return torch.mm(h, w.T, out=logits)

        def three() -> object:
            one()
            torch.mm(logits, w, out=d_hidden)
            return torch.mm(logits.T, h, out=d_weight)

        return {"train": three if self.products == 3 else one, "forward": one, "eval": one}


def dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The loss as models write it: logits in the model's dtype, the loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def compiled(backend: str, **options: object) -> Callable[[], Loss]:
    """`dense` through torch.compile, from code of its own: torch keeps few compilations of one code object.

    And of its own name, by which torch remembers the sizes that it has seen: another size would be compiled as a symbol.
    """

    def make() -> Loss:
        code = dense.__code__.replace(co_name=f"dense_{backend}_{next(_numbers)}")
        own = types.FunctionType(code, dense.__globals__)
        return torch.compile(own, backend=backend, options=options or None)

    return make


def _torch() -> Loss:
    options = torch.nn.LinearCrossEntropyOptions()  # without any it makes the logits
    return lambda h, w, t: F.linear_cross_entropy(h, w, t, options=options)


def _apple(impl: str, filter_eps: str | None) -> Callable[[], Loss]:
    def make() -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        # From torch 2.11 on its float("high") wants a string; None is exact.
        return lambda h, w, t: linear_cross_entropy(h, w, t, impl=impl, filter_eps=filter_eps)

    return make


def _liger() -> Loss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy


def _absent(package: str) -> str:
    return "" if importlib.util.find_spec(package) else f"{package.replace('_', '-')} is not installed"


BARE = (Bare("three products", 3), Bare("one product", 1))


def peers(device: str, filter_eps: float | str | None = None) -> list[Peer]:
    """The implementations by name, eager first and this project's last; `filter_eps` adds this project's with a filter."""
    gpu = device == "cuda"
    only_gpu = "" if gpu else "runs on a GPU only"
    apple = _absent("cut_cross_entropy")
    ours = [
        Peer("cce_fx", compiled("cce")),
        Peer("cce_fx, recompute", compiled("cce", strategy="recompute")),
    ]
    if filter_eps is not None:
        ours.append(Peer(f"cce_fx, filter_eps={filter_eps}", compiled("cce", filter_eps=filter_eps)))
    return [
        Peer("eager", lambda: dense, dense=3),
        Peer("inductor", compiled("inductor"), dense=3),
        Peer("auto_chunker", compiled("inductor", **{"auto_chunker.enable": True}), dense=1),
        Peer("F.linear_cross_entropy", _torch, "" if hasattr(F, "linear_cross_entropy") else "this torch has none"),
        Peer("cut-cross-entropy", _apple("cce", "high"), apple or only_gpu),
        Peer("cut-cross-entropy, exact", _apple("cce", None), apple or only_gpu),
        Peer("cut-cross-entropy, torch_compile", _apple("torch_compile", "high"), apple, dense=3),
        Peer("liger-kernel", _liger, _absent("liger_kernel") or only_gpu),
        *ours,
    ]


SPREADS = {"trained": 2.0, "peaked": 4.0, "random": 0.0}  # by kind of logits: standard deviation of the noise


def inputs(
    n: int, d: int, v: int, dtype: torch.dtype, device: str = "cpu", ignored: float = 0.0, logits: str = "trained"
) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (N, D), weight (V, D) and target (N,) as of a trained head, a part of the targets `ignored`.

    "trained" logits are the logarithm of Zipf's law over the classes plus a noise of standard deviation 2. A target's logit
    is larger by the variance, as it is when targets are drawn from the softmax of such logits. "peaked" ones have more
    noise, and a loss of 2 to 3, as of a model that has been trained for long. "random" ones are standard normal, as before any training.
    """
    spread = SPREADS[logits]
    generator = torch.Generator(device).manual_seed(0)
    hidden, weight = (torch.randn(rows, d, generator=generator, device=device) for rows in (n, v))
    law = -torch.log(torch.arange(v, device=device) + 10.0)
    target = torch.multinomial(law.exp(), n, replacement=True, generator=generator)
    weight *= (spread or 1.0) * d**-0.5
    if spread:
        for chunk in torch.arange(n, device=device).split(8192):
            toward = weight[target[chunk]]
            hidden[chunk] += spread**2 / toward.norm(dim=1, keepdim=True).square() * toward
        hidden[:, 0], weight[:, 0] = 1.0, law
    target[torch.rand(n, generator=generator, device=device) < ignored] = -100
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target
