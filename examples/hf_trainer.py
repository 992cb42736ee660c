# SPDX-License-Identifier: Apache-2.0
"""Train a small Llama with the unmodified Hugging Face Trainer, with its loss and logits handled by cce.

    python examples/hf_trainer.py                      under two minutes on two cores; larger, and in bfloat16, on a GPU
    python examples/hf_trainer.py --backend inductor   the same with torch's own compiler, or --backend eager

There are three ways to hand a compiler to Trainer; as of transformers 5.23 and accelerate 1.15:

- `model.compile(backend="cce")`, used here, compiles in place. The model keeps its class and its forward signature,
  from which Trainer reads which columns to pass and what the labels are called, so training, evaluation, metrics and
  saving are as they were.
- `torch.compile(model, backend="cce")` wraps the model, and Trainer finds neither columns nor labels on the wrapper. It
  trains with `TrainingArguments(label_names=["labels"], remove_unused_columns=False)`, but what it saves has the
  wrapper's prefix `_orig_mod.` on every name, which `from_pretrained` does not know.
- `TrainingArguments(torch_compile_backend="cce")` does not work: accelerate looks the name up in a list of its own.

Training never reads the logits, so they are never computed. Evaluation reads them (the accuracy of the next token):
they are computed on that read, and `compute_metrics` gets what it always got.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from support import corpus, devices
from support.files import default_cache, write_whole
from transformers import (
    EvalPrediction,
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

HELD_OUT_EVERY = 20
SIZES = {
    "cpu": {"vocab": 32000, "width": 128, "layers": 2, "batch": 8, "length": 128, "rate": 2e-3},
    "cuda": {"vocab": 50304, "width": 768, "layers": 12, "batch": 16, "length": 1024, "rate": 6e-4},
}


class Windows(torch.utils.data.Dataset):
    """Pieces of the text, each as the model wants it: it shifts the labels by itself."""

    def __init__(self, windows: torch.Tensor):
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.windows[index].long()
        return {"input_ids": ids, "labels": ids}


def most_likely(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Keep one token id per position for the metrics, not a row of the vocabulary. This is what reads the logits."""
    return logits.argmax(dim=-1)


def next_token_accuracy(prediction: EvalPrediction) -> dict[str, float]:
    hits = prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(hits.mean())}


def build_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=arguments.vocab,
        hidden_size=arguments.width,
        intermediate_size=3 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 64),
        max_position_embeddings=arguments.length,
        tie_word_embeddings=True,
        use_cache=False,  # training has no use for keys and values of earlier tokens
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def split_text(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pieces for training, and every twentieth piece held out."""
    pieces = len(tokens) // length
    windows = tokens[: pieces * length].view(pieces, length)
    held_out = torch.arange(pieces) % HELD_OUT_EVERY == 0
    held = windows[held_out]
    return windows[~held_out], held[torch.randperm(len(held))]


def build_trainer(model: LlamaForCausalLM, tokens: torch.Tensor, arguments: argparse.Namespace) -> Trainer:
    train, held_out = split_text(tokens, arguments.length)
    settings = TrainingArguments(
        output_dir=str(arguments.out / "hf_trainer"),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch,
        per_device_eval_batch_size=arguments.batch,
        learning_rate=arguments.rate,
        use_cpu=arguments.device == "cpu",
        bf16=arguments.dtype == "bfloat16",
        warmup_steps=max(1, arguments.steps // 10),
        logging_steps=max(1, arguments.steps // 10),
        eval_strategy="steps",
        eval_steps=max(1, arguments.steps // 2),
        save_strategy="no",
        dataloader_drop_last=True,  # a last, smaller batch would be compiled for anew
        dataloader_pin_memory=False,
        optim="adamw_torch_fused",
        report_to=[],
        seed=0,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=Windows(train),
        eval_dataset=Windows(held_out[: arguments.eval_batches * arguments.batch]),
        compute_metrics=next_token_accuracy,
        preprocess_logits_for_metrics=most_likely,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--backend", default="cce", help="eager, or any backend of torch.compile")
    add("--steps", type=int, default=60, help="training steps; evaluated half-way and at the end")
    devices.add_arguments(parser, SIZES)
    add("--eval-batches", type=int, default=4, help="batches of held-out text in an evaluation")
    add("--out", type=Path, default=Path("out"), help="folder for the model and the figures")
    add("--cache", type=Path, default=default_cache(), help="folder for the tokenizer and the tokens")
    arguments = parser.parse_args(argv)
    devices.settle(arguments, SIZES)
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    set_seed(0)
    tokens = corpus.load_tokens(arguments.vocab, arguments.cache)
    model = build_model(arguments)
    if arguments.backend != "eager":
        model.compile(backend=arguments.backend)
    trainer = build_trainer(model, tokens, arguments)
    trainer.train()
    scores = trainer.evaluate()
    trainer.save_model()
    figures = {
        "backend": arguments.backend,
        "log": trainer.state.log_history,
        "eval_loss": scores["eval_loss"],
        "accuracy": scores["eval_accuracy"],
    }
    where = write_whole(arguments.out / "hf_trainer.json", lambda part: part.write_text(json.dumps(figures, indent=1)))
    print(f"held-out text: loss {scores['eval_loss']:.3f} ({math.log(arguments.vocab):.3f} before training)")
    print(f"next token right: {scores['eval_accuracy']:.1%} of the time")
    print(f"model: {trainer.args.output_dir}\nfigures: {where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
