# SPDX-License-Identifier: Apache-2.0
"""The unmodified `transformers.Trainer` with a model compiled by cce: every feature does what it does in eager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

from .support import BATCH, CCE, TRAINER, Tokens, allocations, assert_same_weights, llama


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    found = prediction.predictions
    guess = found.argmax(-1) if found.ndim == 3 else found
    return {"accuracy": float(np.mean(guess[:, :-1] == prediction.label_ids[:, 1:]))}


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def trainer(folder: Path, compiled: bool, model: Any = None, hooks: dict[str, Any] | None = None, **arguments: Any):
    """A Trainer of three steps at a learning rate that shows any difference of gradients in the weights."""
    model = llama() if model is None else model
    if compiled:
        model.compile(**CCE)
    settings = TRAINER | {
        "output_dir": str(folder / ("cce" if compiled else "eager")),
        "per_device_eval_batch_size": BATCH,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**(settings | arguments)),
        train_dataset=Tokens(),
        eval_dataset=Tokens(2 * BATCH),
        **(hooks or {}),
    )


def losses(of: Trainer) -> list[float]:
    return [entry["loss"] for entry in of.state.log_history if "loss" in entry]


TRAINING: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation of means": {"gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "bf16 autocast": {"bf16": True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "label smoothing and accumulation": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "label smoothing in bf16": {"label_smoothing_factor": 0.1, "bf16": True},
    "input tokens seen": {"include_num_input_tokens_seen": "all"},
    "gradient checkpointing": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "reentrant checkpointing": {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "fused adamw": {"optim": "adamw_torch_fused", "learning_rate": 1e-4},
    "data loader workers": {"dataloader_num_workers": 2},
    "clipping": {"max_grad_norm": 0.1},
}  # fmt: skip


@pytest.mark.sample(8)
@pytest.mark.parametrize("feature", TRAINING)
def test_training_is_as_in_eager_and_holds_no_logits(tmp_path: Path, feature: str) -> None:
    arguments = TRAINING[feature]
    eager, ours = (trainer(tmp_path, compiled, **arguments) for compiled in (False, True))
    assert allocations(eager.train).holds_logits
    assert not allocations(ours.train).holds_logits
    low = arguments.get("bf16", False)
    np.testing.assert_allclose(losses(ours), losses(eager), rtol=2e-3 if low else 1e-5)
    assert_same_weights(ours.model, eager.model, rtol=1e-4, atol=2e-3 if low else 2e-5)
    if "include_num_input_tokens_seen" in arguments:
        assert ours.state.num_input_tokens_seen == eager.state.num_input_tokens_seen > 0


EVALUATION: dict[str, tuple[dict[str, Any], dict[str, Any], bool]] = {
    # arguments, hooks, whether the logits are needed as a whole
    "loss only": ({"prediction_loss_only": True}, {}, False),
    "no metrics": ({}, {}, False),
    "metrics of the logits": ({}, {"compute_metrics": accuracy}, True),
    "metrics of the logits in bf16": ({"bf16_full_eval": False, "bf16": True}, {"compute_metrics": accuracy}, True),
    "metrics of the likeliest token": (
        {}, {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely}, False,
    ),
    "metrics in batches": (
        {"batch_eval_metrics": False, "eval_accumulation_steps": 1},
        {"compute_metrics": accuracy, "preprocess_logits_for_metrics": most_likely}, False,
    ),
    # The labels stay outside the model, and what a graph without loss returns under no_grad is computed at once.
    "label smoothing": ({"label_smoothing_factor": 0.1, "prediction_loss_only": True}, {}, True),
}  # fmt: skip


@pytest.mark.sample(8)
@pytest.mark.parametrize("feature", EVALUATION)
def test_evaluation_is_as_in_eager(tmp_path: Path, feature: str) -> None:
    arguments, hooks, whole = EVALUATION[feature]
    eager, ours = (trainer(tmp_path, compiled, hooks=hooks, **arguments) for compiled in (False, True))
    eager.train()
    assert not allocations(ours.train).holds_logits
    expected, found = eager.evaluate(), allocations(ours.evaluate)
    assert found.holds_logits == whole
    names = [n for n in expected if n.endswith(("loss", "accuracy"))]
    assert len(names) == 1 + ("compute_metrics" in hooks)
    for name in names:
        assert found.result[name] == pytest.approx(expected[name], rel=2e-3 if "bf16" in arguments else 1e-5)


def test_predictions_are_plain_arrays_of_the_logits(tmp_path: Path) -> None:
    eager, ours = (trainer(tmp_path, compiled) for compiled in (False, True))
    eager.train()
    assert not allocations(ours.train).holds_logits
    a, b = (t.predict(Tokens(2 * BATCH)) for t in (eager, ours))
    np.testing.assert_allclose(b.predictions, a.predictions, atol=1e-5)
    np.testing.assert_array_equal(b.label_ids, a.label_ids)


def test_a_checkpoint_is_saved_and_resumed_and_loads_without_cce(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", True, max_steps=4, optim="adamw_torch", learning_rate=1e-3)
    assert not allocations(whole.train).holds_logits
    stop = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    first = trainer(tmp_path / "half", True, hooks={"callbacks": [_StopAt(2)]}, **stop)
    first.train()
    second = trainer(tmp_path / "half", True, **stop)
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 4 and len(losses(second)) == 4
    assert_same_weights(second.model, whole.model)
    second.save_model(str(tmp_path / "saved"))
    plain = type(second.model).from_pretrained(tmp_path / "saved")
    assert_same_weights(plain, second.model, rtol=0, atol=0)


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_model_wrapped_by_torch_compile_trains_when_the_labels_are_named(tmp_path: Path) -> None:
    eager = trainer(tmp_path, False)
    named = {"label_names": ["labels"], "remove_unused_columns": False}
    ours = trainer(tmp_path, False, model=torch.compile(llama(), **CCE), **named)
    eager.train()
    assert not allocations(ours.train).holds_logits
    np.testing.assert_allclose(losses(ours), losses(eager), rtol=1e-5)


def test_accelerate_refuses_the_name_so_the_model_is_compiled_by_hand(tmp_path: Path) -> None:
    """The day that this fails, `torch_compile_backend="cce"` works, and the README can say so."""
    with pytest.raises(ValueError, match=r"(?i)cce|backend"):
        trainer(tmp_path, False, torch_compile_backend="cce")
