# SPDX-License-Identifier: Apache-2.0
"""Vocabulary parallelism: each process sweeps its own columns; loss and gradients are those of one process."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleOutput,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from cce_fx import distributed, linear_cross_entropy

from .support import Graphs, Workers, assert_same, collectives, gradients, whole

BATCH, LENGTH, WIDTH, VOCAB = 2, 12, 8, 131  # no multiple of the number of processes
ROWS = BATCH * LENGTH


class Model(nn.Module):
    def __init__(self, vocab: int = VOCAB, bias: bool = False, **loss: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocab, bias=bias)
        self.loss = loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(self.norm(self.trunk(x)))
        return F.cross_entropy(z.flatten(0, 1), y.flatten(), **self.loss)


def data(vocab: int = VOCAB) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=gen)
    y = torch.randint(vocab, (BATCH, LENGTH), generator=gen)
    y[0, :3] = -100
    return x, y


PLANS: dict[str, Callable[[], dict[str, Any]]] = {
    "replicated": lambda: {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)},
    "sequence": lambda: {
        "trunk": PrepareModuleOutput(
            output_layouts=Replicate(), desired_output_layouts=Shard(1), use_local_output=False
        ),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    },
    "gathered": lambda: {"head": ColwiseParallel(output_layouts=Replicate())},
}


def parallel_step(plan: str, how: dict[str, Any]) -> None:
    """One step of a parallel model under `loss_parallel`, which a program does not need for gathered logits."""
    world = dist.get_world_size()
    one, model = Model(**how), Model(**how)
    parallelize_module(model, init_device_mesh("cpu", (world,)), PLANS[plan]())
    vocab = how.get("vocab", VOCAB)
    x, y = data(vocab)
    graphs = Graphs()
    counters.clear()
    with contextlib.nullcontext() if plan == "gathered" else loss_parallel():
        value = torch.compile(model, backend="cce", options=graphs.options | {"min_vocab": 0})(x, y)
        value.sum().backward()
    expected = one(x, y)
    expected.sum().backward()
    assert_same({"loss": whole(value)} | gradients(model), {"loss": expected} | gradients(one))
    assert counters["cce_fx"]["rewritten"] == 1
    numbers = 4 if how.get("label_smoothing") else 3
    assert collectives(graphs.forward)[-1] == ("all_gather_into_tensor", numbers * 4 * ROWS)
    if vocab == VOCAB:
        assert graphs.largest() < ROWS * vocab // world
    if plan == "replicated":
        assert len(collectives(graphs.forward)) == 1
        assert collectives(graphs.backward) == [("all_reduce", 4 * ROWS * WIDTH)]
    if plan == "sequence":  # hidden is gathered for both passes, and d_hidden is scattered
        kinds = [name for name, _ in collectives(graphs.forward) + collectives(graphs.backward)]
        assert kinds[:2] == ["all_gather_into_tensor"] * 2
        assert ("reduce_scatter_tensor", 4 * ROWS * WIDTH) in collectives(graphs.backward)
        assert ("all_reduce", 4 * ROWS * WIDTH) not in collectives(graphs.backward)


FORMS = {
    "a plain head": ("replicated", {}),
    "a bias": ("replicated", {"bias": True}),
    "a sum": ("replicated", {"reduction": "sum"}),
    "one loss a row": ("replicated", {"reduction": "none"}),
    "hidden divided by sequence": ("sequence", {}),
    "logits gathered": ("gathered", {}),
    "logits gathered, smoothed, with a bias": ("gathered", {"label_smoothing": 0.1, "bias": True}),
    "fewer classes than a block for each": ("replicated", {"vocab": 5, "bias": True}),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", FORMS)
def test_a_parallel_head_is_cut(two: Workers, form: str) -> None:
    two.run(parallel_step, *FORMS[form])


@pytest.mark.sample(2)
@pytest.mark.parametrize("form", ["a plain head", "fewer classes than a block for each"])
def test_four_processes_of_which_one_may_hold_no_class(four: Workers, form: str) -> None:
    four.run(parallel_step, *FORMS[form])


class Grid(nn.Module):
    """A model of DTensors on a mesh of (sequence, vocabulary)."""

    def __init__(self, form: str, mesh: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)
        self.form = form
        if mesh is not None:
            distribute_module(self.trunk, mesh, _replicate)
            distribute_module(self.head, mesh, _divide)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.head(torch.tanh(self.trunk(x)))
        if self.form == "rows of a batch":
            return F.cross_entropy(z.flatten(0, 1), y.flatten(), reduction="sum") / (y != -100).sum()
        if self.form == "classes second":
            return F.cross_entropy(z.transpose(1, 2), y, reduction="none").sum() / 7
        return F.cross_entropy(z, y, reduction="sum") / (y != -100).sum()


def _replicate(name: str, module: nn.Module, mesh: Any) -> None:
    _place(module, mesh, (Replicate(), Replicate()))


def _divide(name: str, module: nn.Module, mesh: Any) -> None:
    _place(module, mesh, (Replicate(), Shard(0)))


def _place(module: nn.Module, mesh: Any, placements: Any) -> None:
    for key, p in list(module.named_parameters()):
        module.register_parameter(key, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))


def grid_step(form: str) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("sequence", "vocabulary"))
    one, model = Grid(form), Grid(form, mesh)
    x, y = data()
    if form == "an uneven sequence":
        x, y = x[0, :11], y[0, :11]
        y[:6] = -100  # all rows of half the processes
    placed = [distribute_tensor(t, mesh, (Shard(0), Replicate())) for t in (x, y)]
    graphs = Graphs()
    counters.clear()
    with loss_parallel():
        value = torch.compile(model, backend="cce", options=graphs.options)(*placed)
        value = value.full_tensor()
        value.backward()
    expected = one(x, y)
    expected.backward()
    assert_same({"loss": value} | gradients(model), {"loss": expected} | gradients(one))
    assert counters["cce_fx"]["rewritten"] == 1
    assert graphs.largest() < ROWS * VOCAB // 4


@pytest.mark.skipif(torch.__version__ < "2.12", reason="loss_parallel of torch 2.11 knows meshes of one dimension only")
@pytest.mark.sample(3)
@pytest.mark.parametrize("form", ["rows of a batch", "classes second", "an uneven sequence"])
def test_sequence_and_vocabulary_on_a_mesh_of_four(four: Workers, form: str) -> None:
    four.run(grid_step, form)


def own_means() -> None:
    """`F.cross_entropy`'s mean of DTensors divided by rows: the torches before 2.15 average the processes' own means."""
    mesh = init_device_mesh("cpu", (2,))
    gen = torch.Generator().manual_seed(0)
    h, w = torch.randn(ROWS, WIDTH, generator=gen), torch.randn(VOCAB, WIDTH, generator=gen)
    y = torch.randint(VOCAB, (ROWS,), generator=gen)
    y[:5] = -100  # of one process
    h, y = (distribute_tensor(t, mesh, [Shard(0)]) for t in (h, y))
    w = distribute_tensor(w, mesh, [Replicate()]).requires_grad_()

    def loss(h: Any, w: Any, y: Any) -> Any:
        return F.cross_entropy(F.linear(h, w), y)

    counters.clear()
    found = torch.compile(loss, backend="cce", options={"inner": "aot_eager"})(h, w, y)
    expected = loss(h, w, y)
    assert_same({"loss": whole(found)}, {"loss": whole(expected)})
    averages = expected.placements[0].is_partial("avg")
    assert counters["cce_fx"] == ({"rewritten": 0, "declined_subclass": 1} if averages else {"rewritten": 1})


def test_an_average_of_means_is_left_alone(two: Workers) -> None:
    two.run(own_means)


# --- plain tensors -----------------------------------------------------------------------------------------------------


def plain_step(how: dict[str, Any]) -> None:
    """Megatron's layout: each process holds rows of the weight, the last of which may be padding."""
    rank, world = dist.get_rank(), dist.get_world_size()
    held = -(-VOCAB // world) + 3  # so that the last classes of the last process are padding
    gen = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, WIDTH, generator=gen) for n in (ROWS, held * world))
    bias, target = torch.randn(held * world, generator=gen), torch.randint(VOCAB, (ROWS,), generator=gen)
    target[:4] = -100
    if how.get("class_weight") == "drawn":
        how = {**how, "class_weight": torch.rand(VOCAB, generator=gen)}
    given = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
    expected = linear_cross_entropy(given[0], given[1][:VOCAB], target, bias=given[2][:VOCAB], **how)
    (expected * 3).sum().backward()
    mine = slice(rank * held, (rank + 1) * held)
    ours = [t.clone().requires_grad_() for t in (hidden, weight[mine], bias[mine])]
    value = distributed.linear_cross_entropy(
        ours[0], ours[1], target, bias=ours[2], vocab_group=dist.group.WORLD, classes=VOCAB, **how
    )
    (value * 3).sum().backward()
    wanted = [given[0].grad, given[1].grad[mine], given[2].grad[mine]]
    names = ["hidden", "weight", "bias"]
    assert_same(
        {"loss": value, **{n: t.grad for n, t in zip(names, ours)}}, {"loss": expected, **dict(zip(names, wanted))}
    )


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"reduction": "none", "softcap": 5.0},
        {"label_smoothing": 0.1, "reduction": "sum"},
        {"label_smoothing": 0.1, "class_weight": "drawn"},
    ],
    ids=str,
)
def test_plain_shards_of_a_padded_vocabulary(two: Workers, how: dict[str, Any]) -> None:
    two.run(plain_step, how)


def rows_step() -> None:
    """Sequences of different lengths, one of which is ignored as a whole, beside a divided vocabulary (2 x 2)."""
    mesh = init_device_mesh("cpu", (2, 2))
    (part, column), held = mesh.get_coordinate(), -(-VOCAB // 2)
    gen = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(ROWS, WIDTH, generator=gen), torch.randn(2 * held, WIDTH, generator=gen)
    target = torch.randint(VOCAB, (ROWS,), generator=gen)
    target[:7] = -100
    given = [t.clone().requires_grad_() for t in (hidden, weight)]
    expected = linear_cross_entropy(given[0], given[1][:VOCAB], target)
    expected.backward()
    rows, columns = (slice(0, 7), slice(7, ROWS))[part], slice(column * held, (column + 1) * held)
    ours = [t.clone().requires_grad_() for t in (hidden[rows], weight[columns])]
    value = distributed.linear_cross_entropy(
        *ours, target[rows], vocab_group=(mesh, 1), row_groups=((mesh, 0),), classes=VOCAB
    )
    value.backward()
    dist.all_reduce(ours[1].grad, group=mesh.get_group(0))
    assert_same({"loss": value, "weight": ours[1].grad}, {"loss": expected, "weight": given[1].grad[columns]})
    error = (ours[0].grad - given[0].grad[rows]).abs().max()
    assert error <= 1e-5 * given[0].grad.abs().max()


def test_uneven_sequences_of_which_one_is_ignored(four: Workers) -> None:
    four.run(rows_step)


# --- faults -------------------------------------------------------------------------------------------------------------


def differing_options() -> str:
    model = parallelize_module(Model(137), init_device_mesh("cpu", (2,)), PLANS["replicated"]())
    least = 0 if dist.get_rank() == 0 else 1000
    options = {"inner": "aot_eager", "min_vocab": least}
    try:
        with loss_parallel():
            torch.compile(model, backend="cce", options=options)(*data())
    except Exception as error:
        return str(error)
    return "no error"


def test_options_that_differ_are_an_error_in_both(two: Workers) -> None:
    for message in two.run(differing_options):
        assert "processes differ in the options of the loss at" in message and "min_vocab=0" in message


def dies_in_the_middle() -> None:
    hidden, weight = torch.randn(ROWS, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    target = torch.zeros(ROWS, dtype=torch.int64)
    value = distributed.linear_cross_entropy(
        hidden, weight, target, vocab_group=dist.group.WORLD, start=0, classes=VOCAB
    )
    if dist.get_rank() == 1:
        os._exit(9)
    value.backward()


def test_a_process_that_ends_in_the_middle_of_a_step_is_torchs_error_in_the_others() -> None:
    workers = Workers(2, timeout=20)
    try:
        start = time.monotonic()
        (survived, message), (other, ended) = workers.outcomes(dies_in_the_middle)
        assert not survived and "RuntimeError" in message and "all_reduce" in message
        assert not other and ended == "the process ended"
        assert time.monotonic() - start < 60  # the start of the processes and one timeout
    finally:
        workers.stop()
