# SPDX-License-Identifier: Apache-2.0
"""Vocabulary parallelism over plain tensors: each process sweeps its own columns.

Forward: one all-gather of a few numbers a row (max, sumexp, target logit, and the smoothed part where wanted), combined in the
order of the ranks, so that every process has the same bits. Backward: one all-reduce of d_hidden, or none where the caller sums
it itself. Source: Cut Cross-Entropy, arXiv 2411.09009; the division of the vocabulary is Megatron-LM's, arXiv 1909.08053.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .._torch import functional_collectives as funcol
from ..functional import (
    Division,
    KernelSpec,
    LossSpec,
    Reduction,
    autocast_dtype,
    check_class_weight,
    check_shapes,
    site_loss,
)
from ..kernels.combine import combine, finish, statistics_dtype
from ..kernels.spec import Epilogue, Needs, Partials
from .agree import agree
from .op import shard_problem

Group = (
    Any  # what functional collectives take: a ProcessGroup, a DeviceMesh of one dimension, or (DeviceMesh, dimension)
)


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, start + V) of `classes`, of which `group` together holds all, each process its own."""

    group: Group
    start: int
    classes: int


@dataclass(frozen=True)
class Divided(Division):
    """A loss whose vocabulary, or rows, or both are divided.

    Attributes:
        shard: this process's columns; None where it holds the whole vocabulary.
        rows: the groups of processes that hold other rows; a loss over all rows adds up over each of them.
        reduce_hidden: whether d_hidden is summed over the vocabulary's group here, or left to the caller.
    """

    shard: VocabShard | None
    rows: tuple[Group, ...] = ()
    reduce_hidden: bool = True

    def over_rows(self, total: Tensor) -> Tensor:
        for group in self.rows:
            total = funcol.all_reduce(total, "sum", group)
        return total

    def statistics(self, *values: Any) -> tuple[Tensor, ...]:
        if self.shard is None:
            return torch.ops.cce.linear_cross_entropy.default(*values)
        return _Statistics.apply(*values[:5], values[5:], self.shard, self.reduce_hidden)


class _Statistics(torch.autograd.Function):
    """nll (N,), lse (N,) and smooth (N,) or (0,) of rows that every process of the shard's group holds."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D), of this shard
        bias: Tensor | None,  # (V,)
        target: Tensor,  # (N,) in [0, classes)
        class_weight: Tensor | None,  # (classes,)
        rest: tuple[Any, ...],
        shard: VocabShard,
        reduce_hidden: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = (hidden, weight, bias, target, class_weight, *rest)
        place = (shard.start, shard.classes)
        found = Partials(*torch.ops.cce.linear_cross_entropy_partial.default(*head, *place))
        whole = combine(_gathered(found, rest[2], shard.group))
        stats = finish(whole, shard_problem(head, *place))
        ctx.save_for_backward(hidden, weight, bias, target, class_weight, *stats.norm)
        ctx.rest, ctx.shard, ctx.reduce_hidden = rest, shard, reduce_hidden
        ctx.set_materialize_grads(False)
        return stats.nll, stats.lse, stats.smooth

    @staticmethod
    def backward(ctx: Any, nll: Tensor | None, lse: Tensor | None, smooth: Tensor | None) -> tuple[Tensor | None, ...]:
        head, norm = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        needs = Needs(*ctx.needs_input_grad[:3])
        if nll is None and lse is None and smooth is None:
            return (None,) * 8
        made = torch.ops.cce.linear_cross_entropy_shard_backward.default(
            *head,
            *ctx.rest,
            ctx.shard.start,
            ctx.shard.classes,
            *norm,
            nll,
            lse,
            smooth if ctx.rest[2] else None,
            *needs,
        )
        if needs.hidden and ctx.reduce_hidden:
            made = (_waited(funcol.all_reduce(made[0], "sum", ctx.shard.group)), *made[1:])
        return (*(g if need else None for g, need in zip(made, needs, strict=True)), *(None,) * 5)


def _waited(t: Tensor) -> Tensor:
    """A plain tensor: a gradient that is still on its way would be kept in `.grad` as it is, its error unseen."""
    return t.wait() if isinstance(t, funcol.AsyncCollectiveTensor) else t


def _gathered(mine: Partials, smooth: bool, group: Group) -> list[Partials]:
    """The partials of every process of the group, in the order of the ranks, by one all-gather."""
    sent = torch.stack(mine[:4] if smooth else mine[:3])
    every = funcol.all_gather_tensor(sent, 0, group).view(-1, *sent.shape)
    return [Partials(*part[:3], part[3] if smooth else mine.smooth) for part in every.unbind(0)]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    vocab_group: Group | None = None,
    row_groups: tuple[Group, ...] = (),
    start: int | None = None,
    classes: int | None = None,
    reduce_hidden: bool = True,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    scale: float = 1.0,
    softcap: float | None = None,
    post_scale: float = 1.0,
    workspace: int | None = None,
) -> Tensor:
    """`cce_fx.linear_cross_entropy` where processes hold parts of the vocabulary, of the rows, or of both.

    Args:
        hidden: (..., D) floating; the same in every process of `vocab_group`.
        weight: (V, D), the classes [start, start + V) of this process.
        target: (...) int64 class indices in [0, classes), or ignore_index; the same in every process of `vocab_group`.
        vocab_group: the processes that together hold the vocabulary; None where weight is whole.
        row_groups: groups of processes that hold other rows (sequence, context or data parallelism); their numbers of rows may
            differ.
        start: this process's first class; None where every process of `vocab_group` holds V, in the order of its ranks.
        classes: of the whole vocabulary; None is all columns. Columns from there on are padding, and are left out.
        reduce_hidden: sum d_hidden over `vocab_group` in the backward. False where a function around hidden does it.
        bias: (V,) of this process, optional.
        class_weight: (classes,) of the whole vocabulary, optional.
        reduction, ignore_index, label_smoothing, scale, softcap, post_scale, workspace: as `cce_fx.linear_cross_entropy`.

    Returns:
        float32 (float64 for float64 inputs): "mean" and "sum" are over all rows, of `row_groups` too, and the same in every
        process; "none" has the shape of target. Gradients are those of the one loss: of hidden, for this process's rows, and of
        weight and bias, from this process's rows, so that they are to be *summed* over `row_groups`. DistributedDataParallel and
        FSDP average: multiply the loss by the number of their processes, or set FSDP's gradient divide factor to 1.

    Raises:
        ValueError, TypeError, IndexError: as `cce_fx.linear_cross_entropy`.
        RuntimeError: processes of `vocab_group` or `row_groups` that differ in an argument that has to be the same.
    """
    check_shapes(hidden, weight, target)
    loss = LossSpec(reduction, ignore_index, label_smoothing, Epilogue(scale, softcap, post_scale))
    shard = None if vocab_group is None else _shard(vocab_group, weight.shape[0], start, classes)
    total = shard.classes if shard else weight.shape[0] if classes is None else classes
    check_class_weight(class_weight, total)
    for group in (*(() if shard is None else (vocab_group,)), *row_groups):
        _agree(group, loss, total)
    held = max(0, min(weight.shape[0], total - (shard.start if shard else 0)))
    if held < weight.shape[0]:
        weight, bias = weight[:held], None if bias is None else bias[:held]
    hidden, weight, bias = _autocast(hidden, weight, bias)
    division = Divided(shard, row_groups, reduce_hidden)
    kernel = KernelSpec(None, autocast=False, workspace=workspace)
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    dtype = statistics_dtype(hidden.dtype)
    mine, _ = site_loss(rows, weight, bias, target.reshape(-1), class_weight, total, dtype, loss, kernel, division)
    if reduction == "none":
        return mine.view(target.shape)
    whole = division.over_rows(mine.detach())
    return mine + (whole - mine.detach()) if row_groups else mine


def _shard(group: Group, held: int, start: int | None, classes: int | None) -> VocabShard:
    resolved = process_group(group)
    start = resolved.rank() * held if start is None else start
    return VocabShard(group, start, resolved.size() * held if classes is None else classes)


def _agree(group: Group, loss: LossSpec, classes: int) -> None:
    if not torch.compiler.is_compiling():  # what is being compiled is a graph, which a store is no part of
        agree(process_group(group), "linear_cross_entropy", f"{loss}, {classes} classes")


def process_group(group: Group) -> dist.ProcessGroup:
    """The process group that functional collectives would use."""
    if isinstance(group, dist.ProcessGroup):
        return group
    mesh, dim = group if isinstance(group, tuple) else (group, 0)
    return mesh.get_group(dim)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As F.linear under autocast."""
    dtype = autocast_dtype(hidden)
    if dtype is None:
        return hidden, weight, bias
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
