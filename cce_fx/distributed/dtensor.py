# SPDX-License-Identifier: Apache-2.0
"""Losses of DTensors: which layouts are understood, and the function that stands in a rewritten graph.

A program of DTensors computes what it would on one process with the whole tensors; placements only say where the pieces lie. So a
loss is taken of hidden, weight and target by their placements alone, and whatever was between head and loss does not matter.
Collectives on weight and hidden are DTensor's own: a shard's d_hidden is handed on as `Partial`, which becomes an all-reduce, or
a reduce-scatter where hidden was gathered from shards of the sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from ..functional import KernelSpec, LossSpec, Reduction, site_loss
from ..kernels.combine import statistics_dtype
from ..kernels.spec import Epilogue, Needs
from .vocab import Divided, VocabShard


@dataclass(frozen=True)
class Layout:
    """Where the pieces of a head lie: one entry per dimension of the mesh, of which each divides one thing at most."""

    mesh: DeviceMesh
    vocab: int | None  # the mesh's dimension that divides the vocabulary
    rows: tuple[int, ...]  # its dimensions that divide rows

    def of_weight(self) -> list[Placement]:
        """Of weight (V, D) and bias (V,)."""
        return [Shard(0) if m == self.vocab else Replicate() for m in range(self.mesh.ndim)]

    def grad_of_weight(self) -> list[Placement]:
        return [Partial() if m in self.rows else p for m, p in enumerate(self.of_weight())]

    def grad_of_hidden(self, placements: tuple[Placement, ...]) -> list[Placement]:
        return [Partial() if m == self.vocab else p for m, p in enumerate(placements)]

    def of_total(self) -> list[Placement]:
        """Of a sum over all rows, of which each process has its own rows' part."""
        return [Partial() if m in self.rows else Replicate() for m in range(self.mesh.ndim)]

    def shard(self, classes: int) -> VocabShard | None:
        """This process's classes, divided as torch.chunk divides, which is DTensor's rule; None where it has all of them."""
        if self.vocab is None:
            return None
        size, rank = -(-classes // self.mesh.size(self.vocab)), self.mesh.get_local_rank(self.vocab)
        return VocabShard((self.mesh, self.vocab), min(size * rank, classes), classes)


def layout_of(hidden: Any, weight: Any, transposed: bool = False) -> Layout | str:
    """The layout of a hidden state (..., D) and a weight (V, D), or (D, V) if transposed; or why it is not understood."""
    if not (isinstance(hidden, DTensor) and isinstance(weight, DTensor)):
        return "hidden and weight are not both DTensors"
    mesh = weight.device_mesh
    if hidden.device_mesh != mesh:
        return "hidden and weight lie on different meshes"
    # Types and not is_shard(): a strided shard, of several parallelisms over one dimension, is no run of classes.
    vocab = [m for m, p in enumerate(weight.placements) if type(p) is Shard and p.dim == int(transposed)]
    other = [p for m, p in enumerate(weight.placements) if m not in vocab and not p.is_replicate()]
    if other or len(vocab) > 1:
        return f"weight is placed {weight.placements}"
    last = hidden.dim() - 1
    rows = [m for m, p in enumerate(hidden.placements) if type(p) is Shard and p.dim % hidden.dim() != last]
    other = [p for m, p in enumerate(hidden.placements) if m not in rows and not p.is_replicate()]
    if other or set(rows) & set(vocab):
        return f"hidden is placed {hidden.placements} and weight {weight.placements}"
    return Layout(mesh, vocab[0] if vocab else None, tuple(rows))


def sharded_loss(
    hidden: DTensor,  # (..., D)
    weight: DTensor,  # (V, D)
    bias: DTensor | None,  # (V,)
    target: Tensor,  # (...), a DTensor or the same in every process
    class_weight: Tensor | None,  # (V,), likewise
    reduction: Reduction,
    ignore_index: int,
    label_smoothing: float,
    scale: float,
    softcap: float | None,
    post_scale: float,
    needs: tuple[bool, bool, bool] | None,
    workspace: int | None,
    reduce_hidden: bool,
) -> DTensor:
    """The loss of a head of DTensors: () for "mean" and "sum", `Partial` over the dimensions that divide rows; else as target.

    `reduce_hidden` says whether d_hidden is summed over the vocabulary here; else it is handed on as `Partial`, which the
    operation before hidden has to take. `needs` as `KernelSpec`, None where the classes are divided. Raises ValueError for a
    layout that is not understood.
    """
    layout = layout_of(hidden, weight)
    if isinstance(layout, str):
        raise ValueError(layout)
    mesh = layout.mesh
    if reduce_hidden:  # to the placement that it has, whose backward adds up parts of a gradient
        hidden = hidden.redistribute(mesh, hidden.placements)
    local_hidden = hidden.to_local(grad_placements=layout.grad_of_hidden(hidden.placements))
    local_weight, local_bias = (
        None
        if t is None
        else t.redistribute(mesh, layout.of_weight()).to_local(grad_placements=layout.grad_of_weight())
        for t in (weight, bias)
    )
    local_target = _local(target, mesh, list(hidden.placements))
    whole_class_weight = None if class_weight is None else _local(class_weight, mesh, [Replicate()] * mesh.ndim)
    shard = layout.shard(weight.shape[0])
    division = Divided(shard, tuple((mesh, m) for m in layout.rows), reduce_hidden=False)
    loss = LossSpec(reduction, ignore_index, label_smoothing, Epilogue(scale, softcap, post_scale))
    kernel = KernelSpec(None if needs is None else Needs(*needs), autocast=False, workspace=workspace)
    out, _ = site_loss(
        local_hidden.reshape(-1, local_hidden.shape[-1]),
        local_weight,
        local_bias,
        local_target.reshape(-1),
        whole_class_weight,
        weight.shape[0],
        statistics_dtype(hidden.dtype),
        loss,
        kernel,
        division,
    )
    if reduction != "none":
        return DTensor.from_local(out, mesh, layout.of_total(), run_check=False)
    stride = target.stride()
    return DTensor.from_local(
        out.view(local_target.shape), mesh, hidden.placements, run_check=False, shape=target.shape, stride=stride
    )


REPLICATED = "replicated"


def spelled(placements: Sequence[Placement]) -> tuple[str | int, ...] | None:
    """Placements in plain words, as the argument of a node (torch 2.11 takes no others); None where there is no word for one.

    A dimension for `Shard`, the operation for `Partial`.
    """
    found: list[str | int] = []
    for placement in placements:
        if type(placement) is Shard:
            found.append(placement.dim)
        elif type(placement) is Partial:
            found.append(placement.reduce_op)
        elif placement.is_replicate():
            found.append(REPLICATED)
        else:
            return None
    return tuple(found)


def placed(values: DTensor, spelling: Sequence[str | int]) -> DTensor:
    """`values` as the placements that `spelled` put into words."""
    return values.redistribute(placements=[_placement(word) for word in spelling])


def _placement(word: str | int) -> Placement:
    if isinstance(word, int):
        return Shard(word)
    return Replicate() if word == REPLICATED else Partial(word)


def _local(values: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> Tensor:
    """This process's piece of a tensor without gradient; a plain one is taken to be the same everywhere."""
    if not isinstance(values, DTensor):
        values = DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return values.redistribute(mesh, placements).to_local()
