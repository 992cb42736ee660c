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
# Architectures that compile more graphs than the one more that is allowed, how many, and why.
# GPT-2's loss keeps whatever arguments its `forward` is given, which breaks the graph before it: the frame after the break is
# traced with lazy logits in the place of plain tensors. Dynamo makes a wrapper subclass's sizes symbols one graph later.
MORE_GRAPHS = {"gpt2": 1}
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
    uncut: list[int] = field(default_factory=list)  # lengths at which the logits were made, and aot_eager compiles
    losses: bool = False
    tokens: dict[str, str] = field(default_factory=dict)  # "same", or what was otherwise; none where eager itself fails

    @property
    def holds(self) -> bool:
        few = self.graphs[1] <= self.graphs[0] + 1 + MORE_GRAPHS.get(self.name, 0)
        return self.built and few and not self.uncut and self.losses and set(self.tokens.values()) <= {"same"}


class Counted:
    """A backend that counts its graphs, and the calls of them."""

    def __init__(self, inner: str) -> None:
        self.inner, self.graphs, self.calls = inner, 0, 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        compiled = torch._dynamo.lookup_backend(self.inner)(gm, inputs)

        def call(*args: Any) -> Any:
            self.calls += 1
            return compiled(*args)

        return call


@dataclass
class Trained:
    """What one batch of each length gave."""

    losses: list[float] = field(default_factory=list)
    uncut: list[int] = field(default_factory=list)  # lengths at which the logits were made
    calls: list[int] = field(default_factory=list)  # of compiled graphs


def train(model: torch.nn.Module, call: Callable[..., Any], task: str, counted: Counted | None = None) -> Trained:
    from cce_fx import LazyLogits

    found = Trained()
    for length in LENGTHS:
        batch = zoo.batch_of(model, task, length)
        model.zero_grad()
        torch.manual_seed(length)
        before = counted.calls if counted else 0
        out = call(**batch)
        found.calls.append(counted.calls - before if counted else 0)
        out.loss.backward()
        found.losses.append(float(out.loss.detach()))
        if not (isinstance(out.logits, LazyLogits) and out.logits.chain is not None):
            found.uncut.append(length)
    return found


def generate(model: Any, task: str, ways: list[str]) -> dict[str, Any]:
    """Tokens of each of these ways to generate, of all where none is named, or the error."""
    ids = zoo.batch_of(model, task, 6)["input_ids"]
    found: dict[str, Any] = {}
    for way in ways or GENERATION:
        torch.manual_seed(0)
        try:
            found[way] = model.generate(ids, max_new_tokens=6, min_new_tokens=6, pad_token_id=0, **GENERATION[way])
        except Exception as error:  # reported, or no matter where eager fails as well
            found[way] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


def examine(name: str, task: str, how: str) -> Use:
    """One architecture, in this process; `how` is what compiles generation, and after it the ways to generate, if not all.

    Graphs are counted with aot_eager inside, or with eager if that is what compiles generation.
    """
    use, (inner, *ways) = Use(name, task), how.split()
    model, _ = zoo.build(name, task)
    theirs, ours = (Counted("eager" if inner == "eager" else "aot_eager") for _ in range(2))
    expected = train(model, torch.compile(model, backend=theirs), task, theirs)
    use.built = True
    torch.compiler.reset()
    call = torch.compile(model, backend="cce", options={"inner": ours})
    trained = train(model, call, task)
    # Past torch's limit of recompilations a frame runs as it is written, with any backend.
    compiled = {n for n, calls in zip(LENGTHS, expected.calls, strict=True) if calls == max(expected.calls)}
    use.uncut = [n for n in trained.uncut if n in compiled]
    use.graphs = (theirs.graphs, ours.graphs)
    use.losses = _close(trained.losses, expected.losses)
    torch.compiler.reset()
    if hasattr(model, "generate") and task != "masked":
        model.eval()
        want = generate(model, task, ways)
        model.compile(backend="cce", options={"inner": inner})
        got = generate(model, task, ways)
        use.tokens = {way: _alike(got[way], want[way]) for way in want if isinstance(want[way], torch.Tensor)}
        model.train()
        use.losses &= _close(train(model, model, task).losses, expected.losses)
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
