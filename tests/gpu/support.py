# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels on the device of the tests, for problems on the CPU, where the float64 answer is made."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cce_fx.kernels import triton
from cce_fx.kernels.spec import Grads, Needs, Norm, Partials, Problem, RowGrads, Stats

T = TypeVar("T")


@dataclass(frozen=True)
class Kernels:
    """The kernels' four functions: arguments go to the device with their strides, and results come back."""

    device: torch.device

    def forward(self, problem: Problem) -> Stats:
        return to_cpu(triton.forward(self.moved(problem)))

    def partial(self, problem: Problem) -> Partials:
        return to_cpu(triton.partial(self.moved(problem)))

    def backward(self, problem: Problem, norm: Norm, grads: RowGrads, needs: Needs, **how: Any) -> Grads:
        found: list[triton.Filter] = []
        out = triton.backward(*self.all_moved(problem, norm, grads), needs, **how | {"report": found})
        _report(how, found)
        return to_cpu(out)

    def forward_backward(self, problem: Problem, grads: RowGrads, needs: Needs, **how: Any) -> tuple[Stats, Grads]:
        found: list[triton.Filter] = []
        stats, out = triton.forward_backward(*self.all_moved(problem, grads), needs, **how | {"report": found})
        _report(how, found)
        return to_cpu(stats), to_cpu(out)

    def all_moved(self, *values: Any) -> list[Any]:
        return [self.moved(value) for value in values]

    def moved(self, value: T) -> T:
        """A problem or a tuple of tensors on the device; itself where that is the CPU."""
        return value if self.device.type == "cpu" else _mapped(value, lambda t: _placed(t, self.device))


def to_cpu(value: T) -> T:
    return _mapped(value, Tensor.cpu)


def _report(how: dict[str, Any], found: list[Any]) -> None:
    if how.get("report") is not None:
        how["report"].extend(to_cpu(x) for x in found)


def _mapped(value: Any, change: Any) -> Any:
    """A dataclass or a named tuple with its tensors changed."""
    one = lambda x: change(x) if isinstance(x, Tensor) else x  # noqa: E731
    if isinstance(value, tuple):
        return type(value)(*map(one, value))
    return replace(value, **{f.name: one(getattr(value, f.name)) for f in fields(value) if f.init})


def _placed(t: Tensor, device: torch.device) -> Tensor:
    """A copy on the device with the same strides, which `Tensor.to` keeps only without gaps and repetitions."""
    whole = torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())
    return whole.to(device).as_strided(t.size(), t.stride(), t.storage_offset())
