"""Every way to compute the loss of a head that a benchmark compares, as functions of hidden, weight and target."""

from __future__ import annotations

import importlib.util
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Attributes:
        make: gives the mean loss of hidden (N, D), weight (V, D) and target (N,).
        missing: why it cannot run here; empty where it can.
    """

    name: str
    make: Callable[[], Loss]
    missing: str = ""


def dense(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The loss as models write it: logits in the model's dtype, the loss in float32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), target)


def compiled(backend: str, **options: object) -> Callable[[], Loss]:
    """`dense` through torch.compile, from code of its own: torch keeps few compilations of one code object."""

    def make() -> Loss:
        own = types.FunctionType(dense.__code__.replace(co_name=f"dense_{backend}"), dense.__globals__)
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


def peers(device: str) -> list[Peer]:
    """The implementations by name, eager first and this project's last."""
    gpu = device == "cuda"
    only_gpu = "" if gpu else "runs on a GPU only"
    apple = _absent("cut_cross_entropy")
    return [
        Peer("eager", lambda: dense),
        Peer("inductor", compiled("inductor")),
        Peer("auto_chunker", compiled("inductor", **{"auto_chunker.enable": True}), only_gpu),
        Peer("F.linear_cross_entropy", _torch, "" if hasattr(F, "linear_cross_entropy") else "this torch has none"),
        Peer("cut-cross-entropy", _apple("cce", "high"), apple or only_gpu),
        Peer("cut-cross-entropy, exact", _apple("cce", None), apple or only_gpu),
        Peer("cut-cross-entropy, torch_compile", _apple("torch_compile", "high"), apple),
        Peer("liger-kernel", _liger, _absent("liger_kernel") or only_gpu),
        Peer("cce_fx", compiled("cce")),
        Peer("cce_fx, recompute", compiled("cce", strategy="recompute")),
    ]
