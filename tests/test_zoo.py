# SPDX-License-Identifier: Apache-2.0
"""Architectures of transformers, unmodified: some of them here, all of them behind the marker."""

from __future__ import annotations

import pytest

from . import zoo

FEW = [
    "llama:causal",
    "gemma2:causal",
    "gpt2:causal",
    "nemotron_h:causal",
    "prophetnet:seq2seq",
    "bert:masked",
    "t5:seq2seq",
]


@pytest.mark.sample(8)
@pytest.mark.parametrize("which", FEW)
def test_an_architecture_holds(which: str) -> None:
    row = zoo.examined_apart(which, "cce", 300)
    assert row.holds, row


def test_torch_alone_does_not_hold() -> None:
    """What is looked for is there to be found: without cce the logits are in the graph."""
    row = zoo.examined_apart("llama:causal", "eager", 300)
    assert row.match and row.logits and row.read and not row.cut


@pytest.mark.slow
def test_every_architecture_holds() -> None:
    rows = zoo.run(zoo.architectures())
    built = [r for r in rows if r.built]
    assert len(built) > 0.7 * len(rows)
    assert all(r.holds for r in built), [r for r in built if not r.holds]
