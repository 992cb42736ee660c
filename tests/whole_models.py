# SPDX-License-Identifier: Apache-2.0
"""Architectures of transformers as programs use them: batches of changing lengths, generation in between, and training on.

    python -m tests.whole_models                    those of the list below
    python -m tests.whole_models llama t5:seq2seq   some of them, TYPE or TYPE:TASK

Each runs in a process of its own. It holds where ten lengths compile at most one graph more than with aot_eager and the logits
stay unread at each, where `generate` of the compiled model gives eager's tokens (greedy, beams, sampling, a static cache), and
where training after that gives eager's loss.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import zoo

LENGTHS = range(5, 15)
GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
    "static": {"do_sample": False, "cache_implementation": "static"},
}


@dataclass
class Use:
    """What became of one architecture."""

    name: str
    task: str
    built: bool = False
    error: str = ""
    graphs: tuple[int, int] = (0, 0)  # compiled for ten lengths by aot_eager, and by cce with aot_eager inside
    uncut: list[int] = field(default_factory=list)  # lengths at which the logits were made
    losses: bool = False
    tokens: dict[str, str] = field(default_factory=dict)  # "same", or what was otherwise; none where eager itself fails

    @property
    def holds(self) -> bool:
        few = self.graphs[1] <= self.graphs[0] + 1
        return self.built and few and not self.uncut and self.losses and set(self.tokens.values()) <= {"same"}


def train(model: torch.nn.Module, call: Callable[..., Any], task: str) -> tuple[list[float], list[int]]:
    """Losses at each length, and the lengths at which the logits were made."""
    from cce_fx import LazyLogits

    losses, uncut = [], []
    for length in LENGTHS:
        batch = zoo.batch_of(model, task, length)
        model.zero_grad()
        torch.manual_seed(length)
        out = call(**batch)
        out.loss.backward()
        losses.append(float(out.loss.detach()))
        if not (isinstance(out.logits, LazyLogits) and out.logits.chain is not None):
            uncut.append(length)
    return losses, uncut


def generate(model: Any, task: str) -> dict[str, Any]:
    """Tokens of each way to generate, or the error."""
    ids = zoo.batch_of(model, task, 6)["input_ids"]
    found: dict[str, Any] = {}
    for way, how in GENERATION.items():
        torch.manual_seed(0)
        try:
            found[way] = model.generate(ids, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **how)
        except Exception as error:  # reported, or no matter where eager fails as well
            found[way] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def count(counted: list[int], inner: str) -> Callable[..., Any]:
    compiler = torch._dynamo.lookup_backend(inner)

    def compile(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(1)
        return compiler(gm, inputs)

    return compile


def examine(name: str, task: str, inner: str) -> Use:
    """One architecture, in this process."""
    use = Use(name, task)
    model, _ = zoo.build(name, task)
    use.built = True
    counts: tuple[list[int], list[int]] = ([], [])
    expected = train(model, torch.compile(model, backend=count(counts[0], "aot_eager")), task)[0]
    torch.compiler.reset()
    ours = torch.compile(model, backend="cce", options={"inner": count(counts[1], "aot_eager")})
    losses, use.uncut = train(model, ours, task)
    use.graphs = (len(counts[0]), len(counts[1]))
    use.losses = _close(losses, expected)
    torch.compiler.reset()
    if hasattr(model, "generate") and task != "masked":
        model.eval()
        want = generate(model, task)
        model.compile(backend="cce", options={"inner": inner})
        got = generate(model, task)
        use.tokens = {way: _alike(got[way], want[way]) for way in want if isinstance(want[way], torch.Tensor)}
        model.train()
        after = train(model, model, task)[0]
        use.losses &= _close(after, expected)
    return use


def _close(ours: list[float], theirs: list[float]) -> bool:
    return all(abs(a - b) <= 1e-4 * abs(b) for a, b in zip(ours, theirs, strict=True))


def _alike(got: Any, want: torch.Tensor) -> str:
    if isinstance(got, str):
        return got
    return "same" if torch.equal(got, want) else "other tokens"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--inner", default="inductor", help="what compiles generation")
    parser.add_argument("--limit", type=int, default=900, help="seconds for one architecture")
    args = parser.parse_args()
    bad = 0
    for which in args.names:
        use = zoo.apart(examine, which, args.inner, args.limit, failed=Use)
        bad += use.built and not use.holds
        print("ok  " if use.holds else "FAIL" if use.built else "-   ", which, use, flush=True)
    return bad


if __name__ == "__main__":
    sys.exit(main())
