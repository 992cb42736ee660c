# SPDX-License-Identifier: Apache-2.0
"""All benchmarks: `python -m benchmarks <command> --help`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "peers": "time and memory of a head's loss beside the bare matrix products and every other way to compute it",
    "scaling": "curves of time and memory against N and against V, with fitted slopes",
    "overhead": "what a call, a compilation and an import cost over inductor's",
    "scale": "the head and its loss on one GPU of a large training run, by arithmetic",
    "report": "markdown tables and pictures from what the other programs wrote",
    "kernel": "the CPU kernel alone beside the bare matrix products",
    "filtered": "the bounded filter on a trained model, on a GPU",
    "programs": "losses of the rows that no kernel knows (distillation, margins, many labels), and several on one weight",
    "step": "a whole training step of a Llama",
    "after_step": "what it costs that unread logits outlive an optimizer's step",
    "memory_timeline": "what holds memory over one training step, as a picture",
    "quality": "whether training goes as in eager",
    "compile_time": "how long the pass takes, against the size of the graph",
    "gpu": "the loss on a real GPU, beside its peers",
    "tune": "block shapes of the GPU's kernels by time, for the card at hand",
    "screen": "block shapes that are worth timing, by what the compiler makes of them",
    "static_gpu": "what the compiler makes of the GPU kernels, without a GPU",
}


def main(arguments: list[str]) -> None:
    """Run one command; its module is imported only then."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__, *(f"  {name:17}{text}" for name, text in COMMANDS.items()), sep="\n")
        return
    name, *rest = arguments
    if name not in COMMANDS:
        raise SystemExit(f"no benchmark {name!r}; there are {', '.join(COMMANDS)}")
    importlib.import_module(f"benchmarks.{name}").main(rest)


if __name__ == "__main__":
    main(sys.argv[1:])
