# SPDX-License-Identifier: Apache-2.0
"""A whole training step of a Llama, eager, inductor and cce in one process: `python -m benchmarks step`.

The model is transformers' own, unmodified, of 72 million parameters with tied embeddings at the default sizes.
Steps are interleaved, medians of `--rounds`. The peak is what a step (forward, backward, fused AdamW) holds beyond the
weights and the optimizer's state, its gradients included, counted exactly by torch's profiler or by the GPU's allocator.
It runs on the GPU that is there, in bfloat16 by autocast; `--device cpu` does not.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import interleaved, peak_bytes
from examples.support import devices

BACKENDS = ("eager", "inductor", "cce")
SIZES = {
    "cpu": {"vocab": 128256, "width": 512, "layers": 2, "batch": 4, "length": 1024},
    "cuda": {"vocab": 128256, "width": 2048, "layers": 4, "batch": 8, "length": 1024},
}


def stepper(backend: str, args: argparse.Namespace) -> tuple[Callable[[], float], int]:
    """One step by a backend, which returns its loss; and the number of parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=3 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        max_position_embeddings=args.length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(args.device).train()
    if backend != "eager":
        model.compile(backend=backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(1))
    tokens, autocast = tokens.to(args.device), devices.autocast(args.device, args.dtype)

    def step() -> float:
        with autocast():
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in model.parameters())


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m benchmarks step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    devices.add_arguments(parser, SIZES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(BACKENDS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(arguments)
    devices.settle(args, SIZES)
    steps, parameters, losses, peaks = {}, 0, {}, {}
    for backend in args.only.split(","):
        steps[backend], parameters = stepper(backend, args)
        losses[backend] = steps[backend]()  # compiles, and makes the optimizer's state
        peaks[backend] = peak_bytes(steps[backend], args.device)
    times = interleaved(steps, args.rounds, args.device)
    table = Table(
        "backend", "first loss", "median step", "of eager", "peak", "of eager",
        title=f"{parameters / 1e6:.0f} M parameters, V={args.vocab}, D={args.width}, N={args.batch * args.length}, "
        f"{devices.describe(args.device, args.dtype)}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    )  # fmt: skip
    first = next(iter(steps))
    for name in steps:
        seconds, base = statistics.median(times[name]), statistics.median(times[first])
        table.add_row(
            name, f"{losses[name]:.5f}", f"{seconds:.2f} s", f"{seconds / base:.2f}",
            f"{peaks[name] / 2**20:.0f} MiB", f"{peaks[name] / peaks[first]:.3f}",
        )  # fmt: skip
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"losses": losses, "peaks": peaks, "seconds": times}))
