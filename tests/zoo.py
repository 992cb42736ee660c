# SPDX-License-Identifier: Apache-2.0
"""Every causal, masked and seq2seq architecture of transformers, tiny and random, eager against cce.

    python -m tests.zoo                      all of them; writes the table of docs/models.md to standard output
    python -m tests.zoo llama t5:seq2seq     some of them, TYPE or TYPE:TASK
    python -m tests.zoo --backend eager      what torch alone can capture

A model holds where its loss and all gradients are eager's, no graph has a tensor of the logits' size, `outputs.logits`
read afterwards are eager's, and so are loss and logits under no_grad. Each runs in a process of its own, which a crash or
an endless loop ends alone. Sizes are set by what an option is called, so that architectures that are not born yet shrink
as well; some do not survive that, and the table counts them.
"""

from __future__ import annotations

import argparse
import inspect
import json
import multiprocessing
import os
import re
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .helpers import collect_rarely

# A prime, so that a tensor with this dimension has classes in it and is no accident of other sizes.
VOCAB, ROWS, LENGTH = 1531, 2, 64
TASKS = {
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
}
# The first pattern that is found in an option's name gives its value.
SIZES: list[tuple[str, int]] = [
    (r"vocab_size", VOCAB),
    (r"lora_rank", 16),
    (r"n_group|topk_group|n_groups|shared_experts|dense_replace", 1),
    (r"per_tok|top_?k|moe_k", 2),
    (r"experts", 4),
    (r"key_value_heads|kv_heads|query_group|key_heads|value_heads", 2),
    (r"head_dim|head_size|d_kv|kv_channels|d_head", 16),
    (r"rotary_dim", 8),
    (r"heads?$", 4),
    (r"layers?$|num_blocks$|^depth$", 2),
    (r"mtp|nextn", 0),
    (r"intermediate_size|ffn|d_ff|n_inner|d_inner|d_ssm", 128),
    (r"state_size|d_state|ssm_state", 8),
    (r"conv_kernel|d_conv|conv_dim|time_step_rank", 4),
    (r"expand", 2),
    (r"hidden_size|d_model|n_embd|emb\w*_size|emb\w*_dim|^dim$|lru_width|model_dim|bottleneck", 64),
    (r"max_\w*position|n_positions|n_ctx|max_\w*seq|block_size", 128),
    (r"window", 32),
    (r"type_vocab", 2),
]
OFF = ("use_cache", "output_router_logits")


@dataclass
class Row:
    """What became of one architecture."""

    name: str
    task: str
    built: bool = False
    error: str = ""
    match: bool = False
    cut: bool = False
    logits: bool = False
    read: bool = False
    large: list[str] = field(default_factory=list)
    declined: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        return self.match and self.cut and self.logits and self.read


def architectures() -> list[str]:
    """TYPE:TASK of every architecture that the installed transformers has a head for."""
    from transformers.models.auto import modeling_auto

    return sorted(f"{name}:{task}" for task, (_, mapping) in TASKS.items() for name in getattr(modeling_auto, mapping))


def shrink(config: Any) -> Any:
    """The configuration with every size made tiny, and those inside it."""
    layers = {v for k, v in vars(config).items() if re.search(r"layers?$", k) and isinstance(v, int)}
    specials = 3
    for name, value in list(vars(config).items()):
        if hasattr(value, "model_type"):
            shrink(value)
        elif name in OFF:
            setattr(config, name, False)
        elif isinstance(value, bool):
            continue
        elif isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
        elif isinstance(value, int) and re.search(r"token_id$|token_index$|_idx$", name):
            specials += 1
            setattr(config, name, specials if value >= VOCAB else value)
        elif isinstance(value, int):
            found = next((size for pattern, size in SIZES if re.search(pattern, name)), value)
            setattr(config, name, min(value, found) if found < 3 else found)
        elif isinstance(value, (list, tuple)) and len(value) in layers and len(value) > 2:
            kinds = list(dict.fromkeys(value)) if all(isinstance(v, str) for v in value) else list(value)
            setattr(config, name, (kinds + list(value))[:2])
    if getattr(config, "kv_lora_rank", None):  # latent attention has no grouped heads
        config.num_key_value_heads = config.num_attention_heads
    return config


def build(name: str, task: str) -> tuple[nn.Module, dict[str, Any]]:
    """The model in training mode, and a batch for it."""
    import transformers

    config = shrink(transformers.AutoConfig.for_model(name))
    if task == "causal" and hasattr(config, "is_decoder"):
        config.is_decoder = True
    if task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 1
    auto = getattr(transformers, TASKS[task][0])
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > 50_000_000:
        raise MemoryError(f"{size // 1_000_000} million parameters are left")
    torch.manual_seed(0)
    model = auto.from_config(config).float().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model, batch_of(model, task, LENGTH)


def batch_of(model: nn.Module, task: str, length: int) -> dict[str, Any]:
    """A batch of sequences of one length."""
    gen = torch.Generator().manual_seed(1)
    vocab = min(VOCAB, model.get_input_embeddings().weight.shape[0])
    ids, other = (torch.randint(20, vocab, (ROWS, length), generator=gen) for _ in range(2))
    labels = ids.clone() if task == "causal" else other
    labels[0, : min(5, length // 2)] = -100
    takes = inspect.signature(type(model).forward).parameters
    possible = {
        "attention_mask": torch.ones_like(ids),
        "use_cache": False,
        "bbox": torch.zeros(ROWS, length, 4, dtype=torch.long),
    }
    return {"input_ids": ids, "labels": labels} | {k: v for k, v in possible.items() if k in takes}


def step(model: nn.Module, call: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Any]:
    torch.manual_seed(2)
    model.zero_grad()
    out = call(**batch)
    out.loss.backward()
    return out.loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, out


def examine(name: str, task: str, backend: str) -> Row:
    """One architecture, in this process."""
    row = Row(name, task)
    model, batch = build(name, task)
    loss, grads, out = step(model, model, batch)
    logits = out.logits.detach().clone()
    row.built, large = True, []

    def inner(gm: torch.fx.GraphModule, _: Any) -> Any:
        for node in gm.graph.nodes:
            # Of our own operator's results, the gradient of the weight is (V, D).
            if not node.op.startswith("call") or str(node.target).startswith("cce."):
                continue
            value = node.meta.get("example_value")
            for t in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(t, Tensor) and logits.shape[-1] in t.shape:
                    if t.numel() // logits.shape[-1] >= ROWS * (LENGTH - 1):
                        large.append(str(node.target))
        return gm.forward

    cce = backend == "cce"
    call = torch.compile(model, backend="cce", options={"inner": inner}) if cce else torch.compile(model, backend=inner)
    ours, our_grads, our_out = step(model, call, batch)
    row.declined = sorted(k for k in torch._dynamo.utils.counters["cce_fx"] if k.startswith("declined"))
    largest = max(float(g.abs().max()) for g in grads.values())
    errors = [float((our_grads[n] - g).abs().max()) for n, g in grads.items() if n in our_grads]
    row.match = our_grads.keys() == grads.keys() and max(errors) <= 1e-4 * largest
    row.match &= bool((ours - loss).abs() <= 1e-5 * loss.abs())
    row.large = list(large)  # without what evaluation computes
    row.cut = not row.large
    row.logits = torch.allclose(our_out.logits.detach() * 1, logits, atol=1e-4, rtol=1e-4)
    model.eval()
    with torch.no_grad():
        want, got = model(**batch), call(**batch)
        row.read = torch.allclose(got.logits * 1, want.logits, atol=1e-4, rtol=1e-4)
        row.read &= torch.allclose(got.loss, want.loss, rtol=1e-5)
    return row


def _examine_into(pipe: Any, function: Callable[..., Any], failed: Any, name: str, task: str, how: str) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    collect_rarely()
    row = failed(name, task)
    try:
        row = function(name, task, how)
    except BaseException as error:  # told in the table
        row.error = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    pipe.send(row)


def apart(function: Callable[..., Any], which: str, how: str, limit: int, failed: Any = Row) -> Any:
    """`function` of one architecture, in a process of its own, forked from one that has imported what all of them need.

    Where it gives no answer, `failed` of the architecture, with its error.
    """
    name, _, task = which.partition(":")
    task = task or "causal"
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"})
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["transformers", "torch._dynamo", "cce_fx.backend"])
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_examine_into, args=(theirs, function, failed, name, task, how), daemon=True)
    child.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(limit) else failed(name, task, error=f"no answer in {limit} s")
    except EOFError:
        return failed(name, task, error="died")
    finally:
        child.kill()
        child.join()


def examined_apart(which: str, backend: str, limit: int) -> Row:
    """`examine` of one architecture, in a process of its own."""
    return apart(examine, which, backend, limit)


def run(names: list[str], backend: str = "cce", jobs: int = 2, limit: int = 300, kept: Path | None = None) -> list[Row]:
    """All of them, with a line of progress each on standard error. Rows go into the file `kept`, and are not run again."""
    done: dict[str, Row] = {}
    if kept and kept.exists():
        rows = [Row(**json.loads(line)) for line in kept.read_text(encoding="utf-8").splitlines()]
        done = {f"{r.name}:{r.task}": r for r in rows}
    wanted = [n if ":" in n else f"{n}:causal" for n in names]
    missing = [n for n in wanted if n not in done]
    with ThreadPoolExecutor(jobs) as pool:
        for which, row in zip(missing, pool.map(lambda n: examined_apart(n, backend, limit), missing)):
            done[which] = row
            if kept:
                with kept.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(row)) + "\n")
            marks = [m if getattr(row, m) else m.upper() for m in ("match", "cut", "logits", "read")]
            print("ok  " if row.holds else "FAIL" if row.built else "-   ", which, *marks, *row.large[:4], *row.declined,
                  row.error, file=sys.stderr, flush=True)  # fmt: skip
    return [done[n] for n in wanted]


def table(rows: list[Row]) -> str:
    """The page docs/models.md."""
    import transformers

    held, built = [r for r in rows if r.holds], [r for r in rows if r.built]
    lines = [
        "# Models",
        "",
        f"Made by `python -m tests.zoo`: the {len(rows)} causal, masked and seq2seq architectures of transformers "
        f"{transformers.__version__}, tiny",
        f"and with random weights, on torch {torch.__version__}. {len(built)} of them could be built at such sizes and "
        "trained in eager; of these",
        f"{len(held)} hold: loss and every gradient are eager's, no graph has a tensor of the logits' size, and "
        "`outputs.logits` read in",
        "training and in evaluation are eager's.",
        "",
        "| task | hold |",
        "|---|---|",
    ]
    for task in TASKS:
        lines.append(f"| {task} | {', '.join(r.name for r in held if r.task == task)} |")
    lines += ["", "## Built, and not held", "", "| model | what is not as it should be |", "|---|---|"]
    for r in built:
        if not r.holds:
            wrong = [m for m in ("match", "cut", "logits", "read") if not getattr(r, m)]
            detail = ", ".join([*dict.fromkeys(r.large), *r.declined, r.error.replace("|", "/")])
            lines.append(f"| {r.name} ({r.task}) | {', '.join(wrong)}: {detail} |")
    lines += ["", "## Not built at these sizes", "", "| model | why |", "|---|---|"]
    lines += [f"| {r.name} ({r.task}) | {r.error.replace('|', '/')} |" for r in rows if not r.built]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--backend", default="cce", choices=["cce", "eager"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=int, default=300, help="seconds for one architecture")
    parser.add_argument("--rows", type=Path, help="file of results: kept as they come, and not measured again")
    args = parser.parse_args()
    rows = run(args.names or architectures(), args.backend, args.jobs, args.limit, args.rows)
    print(table(rows), end="")
    return 0 if all(r.holds for r in rows if r.built) else 1


if __name__ == "__main__":
    sys.exit(main())
