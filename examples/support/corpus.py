# SPDX-License-Identifier: Apache-2.0
"""Text that every machine with Python has: the source of its standard library, as tokens.

The tokenizer is a byte-level BPE trained on that text: any size of vocabulary can be had and nothing is downloaded.
"""

import hashlib
import random
import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from support.files import write_whole

END_OF_FILE = "<|endoftext|>"
# Tests are a third of the text and repeat each other; installed packages are not the standard library.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


def stdlib_texts() -> list[str]:
    """Every source file of the standard library, in an order that is the same each time but mixes the packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [p for p in sorted(root.rglob("*.py")) if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    random.Random(0).shuffle(paths)  # so that the held-out tail is not just the modules late in the alphabet
    return [p.read_text(encoding="utf-8", errors="replace") for p in paths]


def train_tokenizer(texts: list[str], vocab: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokens(vocab: int, cache: Path) -> torch.Tensor:
    """The corpus as one int32 tensor of token ids; the work is done once per vocabulary size and text."""
    texts = stdlib_texts()
    digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    tokens_file = cache / f"stdlib-{digest}-{vocab}.pt"
    if tokens_file.exists():
        return torch.load(tokens_file, weights_only=True)
    tokenizer = train_tokenizer(texts, vocab)
    end = tokenizer.token_to_id(END_OF_FILE)
    ids = [i for encoding in tokenizer.encode_batch(texts) for i in (*encoding.ids, end)]
    tokens = torch.tensor(ids, dtype=torch.int32)
    write_whole(cache / f"stdlib-{digest}-{vocab}.json", lambda part: tokenizer.save(str(part)))
    write_whole(tokens_file, lambda part: torch.save(tokens, part))
    return tokens


def random_batch(tokens: torch.Tensor, batch: int, length: int, generator: torch.Generator):
    """`batch` windows of the text and, one token later, what is to be predicted: two (batch, length) tensors."""
    starts = torch.randint(len(tokens) - length - 1, (batch,), generator=generator)
    window = torch.stack([tokens[s : s + length + 1] for s in starts.tolist()]).long()
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()
