# SPDX-License-Identifier: Apache-2.0
"""trl's trainers of distillation and preferences, unmodified, which take their losses and metrics of the logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from .support import CCE, TRAINER, VOCAB, allocations, assert_same_weights, llama

ROWS, LENGTH = 8, 128
SETTINGS: dict[str, Any] = TRAINER | {
    "per_device_train_batch_size": ROWS,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_length": LENGTH,
}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer with a word for each id."""
    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="w0", bos_token="w1", eos_token="w2")


def texts(count: int, length: int, seed: int) -> list[str]:
    ids = torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


def _padded(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    ids = torch.tensor([r["input_ids"] for r in rows])
    labels = ids.clone()
    for at, row in enumerate(labels):
        row[: 20 + 3 * at] = -100  # prompts of several lengths
    prompts = ids[:, :20]
    ones = torch.ones_like
    return {"input_ids": ids, "attention_mask": ones(ids), "labels": labels, "prompts": prompts,
            "prompt_attention_mask": ones(prompts)}  # fmt: skip


def gkd(folder: Path, compiled: bool, **arguments: Any) -> GKDTrainer:
    ids = torch.randint(3, VOCAB, (4 * ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    student = llama(max_position_embeddings=LENGTH)
    teacher = llama(max_position_embeddings=LENGTH, hidden_size=48, intermediate_size=48)
    for model in (student, teacher) if compiled else ():
        model.compile(**CCE)
    return GKDTrainer(
        model=student,
        teacher_model=teacher,
        args=GKDConfig(output_dir=str(folder), **(SETTINGS | {"lmbda": 0.0} | arguments)),
        data_collator=_padded,
        train_dataset=Dataset.from_dict({"input_ids": ids.tolist()}),
        processing_class=words(),
    )


def _preferences(kind: Any, config: Any) -> Callable[..., Any]:
    def trainer(folder: Path, compiled: bool, **arguments: Any) -> Any:
        model = llama(max_position_embeddings=LENGTH)
        if compiled:
            model.compile(**CCE)
        columns = {
            "prompt": texts(4 * ROWS, 40, 0),
            "chosen": texts(4 * ROWS, 60, 1),
            "rejected": texts(4 * ROWS, 50, 2),
        }
        return kind(
            model=model,
            args=config(output_dir=str(folder), **(SETTINGS | arguments)),
            train_dataset=Dataset.from_dict(columns),
            processing_class=words(),
        )

    return trainer


TRAINERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "GKD": (gkd, {}),
    "GKD, forward": (gkd, {"beta": 0.0}),
    "ORPO": (_preferences(ORPOTrainer, ORPOConfig), {}),
    "CPO": (_preferences(CPOTrainer, CPOConfig), {}),
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_as_in_eager_and_holds_no_logits(tmp_path: Path, name: str) -> None:
    make, arguments = TRAINERS[name]
    eager, ours = (make(tmp_path / str(compiled), compiled, **arguments) for compiled in (False, True))
    logits = ROWS * 100 * VOCAB * 4  # the batches of preferences have 102 tokens a row at most
    assert allocations(eager.train).largest > logits
    assert allocations(ours.train).largest < logits // 2
    logs = [{k: v for e in t.state.log_history for k, v in e.items() if "runtime" not in k and "per_second" not in k}
            for t in (eager, ours)]  # fmt: skip
    assert logs[0].keys() == logs[1].keys()
    for key in [k for k in logs[0] if k == "loss" or "logits" in k or "logps" in k]:
        np.testing.assert_allclose(logs[1][key], logs[0][key], rtol=1e-4, atol=1e-6, err_msg=key)
    assert_same_weights(ours.model, eager.model)
