# SPDX-License-Identifier: Apache-2.0
"""Stacks as scripts use them: batches of changing lengths, as the stacks' own collators pad them, and logits read after the step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from .support import BATCH, LENGTH, TRAINER, VOCAB, Tokens, allocations, assert_same_weights, llama, tokenizer

STEPS = 5
SETTINGS = TRAINER | {"max_steps": STEPS}


def rows() -> list[dict[str, list[int]]]:
    """Sequences of 20 to 60 tokens: each batch has a longest one of its own."""
    data = Tokens(STEPS * BATCH)
    lengths = [20 + (7 * at) % 41 for at in range(len(data))]
    return [
        {"input_ids": ids[:n].tolist(), "labels": labels[:n].tolist(), "attention_mask": [1] * n}
        for ids, labels, n in zip(data.ids, data.labels, lengths, strict=True)
    ]


def loader() -> torch.utils.data.DataLoader:
    collate = DataCollatorForSeq2Seq(tokenizer(), padding=True, return_tensors="pt")
    return torch.utils.data.DataLoader(rows(), batch_size=BATCH, collate_fn=collate)


def confidence(logits: Tensor, labels: Tensor) -> float:
    """The mean of the largest logits: of other weights it is another number."""
    largest = logits.detach()[:, :-1].max(-1).values
    return float(largest[labels[:, 1:] != -100].mean())


class Counted:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def check(train: Callable[[Any], tuple[nn.Module, list[float], list[float]]], *, atol: float = 2e-5) -> None:
    """`train(compile)` trains a model after `compile(model)`: weights, losses and what was read of the logits are eager's.

    And the graphs that the compiler is given are at most one more than without cce.
    """
    eager, losses, read = train(lambda model: None)
    theirs, inner = Counted(), Counted()
    train(lambda model: model.compile(backend=theirs))
    torch._dynamo.reset()
    found = allocations(lambda: train(lambda model: model.compile(backend="cce", options={"inner": inner})))
    ours, our_losses, our_read = found.result
    assert not found.holds_logits
    assert our_losses == pytest.approx(losses, rel=1e-4)
    assert our_read == pytest.approx(read, rel=1e-5) and len(read) == STEPS
    assert_same_weights(ours, eager, atol=atol)
    assert 0 < inner.graphs <= theirs.graphs + 1


class Reads(TrainerCallback):
    """Reads what the last loss was taken of when the optimizer has made its step."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.read: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        assert self.last is not None
        self.read.append(confidence(*self.last))


class Keeping(Trainer):
    """A trainer that keeps the logits of its last loss, as many subclasses do for their metrics."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.reads.last = (outputs["logits"], labels)
        return (loss, outputs) if return_outputs else loss


def trained(trainer: Any) -> tuple[nn.Module, list[float], list[float]]:
    trainer.reads = Reads()
    trainer.add_callback(trainer.reads)
    trainer.train()
    trainer.reads.last = None
    return trainer.model, [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer.reads.read


@pytest.mark.sample(2)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch_fused"])
def test_the_trainer(tmp_path: Path, optimizer: str) -> None:
    def train(compile: Any) -> Any:
        model = llama()
        compile(model)
        rate = 1e-2 if optimizer == "sgd" else 1e-4
        settings = SETTINGS | {"output_dir": str(tmp_path), "optim": optimizer, "learning_rate": rate}
        return trained(
            Keeping(
                model=model,
                args=TrainingArguments(**settings),
                train_dataset=rows(),
                data_collator=DataCollatorForSeq2Seq(tokenizer(), padding=True),
            )
        )

    check(train)


@pytest.mark.slow
def test_sft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a loss function of one's own, for which trl asks the model for its logits. Its metrics take a chunk of classes at a time."""
    monkeypatch.setattr("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", 1024)

    def train(compile: Any) -> Any:
        model = llama()
        compile(model)
        settings = SETTINGS | {
            "output_dir": str(tmp_path),
            "max_length": LENGTH,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }

        def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            trainer.reads.last = (outputs.logits, labels)
            return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

        trainer: Any = SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=Dataset.from_list(rows()),
            processing_class=tokenizer(),
            compute_loss_func=loss_of,
        )
        return trained(trainer)

    check(train)


def loop(model: nn.Module, data: Any, step: Callable[[Tensor], None]) -> tuple[list[float], list[float]]:
    losses, read = [], []
    for batch in data:
        out = model(**batch)
        step(out.loss)
        losses.append(out.loss.item())
        read.append(confidence(out.logits, batch["labels"]))
    return losses, read


@pytest.mark.slow
def test_accelerate() -> None:
    def train(compile: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=True)
        model = llama()
        compile(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        model, optimizer, data = accelerator.prepare(model, optimizer, loader())

        def step(loss: Tensor) -> None:
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()

        found = loop(model, data, step)
        return accelerator.unwrap_model(model, keep_torch_compile=False), *found

    check(train)


@pytest.mark.slow
def test_peft() -> None:
    def train(compile: Any) -> Any:
        torch.manual_seed(1)
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
        model.train()
        compile(model)
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)

        def step(loss: Tensor) -> None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return model, *loop(model, loader(), step)

    check(train)


class Lit(lightning.LightningModule):
    def __init__(self, compile: Any) -> None:
        super().__init__()
        self.model = llama()
        compile(self.model)
        self.losses: list[float] = []
        self.read: list[float] = []

    def training_step(self, batch: dict[str, Tensor], at: int) -> dict[str, Any]:
        out = self.model(**batch)
        self.losses.append(out.loss.item())
        return {"loss": out.loss, "logits": out.logits}

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Tensor], at: int) -> None:
        self.read.append(confidence(outputs["logits"], batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adagrad(self.parameters(), lr=1e-3)


def test_lightning(tmp_path: Path) -> None:
    """Whose `on_train_batch_end` is called after the step, with what `training_step` returned."""

    def train(compile: Any) -> Any:
        module = Lit(compile)
        lightning.Trainer(
            max_steps=STEPS,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        ).fit(module, loader())
        return module.model, module.losses, module.read

    check(train)


def test_the_lengths_do_change() -> None:
    shapes = {tuple(batch["input_ids"].shape) for batch in loader()}
    assert len(shapes) == STEPS and VOCAB > 0 and np.all([s[0] == BATCH for s in shapes])
