# SPDX-License-Identifier: Apache-2.0
"""One training pass of each implementation as a list of launches and matrix products, without running any of them.

This project's kernels are recorded by `kernels.triton.device.record`. The peers' are recorded by putting a recorder in
the place of their jitted functions while their own launch code runs on meta tensors, with the block shapes that they
choose where nothing is tuned.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.roofline import Work, product, work_of
from cce_fx.kernels.spec import Needs, Problem, RowGrads
from cce_fx.kernels.triton import forward_backward
from cce_fx.kernels.triton.cost import make_plan
from cce_fx.kernels.triton.device import Launch, record
from cce_fx.kernels.triton.head import make_head
from cce_fx.kernels.triton.machines import Machine


@dataclass
class Pass:
    """Forward and backward of one implementation on one machine."""

    name: str
    launches: list[Launch] = field(default_factory=list)
    products: list[tuple[int, int, int]] = field(default_factory=list)  # by BLAS: m, n, k
    scratch: int = 0  # bytes beyond the gradients and vectors of N

    def works(self, size: int) -> list[Work]:
        return [work_of(x) for x in self.launches] + [product(*p, size) for p in self.products]

    def seconds(self, machine: Machine, dtype: torch.dtype) -> float:
        return sum(w.seconds(machine, dtype) for w in self.works(dtype.itemsize))


class _Products(TorchDispatchMode):
    """Writes down matrix products."""

    def __init__(self, found: list[tuple[int, int, int]]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.found.append((a.shape[0], b.shape[1], a.shape[1]))
        return func(*args, **(kwargs or {}))


def ours(problem: Problem, machine: Machine, strategy: str = "auto", tma: bool = False) -> Pass:
    """This project's kernels: `strategy` as in `kernels.triton.backward`; `tma` loads through tensor descriptors."""
    n = problem.target.shape[0]
    rows = RowGrads(torch.empty(n, dtype=torch.float32, device="meta"))
    made = Pass("cce_fx, TMA" if tma else "cce_fx" if strategy == "auto" else f"cce_fx, {strategy}")
    machine = machine.through_tma() if tma else machine
    with record(machine) as launches, _Products(made.products):
        plan = make_plan(make_head(problem), Needs(), strategy, with_stats=True)
        forward_backward(problem, rows, Needs(), strategy=strategy)
    made.launches, made.scratch = launches, plan.scratch
    return made


def apple(problem: Problem) -> Pass | None:
    """cut-cross-entropy's kernels without filtering; None where the package is missing."""
    modules = [_module(f"cut_cross_entropy.{name}") for name in ("cce_lse_forward", "indexed_dot", "cce_backward")]
    if None in modules:
        return None
    lse_forward, indexed_dot, backward = modules
    made = Pass("cut-cross-entropy, filtering off")
    hidden, weight = problem.hidden, problem.weight.detach().requires_grad_()
    cap = problem.epilogue.softcap
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(_recorded(module, made.launches))
        lse = lse_forward.cce_lse_forward_kernel(hidden, weight, softcap=cap)
        indexed_dot.indexed_neg_dot_forward_kernel(hidden, weight, problem.target, False, None, cap, torch.float32)
        one = torch.empty(1, dtype=torch.float32, device="meta")
        backward.cce_backward_kernel(one, hidden, weight, lse, None, cap, None, targets=problem.target)
    return made


def liger(problem: Problem) -> Pass | None:
    """liger-kernel's chunks: three products by BLAS and a kernel on each; None where the package is missing."""
    ops = _module("liger_kernel.ops.cross_entropy")
    fused = _module("liger_kernel.ops.fused_linear_cross_entropy")
    if ops is None or fused is None:
        return None
    (n, d), v = problem.hidden.shape, problem.weight.shape[0]
    # Its rule: as many rows of logits as hold no more than hidden does.
    rows = min(n, 1 << (-(-n // -(-v // d)) - 1).bit_length())
    made = Pass("liger-kernel", scratch=rows * v * problem.hidden.element_size())
    logits = torch.empty(rows, v, dtype=problem.hidden.dtype, device="meta")
    loss = torch.empty(rows, dtype=torch.float32, device="meta")
    args = dict.fromkeys(ops.liger_cross_entropy_kernel.arg_names)
    args |= {"X_ptr": logits, "X_stride": v, "Y_ptr": problem.target[:rows], "Y_stride": 1, "loss_ptr": loss}
    args |= {"loss_stride": 1, "token_accuracy_stride": 0, "predicted_tokens_stride": 0, "n_cols": v}
    args |= {"n_non_ignore": n, "sum_non_ignore_weight": n, "weight_sum": 0.0, "ignore_index": -100}
    args |= {"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "mean", "softcap": problem.epilogue.softcap}
    args |= dict.fromkeys(("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "HAS_WEIGHT"), False)
    args |= {"HAS_SOFTCAPPING": problem.epilogue.softcap is not None, "HAS_GRADIENTS": True}
    args |= {"BLOCK_SIZE": min(fused.MAX_FUSED_SIZE, 1 << (v - 1).bit_length())}
    for _ in range(0, n, rows):
        made.launches.append(Launch(ops.liger_cross_entropy_kernel, (rows,), args, {"num_warps": 32}))
        made.products += [(rows, v, d), (rows, d, v), (v, d, rows)]
    return made


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@contextlib.contextmanager
def _recorded(module: ModuleType, launches: list[Launch]) -> Iterator[None]:
    """The module with recorders in the place of its jitted functions."""
    kernels = {k: v for k, v in vars(module).items() if k.endswith("_kernel") and hasattr(v, "fn")}
    with mock.patch.multiple(module, **{k: _Recorder(v, launches) for k, v in kernels.items()}):
        yield


class _Recorder:
    """In the place of a kernel under `triton.heuristics`: `kernel[grid](...)` writes the launch down."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            layers, kernel = [], self.kernel
            while hasattr(kernel, "values") and hasattr(kernel, "fn"):
                layers.append(kernel)
                kernel = kernel.fn
            named = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            for layer in layers:
                named |= {name: rule(named) for name, rule in layer.values.items()}
            options = {k: named[k] for k in ("num_warps", "num_stages")}
            size = tuple(grid(named)) if callable(grid) else tuple(grid)
            self.launches.append(Launch(kernel, size, {k: named[k] for k in kernel.arg_names}, options))

        return run


def bfloat16_problem(n: int, d: int, v: int, **options: Any) -> Problem:
    """A problem without values, for recording."""
    meta = lambda *shape: torch.empty(*shape, dtype=torch.bfloat16, device="meta")  # noqa: E731
    target: Tensor = torch.empty(n, dtype=torch.int64, device="meta")
    return Problem(meta(n, d), meta(v, d), None, target, **options)
