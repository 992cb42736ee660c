# SPDX-License-Identifier: Apache-2.0
"""Loops of accelerate and lightning with a compiled model, and models of other kinds than a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from .support import BATCH, CCE, LENGTH, VOCAB, WIDTH, Tokens, allocations, assert_same_weights, batch, llama


def loader() -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(Tokens(4 * BATCH), batch_size=BATCH)


@pytest.mark.sample(2)
@pytest.mark.parametrize("loss", ["inside", "outside"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_an_accelerate_loop(loss: str, precision: str) -> None:
    """Under bf16, accelerate casts what the model returns to float32: lazy logits stay lazy."""

    def train(compiled: bool) -> tuple[nn.Module, list[float]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(mixed_precision=precision, cpu=True, gradient_accumulation_steps=2)
        model = llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if compiled:
            model.compile(**CCE)
        model, optimizer, data = accelerator.prepare(model, optimizer, loader())
        losses = []
        for rows in data:
            with accelerator.accumulate(model):
                if loss == "inside":
                    value = model(**rows).loss
                else:
                    logits = model(rows["input_ids"]).logits
                    assert logits.dtype == torch.float32
                    value = F.cross_entropy(logits[:, :-1].flatten(0, 1), rows["labels"][:, 1:].flatten())
                accelerator.backward(value)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(value.item())
        return accelerator.unwrap_model(model, keep_torch_compile=False), losses

    (eager, expected), found = train(False), allocations(lambda: train(True))
    ours, losses = found.result
    assert not found.holds_logits
    assert losses == pytest.approx(expected, rel=2e-3 if precision == "bf16" else 1e-5)
    assert_same_weights(ours, eager, atol=2e-3 if precision == "bf16" else 2e-5)


class Lit(lightning.LightningModule):
    """A model with its loss in `training_step`, as most are written; `inside` leaves it to the model."""

    def __init__(self, inside: bool, compiled: str) -> None:
        super().__init__()
        self.model, self.inside, self.losses = llama(), inside, []
        if compiled == "model":
            self.model.compile(**CCE)

    def training_step(self, rows: dict[str, Tensor], at: int) -> Tensor:
        if self.inside:
            loss = self.model(**rows).loss
        else:
            logits = self.model(rows["input_ids"]).logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB), rows["labels"][:, 1:].reshape(-1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.sample(4)
@pytest.mark.parametrize("inside", [True, False], ids=["loss in the model", "loss in training_step"])
@pytest.mark.parametrize("how", ["model", "module"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_trainer(tmp_path: Path, inside: bool, how: str, precision: str) -> None:
    def fit(compiled: str) -> Lit:
        module = Lit(inside, compiled)
        run = torch.compile(module, **CCE) if compiled == "module" else module
        lightning.Trainer(
            max_steps=3, accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(run, loader())  # fmt: skip
        return module

    eager, found = fit("no"), allocations(lambda: fit(how))
    assert not found.holds_logits
    assert found.result.losses == pytest.approx(eager.losses, rel=2e-3 if "bf16" in precision else 1e-5)
    assert len(eager.losses) == 3
    assert_same_weights(found.result, eager, atol=2e-3 if "bf16" in precision else 2e-5)


def test_packed_sequences_with_position_ids() -> None:
    """Two documents in each row: attention keeps them apart by their positions, and labels at the seam are ignored."""
    model, data = llama(), batch()
    half = LENGTH // 2
    data["position_ids"] = torch.arange(half).repeat(2).expand(BATCH, LENGTH).contiguous()
    data["labels"][:, half] = -100
    assert_like_eager(model, lambda call: call(**data).loss)


def test_a_vision_language_model() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=WIDTH,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=5))
    data = batch()
    data["input_ids"][data["input_ids"] == 5] = 6
    data["input_ids"][:, 1:5] = 5  # four patches of one image
    data["labels"][:, 1:5] = -100
    pixels = torch.randn(BATCH, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    assert_like_eager(model, lambda call: call(**data, pixel_values=pixels, use_cache=False).loss)


def test_an_image_classifier_with_many_classes() -> None:
    """ImageNet-21k's head: 21,843 classes, more than rows and features together."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, WIDTH, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 21843)
    )
    gen = torch.Generator().manual_seed(1)
    images, labels = torch.randn(128, 3, 8, 8, generator=gen), torch.randint(21843, (128,), generator=gen)
    for loss in (
        nn.CrossEntropyLoss(label_smoothing=0.1),
        timm_loss("LabelSmoothingCrossEntropy")(smoothing=0.1),
    ):
        assert_like_eager(model, lambda call, loss=loss: loss(call(images), labels), limit=128 * 21843 * 4 // 2)


def timm_loss(name: str) -> Any:
    """A loss of timm's own file. The package as a whole needs torchvision, which has no build for every torch."""
    import importlib.util
    import subprocess
    import sys
    import tempfile
    import zipfile

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "timm==1.0.31"]
        subprocess.run(command, check=True, timeout=300)
        with zipfile.ZipFile(next(Path(folder).glob("timm-*.whl"))) as wheel:
            wheel.extract("timm/loss/cross_entropy.py", folder)
        spec = importlib.util.spec_from_file_location("timm_cross_entropy", Path(folder, "timm/loss/cross_entropy.py"))
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return getattr(module, name)


def assert_like_eager(model: nn.Module, loss: Any, limit: int | None = None) -> None:
    """`loss(model)` compiled has eager's value and gradients, and no allocation of half its logits' size."""
    compiled = torch.compile(model, **CCE)

    def step(call: Any) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        value = loss(call)
        value.backward()
        return value.detach(), [None if p.grad is None else p.grad.clone() for p in model.parameters()]

    expected, found = allocations(lambda: step(model)), allocations(lambda: step(compiled))
    assert expected.holds_logits
    assert found.largest < limit if limit else not found.holds_logits
    torch.testing.assert_close(found.result[0], expected.result[0])
    for (name, _), a, b in zip(model.named_parameters(), found.result[1], expected.result[1], strict=True):
        if b is None:  # a parameter that the loss does not reach: torch.compile may give it zeros
            assert a is None or not a.any(), name
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
