# SPDX-License-Identifier: Apache-2.0
"""Train a small GPT three ways (eager, torch's inductor, cce) and compare memory, time and loss.

    python examples/train_lm.py                      all three, about five minutes on two cores or on a GPU
    python examples/train_lm.py --minutes 2          fewer steps
    python examples/train_lm.py --only eager,cce     two of them
    python examples/train_lm.py --device cpu         small, though there is a GPU

On a GPU the model has 124 million parameters, a vocabulary of 50,304 and 16,384 tokens a step, in bfloat16 by autocast.

The model and its loss are plain PyTorch: this file knows nothing of cce but the string that it hands to torch.compile.
Each way runs in a fresh process from the same seed, on the same batches.
"""

import argparse
import contextlib
import json
import math
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from support import corpus, devices, memory, report, runs
from support.files import default_cache, write_whole
from torch import nn

SEED = 1234
# Seconds that a fresh process spends on imports and on compiling, beside its steps; measured on two cores, rounded up.
OVERHEAD = {"eager": 6, "inductor": 50, "cce": 50}
PROBE_STEPS = 5
SIZES = {
    "cpu": {"vocab": 32000, "width": 256, "layers": 3, "batch": 8, "length": 256, "rate": 2e-3},
    "cuda": {"vocab": 50304, "width": 768, "layers": 12, "batch": 16, "length": 1024, "rate": 6e-4},
}


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: turn each pair of channels by an angle that grows with the position."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attention(x), cos, sin)
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int, length: int):
        super().__init__()
        heads = max(1, width // 64)
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)
        self.apply(self.init)
        self.head.weight = self.embed.weight  # tied, as in most models of this size
        half = width // heads // 2
        angles = torch.outer(torch.arange(length), 10000 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    @staticmethod
    def init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, self.cos[: x.size(1)], self.sin[: x.size(1)])
        logits = self.head(self.norm(h))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), y.view(-1))
        return logits, loss


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    autocast=contextlib.nullcontext,
) -> torch.Tensor:
    with memory.phase("forward"), autocast():
        _logits, loss = model(x, y)  # as in most training loops, the logits live to the end of the step
    with memory.phase("backward"):
        loss.backward()
    with memory.phase("optimizer"):
        optimizer.step()
        optimizer.zero_grad()
    return loss.detach()


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.55 + 0.45 * math.cos(math.pi * (step - warm) / max(1, steps - warm))


def train(
    mode: str, steps: int, vocab: int, width: int, layers: int, batch: int, length: int, rate: float, cache: str,
    device: str, dtype: str,
) -> None:  # fmt: skip
    """One way of running, in its own process; reports to the parent."""
    tokens = corpus.load_tokens(vocab, Path(cache))
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    model = GPT(vocab, width, layers, length).to(device)
    autocast = devices.autocast(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(learning_rate, steps=steps))
    compiled = model if mode == "eager" else torch.compile(model, backend=mode)
    for step in range(steps):
        x, y = (t.to(device) for t in corpus.random_batch(tokens, batch, length, generator))
        begin = time.perf_counter()
        loss = train_step(compiled, optimizer, x, y, autocast)
        runs.emit(step=step, loss=loss.item(), seconds=time.perf_counter() - begin)
        schedule.step()
    # Counting slows a step a little, so it gets one of its own, after those that are timed.
    own = memory.own_bytes(model, optimizer)
    trace = memory.trace_step(lambda: train_step(compiled, optimizer, x, y, autocast), device)
    runs.emit(done={"own": own, "trace": trace.to_dict(), "parameters": sum(p.numel() for p in model.parameters())})


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="time for everything; decides the number of steps")
    add("--steps", type=int, help="number of steps, instead of --minutes")
    add("--only", default=",".join(runs.MODES), help="which ways to run, separated by commas")
    devices.add_arguments(parser, SIZES)
    add("--out", type=Path, default=Path("out"), help="folder for the picture and the figures")
    add("--cache", type=Path, default=default_cache(), help="folder for the tokenizer and the tokens")
    add("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    devices.settle(arguments, SIZES)
    arguments.only = [mode for mode in arguments.only.split(",") if mode]
    if unknown := set(arguments.only) - set(runs.MODES):
        parser.error(f"--only knows {', '.join(runs.MODES)}; not {', '.join(sorted(unknown))}")
    if not arguments.only or (arguments.steps is not None and arguments.steps < 1) or arguments.vocab < 257:
        parser.error("at least one way to run, one step, and a vocabulary of 257 (every byte and the end of a file)")
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict:
    names = ("vocab", "width", "layers", "batch", "length", "rate", "device", "dtype")
    return {name: getattr(arguments, name) for name in names} | {"cache": str(arguments.cache)}


def choose_steps(arguments: argparse.Namespace, begin: float, console: Console) -> int:
    """As many steps as fit: a few eager ones are timed, and all ways are taken to be as slow as that."""
    with console.status("timing a few steps"):
        probe, log = settings_of(arguments) | {"steps": PROBE_STEPS}, arguments.out / "logs" / "probe.log"
        try:
            done = runs.run_child(__file__, probe | {"mode": "eager"}, log, lambda record: None)
        except runs.ChildFailed:  # as where its logits do not fit
            done = runs.run_child(__file__, probe | {"mode": arguments.only[-1]}, log, lambda record: None)
    seconds = statistics.median(s["seconds"] for s in done["steps"][1:])
    left = arguments.minutes * 60 - (time.monotonic() - begin) - sum(OVERHEAD[m] for m in arguments.only)
    steps = max(10, int(left / (1.1 * seconds * len(arguments.only))))
    console.print(f"an eager step takes {seconds * 1e3:.0f} ms: {steps} steps each")
    return steps


def run_all(arguments: argparse.Namespace, steps: int, results: dict, console: Console) -> None:
    """Run each way and put what it measured into `results` as soon as it is there."""
    name, now = TextColumn("{task.description:>9}"), TextColumn("{task.fields[now]}")
    with Progress(name, BarColumn(None), MofNCompleteColumn(), now, TimeElapsedColumn(), console=console) as progress:
        bars = {m: progress.add_task(m, total=steps, now="", start=False) for m in arguments.only}
        for mode, bar in bars.items():
            progress.start_task(bar)
            progress.update(bar, now="starting" if mode == "eager" else "compiling")

            def show(record, bar=bar):
                progress.update(bar, advance=1, now=f"loss {record['loss']:.3f}  {record['seconds'] * 1e3:5.0f} ms")

            settings = settings_of(arguments) | {"mode": mode, "steps": steps}
            try:
                results[mode] = runs.run_child(__file__, settings, arguments.out / "logs" / f"{mode}.log", show)
            except runs.ChildFailed as failure:  # the others may do: they need other amounts of memory
                progress.update(bar, now="failed")
                console.print(str(failure), markup=False, style="red")
            progress.stop_task(bar)


def conclude(results: dict, arguments: argparse.Namespace, console: Console) -> None:
    """The table, the picture and the figures of all runs that came to their end."""
    if not results:
        return
    settings = settings_of(arguments)
    title = (
        f"GPT of {next(iter(results.values()))['parameters'] / 1e6:.1f} M parameters, vocabulary {arguments.vocab:,}, "
        f"{arguments.batch * arguments.length:,} tokens a step, {devices.describe(arguments.device, arguments.dtype)}"
    )
    summaries = {mode: report.summarise(run, results.get("eager")) for mode, run in results.items()}
    figures = {"title": title, "torch": torch.__version__, "settings": settings, "summary": summaries, "runs": results}
    data = write_whole(arguments.out / "train_lm.json", lambda part: part.write_text(json.dumps(figures)))
    picture = report.draw(results, title, arguments.out / "train_lm.png")
    console.print(f"\n{title}", style="bold", soft_wrap=True)
    console.print(report.comparison_table(summaries))
    console.print(f"picture: {picture}\nfigures: {data}")


def tell_what_is_there(results: dict, arguments: argparse.Namespace, console: Console) -> None:
    console.print(f"stopped; runs that came to their end: {', '.join(results) or 'none'}. Files, all of them whole:")
    kept = [*sorted(arguments.cache.glob("stdlib-*")), *sorted(arguments.out.glob("train_lm.*"))]
    for path in kept:
        console.print(f"  {path}", soft_wrap=True)
    console.print("  (none)" if not kept else "the next run takes the tokenizer and the tokens from there")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.child:
        train(**json.loads(arguments.child))
        return 0
    console, begin, results = Console(), time.monotonic(), {}
    runs.stop_on_sigterm()
    try:
        with console.status("reading the standard library and training the tokenizer (once per vocabulary)"):
            tokens = corpus.load_tokens(arguments.vocab, arguments.cache)
        console.print(f"{len(tokens):,} tokens of Python's standard library")
        steps = arguments.steps or choose_steps(arguments, begin, console)
        run_all(arguments, steps, results, console)
    except KeyboardInterrupt:
        conclude(results, arguments, console)
        tell_what_is_there(results, arguments, console)
        return 130
    except runs.ChildFailed as failure:
        console.print(str(failure), markup=False, style="red")
        conclude(results, arguments, console)
        return 1
    conclude(results, arguments, console)
    console.print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    return int(len(results) < len(arguments.only))


if __name__ == "__main__":
    sys.exit(main())
