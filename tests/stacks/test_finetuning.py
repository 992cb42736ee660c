# SPDX-License-Identifier: Apache-2.0
"""trl and peft, unmodified, with a model compiled by cce."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from .support import (
    CCE,
    LENGTH,
    TRAINER,
    VOCAB,
    WIDTH,
    Tokens,
    allocations,
    assert_same_weights,
    batch,
    llama,
    tokenizer,
)


def sft(folder: Path, compiled: bool, model: nn.Module | None = None, **arguments: Any) -> SFTTrainer:
    model = llama() if model is None else model
    if compiled:
        model.compile(**CCE)
    rows = Tokens()
    data = Dataset.from_dict({"input_ids": rows.ids.tolist(), "labels": rows.labels.tolist()})
    settings = TRAINER | {
        "output_dir": str(folder),
        "max_length": LENGTH,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    return SFTTrainer(
        model=model,
        args=SFTConfig(**(settings | arguments)),
        train_dataset=data,
        data_collator=_stacked,
        processing_class=tokenizer(),
    )


def _stacked(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    made = {name: torch.tensor([r[name] for r in rows]) for name in ("input_ids", "labels")}
    return made | {"attention_mask": torch.ones_like(made["input_ids"])}


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "arguments",
    [{}, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"gradient_accumulation_steps": 2}],
    ids=lambda a: "-".join(a) or "plain",
)
def test_sft_with_its_accuracy_and_entropy(
    tmp_path: Path, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """trl makes its own loss and metrics a chunk of classes at a time, and asks the model for logits where labels are smoothed."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 1024)
    eager, ours = (sft(tmp_path, compiled, **arguments) for compiled in (False, True))
    assert allocations(eager.train).holds_logits == ("label_smoothing_factor" in arguments)
    assert not allocations(ours.train).holds_logits
    for name in ("loss", "mean_token_accuracy", "entropy"):
        a, b = ([e[name] for e in t.state.log_history if name in e] for t in (eager, ours))
        assert len(a) == 3
        np.testing.assert_allclose(b, a, rtol=1e-4, err_msg=name)
    assert_same_weights(ours.model, eager.model)


def test_helpers_of_trl_read_lazy_logits_in_pieces() -> None:
    model, data = llama(), batch(16)
    compiled = torch.compile(model, **CCE)
    expected = model(**data)
    labels = data["labels"].clamp(min=0)
    ours = compiled(**data)

    def metrics() -> tuple[Tensor, Tensor, Tensor]:
        logits, shifted = ours.logits[..., :-1, :], labels[..., 1:]
        with torch.no_grad():
            entropy = entropy_from_logits(logits)
            picked = selective_log_softmax(logits, shifted)
        return entropy, picked, (logits.argmax(-1) == shifted).float().mean()

    found = allocations(metrics)
    assert (
        found.largest < expected.logits.numel() * 4 // 4
    )  # a chunk of trl's own, 128 of 1008 rows, and what goes with it
    logits = expected.logits[..., :-1, :].detach()
    torch.testing.assert_close(found.result[0], entropy_from_logits(logits))
    torch.testing.assert_close(found.result[1], selective_log_softmax(logits, labels[..., 1:]))
    assert float(found.result[2]) == float((logits.argmax(-1) == labels[..., 1:]).float().mean())


def test_log_probabilities_of_trl_are_differentiated_without_logits() -> None:
    model, data = llama(), batch()
    compiled = torch.compile(model, **CCE)
    labels = data["labels"].clamp(min=0)

    def step(call: Any) -> list[Tensor]:
        model.zero_grad()
        selective_log_softmax(call(data["input_ids"]).logits, labels, temperature=0.7).mean().backward()
        return [p.grad for p in model.parameters()]

    expected = [g.clone() for g in step(model)]
    found = allocations(lambda: step(compiled))
    assert not found.holds_logits
    for a, b in zip(found.result, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


LORA = {
    "body": {"target_modules": ["q_proj", "v_proj"]},
    "body and head": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
    "trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "weight-decomposed head": {"target_modules": ["lm_head"], "use_dora": True},
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", LORA)
def test_lora_on_a_frozen_base(name: str) -> None:
    def adapted() -> nn.Module:
        torch.manual_seed(1)
        model = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **LORA[name]))
        return model.train()

    eager, ours = adapted(), adapted()
    compiled = torch.compile(ours, **CCE)
    data = batch()
    eager(**data).loss.backward()

    def step() -> Tensor:
        loss = compiled(**data).loss
        loss.backward()
        return loss

    found = allocations(step)
    assert found.holds_logits == (name == "weight-decomposed head")
    torch.testing.assert_close(found.result.detach(), eager(**data).loss.detach())
    trained = 0
    for (key, a), (_, b) in zip(ours.named_parameters(), eager.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if b.grad is not None:
            trained += b.numel()
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-8, msg=lambda m, k=key: f"{k}: {m}")
    assert 0 < trained <= 2 * VOCAB * WIDTH
