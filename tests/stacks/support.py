# SPDX-License-Identifier: Apache-2.0
"""Small models and data for the tests of training stacks, and what a step of theirs allocates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measure

BATCH, LENGTH, WIDTH, VOCAB = 4, 64, 32, 8192
# No weight, gradient or workspace of these models is nearly as large as their logits, so one allocation tells.
LOGITS_BYTES = BATCH * LENGTH * VOCAB * 4
# Arguments of three steps of transformers' or trl's trainer, at a rate at which a wrong gradient shows in the weights.
TRAINER: dict[str, Any] = {
    "max_steps": 3,
    "per_device_train_batch_size": BATCH,
    "learning_rate": 1e-2,
    "optim": "sgd",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
CCE: dict[str, Any] = {"backend": "cce", "options": {"inner": "aot_eager"}}


@dataclass(frozen=True)
class Allocations:
    """What a call allocated on its device, as torch's allocator tells."""

    largest: int  # bytes of the largest single allocation
    result: Any

    @property
    def holds_logits(self) -> bool:
        """Whether a tensor of half the logits' size in float32 was made: the logits in bfloat16, or some in float32."""
        return self.largest >= LOGITS_BYTES // 2


def allocations(run: Callable[[], Any], device: torch.device | str = "cpu") -> Allocations:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own, of clearing events
        result, changes = measure.allocations(run, str(device))
    return Allocations(max(changes, default=0), result)


def llama(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": LENGTH,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | config)))


class Tokens(torch.utils.data.Dataset):
    """Sequences of random tokens, some of whose labels are ignored."""

    def __init__(self, count: int = 8 * BATCH, **more: Any) -> None:
        gen = torch.Generator().manual_seed(0)
        self.ids = torch.randint(1, VOCAB, (count, LENGTH), generator=gen)
        self.labels = self.ids.masked_fill(torch.rand(self.ids.shape, generator=gen) < 0.1, -100)
        self.more = more

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[at], "labels": self.labels[at], **self.more}


def batch(count: int = BATCH) -> dict[str, Tensor]:
    data = Tokens(count)
    return {"input_ids": data.ids, "labels": data.labels}


def assert_same_weights(ours: nn.Module, eager: nn.Module, rtol: float = 1e-4, atol: float = 2e-5) -> None:
    """Every parameter of two modules agrees after training; compiled or not, their names are the same."""
    a, b = ours.state_dict(), eager.state_dict()
    assert a.keys() == b.keys()
    for name in b:
        torch.testing.assert_close(a[name], b[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def tokenizer() -> Any:
    """The least of a tokenizer: one word for each id."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="w0", eos_token="w1"
    )
