# SPDX-License-Identifier: Apache-2.0
"""A sequential recommender with a full softmax over all its items, eager against cce.

    python examples/recommender.py                       500,000 items, about a minute on two cores; 1,000,000 on a GPU
    python examples/recommender.py --items 2000000       more items (eager takes about 4 KiB of memory for each)

With that many classes the logits dwarf the model, which is why recommenders usually sample a few hundred negatives and
live with the bias. Here the loss sees every item. The model is a small SASRec: self-attention over what a user chose so
far predicts what comes next, and the table of items is both the input's embedding and the head. Each way of running has
a process of its own, the same seed and the same users.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from support import devices, memory, report, runs
from support.files import write_whole
from torch import nn

SEED = 7
PADDING = 0  # item 0 fills up short histories; it is never a target
GENRES = 1000
SIZES = {
    "cpu": {"items": 500_000, "width": 64, "users": 8, "length": 32},
    "cuda": {"items": 1_000_000, "width": 128, "users": 32, "length": 32},
}
STAY = 0.9  # how likely the next choice is of the same genre


def choose(users: int, length: int, items: int, generator: torch.Generator) -> torch.Tensor:
    """Made-up histories, (users, length + 1): users stay in a genre for a while, and some items are far more popular.

    Short histories start with padding, as they do in practice.
    """
    per_genre = max(1, (items - 1) // GENRES)
    draw = torch.rand(users, length + 1, 3, generator=generator)
    fresh = (draw[..., 0] * GENRES).long()
    moves = draw[..., 1] > STAY
    moves[:, 0] = True
    last_move = torch.where(moves, torch.arange(length + 1), 0).cummax(dim=1).values
    genre = fresh.gather(1, last_move)
    rank = (per_genre ** draw[..., 2]).long() - 1  # log-uniform: the popularity of rank r falls like 1/r
    chosen = (1 + genre * per_genre + rank.clamp(0, per_genre - 1)).clamp(max=items - 1)
    begin = torch.randint(length // 2 + 1, (users, 1), generator=generator)
    return chosen.masked_fill(torch.arange(length + 1) < begin, PADDING)


class SASRec(nn.Module):
    def __init__(self, items: int, width: int, length: int, layers: int = 2):
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=PADDING)
        self.positions = nn.Embedding(length, width)
        nn.init.normal_(self.items.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length), persistent=False)

    def forward(self, history: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
        h = self.items(history) + self.positions.weight
        for layer in self.layers:
            h = layer(h, src_mask=self.mask, is_causal=True)
        scores = self.norm(h) @ self.items.weight.T  # (users, length, items)
        return F.cross_entropy(scores.flatten(0, 1), following.flatten(), ignore_index=PADDING)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, histories: torch.Tensor, autocast) -> torch.Tensor:
    with memory.phase("forward"), autocast():
        loss = model(histories[:, :-1].contiguous(), histories[:, 1:].contiguous())
    with memory.phase("backward"):
        loss.backward()
    with memory.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def train(
    mode: str, steps: int, items: int, width: int, users: int, length: int, device: str, dtype: str
) -> None:  # fmt: skip
    """One way of running, in its own process; reports to the parent."""
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model, autocast = SASRec(items, width, length).to(device), devices.autocast(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    compiled = model if mode == "eager" else torch.compile(model, backend=mode)
    for step in range(steps):
        histories = choose(users, length, items, generator).to(device)
        begin = time.perf_counter()
        loss = train_step(compiled, optimizer, histories, autocast)
        runs.emit(step=step, loss=loss.item(), seconds=time.perf_counter() - begin)
    own = memory.own_bytes(model, optimizer)
    trace = memory.trace_step(lambda: train_step(compiled, optimizer, histories, autocast), device)
    runs.emit(done={"own": own, "trace": trace.to_dict()})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    devices.add_arguments(parser, SIZES)
    add("--steps", type=int, default=10, help="training steps")
    add("--only", default="eager,cce", help="which ways to run, separated by commas: eager, inductor, cce")
    add("--out", type=Path, default=Path("out"), help="folder for the figures")
    add("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    devices.settle(arguments, SIZES)
    arguments.only = [mode for mode in arguments.only.split(",") if mode]
    if unknown := set(arguments.only) - set(runs.MODES):
        parser.error(f"--only knows {', '.join(runs.MODES)}; not {', '.join(sorted(unknown))}")
    return arguments


def run_all(arguments: argparse.Namespace, console: Console) -> dict:
    settings = {name: getattr(arguments, name) for name in (*SIZES["cpu"], "steps", "device", "dtype")}
    results = {}
    for mode in arguments.only:
        with console.status(f"{mode}: starting") as status:

            def show(record, mode=mode, status=status):
                status.update(f"{mode}: step {record['step'] + 1} of {arguments.steps}, loss {record['loss']:.3f}")

            log = arguments.out / "logs" / f"recommender-{mode}.log"
            results[mode] = runs.run_child(__file__, settings | {"mode": mode}, log, show)
    return results


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.child:
        train(**json.loads(arguments.child))
        return 0
    console = Console()
    runs.stop_on_sigterm()
    try:
        results = run_all(arguments, console)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written but the logs")
        return 130
    except runs.ChildFailed as failure:
        console.print(str(failure), markup=False, style="red")
        return 1
    summaries = {mode: report.summarise(run, results.get("eager")) for mode, run in results.items()}
    figures = json.dumps(summaries, indent=1)
    data = write_whole(arguments.out / "recommender.json", lambda part: part.write_text(figures))
    rows = arguments.users * arguments.length
    where = devices.describe(arguments.device, arguments.dtype)
    console.print(f"\n{arguments.items:,} items, {rows:,} choices a step, {where}", style="bold")
    console.print(report.comparison_table(summaries))
    console.print(f"figures: {data}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
