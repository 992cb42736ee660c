# SPDX-License-Identifier: Apache-2.0
"""Architectures of transformers at changing lengths and in generation; see `whole_models.py`. All of them behind the marker."""

from __future__ import annotations

import pytest

from . import zoo
from .selection import shares
from .whole_models import Use, examine

PARTS = 50

FEW = [
    "llama",
    "qwen3",
    "gpt2",
    "mistral",
    "gemma2",
    "phi3",
    "olmo2",
    "opt",
    "gpt_neox",
    "mixtral",
    "t5:seq2seq",
    "bart:seq2seq",
]


@pytest.mark.sample(12)  # each takes twenty seconds
@pytest.mark.parametrize("which", FEW)
def test_an_architecture_holds(which: str) -> None:
    use = zoo.apart(examine, which, "eager greedy", 1800, failed=Use)
    assert use.holds and use.tokens, use


@pytest.mark.slow  # three to five minutes each
@pytest.mark.parametrize("which", FEW)
def test_an_architecture_that_inductor_compiles_holds(which: str) -> None:
    use = zoo.apart(examine, which, "inductor", 1800, failed=Use)
    assert use.holds and use.tokens, use


@pytest.mark.parametrize("share", shares(PARTS, 1))
def test_every_architecture_holds(share: tuple[int, int]) -> None:
    """With eager inside, a minute each; `python -m tests.whole_models` has inductor inside."""
    names = zoo.architectures()[share[0] :: PARTS]
    uses = [zoo.apart(examine, which, "eager", 900, failed=Use) for which in names]
    built = [use for use in uses if use.built]
    print(f"{len(uses)} architectures, {len(built)} built, {sum(bool(use.tokens) for use in built)} generate")
    assert all(use.holds for use in built), [use for use in built if not use.holds]
