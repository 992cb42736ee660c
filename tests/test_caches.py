# SPDX-License-Identifier: Apache-2.0
"""torch's caches of compiled graphs: warm where nothing changed, cold where something did."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import cce_fx
from cce_fx.passes.pipeline import source_digest

ROOT = Path(__file__).parent.parent
N, D, V = 12, 6, 50

PROGRAM = """
import json, sys, torch, torch.nn.functional as F
from torch._dynamo.utils import counters

def loss(h, w, y):
    z = F.linear(h, w) * SCALE
    return F.cross_entropy(z, y), z

gen = torch.Generator().manual_seed(0)
h, w = (torch.randn(*s, generator=gen).requires_grad_() for s in ((12, 6), (50, 6)))
y = torch.randint(50, (12,), generator=gen)
out, z = torch.compile(loss, backend="cce", options={"min_vocab": 0})(h, w, y)
kind = type(z).__name__
grads = torch.autograd.grad(out + z.exp().sum(), (h, w))
found = counters["aot_autograd"]
print(json.dumps({
    "values": [t.detach().flatten().tolist() for t in (out, z + 0, *grads)],
    "lazy": kind, "hits": found["autograd_cache_hit"], "misses": found["autograd_cache_miss"],
}))
"""


def tensors() -> list[Tensor]:
    gen = torch.Generator().manual_seed(0)
    h, w = (torch.randn(*s, generator=gen).requires_grad_() for s in ((N, D), (V, D)))
    return [h, w, torch.randint(V, (N,), generator=gen)]


def loss(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(h, w)
    return F.cross_entropy(z, y), z


def test_a_second_process_starts_warm_with_the_same_bits(tmp_path: Path) -> None:
    # A number that no program had before, and not a cache of its own, for which the kernels would be compiled again.
    script = tmp_path / "program.py"
    script.write_text(PROGRAM.replace("SCALE", repr(1 + uuid.uuid4().int / 2**128)))
    runs = []
    for _ in range(2):
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    assert [(r["hits"], r["misses"]) for r in runs] == [(0, 1), (1, 0)]
    assert runs[0]["values"] == runs[1]["values"] and runs[1]["lazy"] == "LazyLogits"


def test_a_backward_that_runs_again_is_not_one_that_may_write_to_what_was_saved() -> None:
    """inductor's key does not tell them apart, and without autograd's cache nothing raises."""

    def head(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(F.gelu(h), w), y)

    found = []
    with fresh_cache(), torch._functorch.config.patch(enable_autograd_cache=False):
        for runs in (1, 2):
            torch._dynamo.reset()
            h, w, y = tensors()
            out = torch.compile(head, backend="cce", options={"min_vocab": 0})(h, w, y)
            for left in reversed(range(runs)):
                out.backward(retain_graph=left > 0)
            found.append([t.grad / runs for t in (h, w) if t.grad is not None])
    torch.testing.assert_close(found[1], found[0])


def compiled(options: dict[str, Any]) -> tuple[list[Tensor], tuple[int, int]]:
    """Results under those options, and (hits, misses) of the cache on disk."""
    torch._dynamo.reset()
    counters.clear()
    h, w, y = tensors()
    out, z = torch.compile(loss, backend="cce", options={"min_vocab": 0, **options})(h, w, y)
    results = [out.detach(), (z + 0).detach(), *torch.autograd.grad(out, (h, w))]
    found = counters["aot_autograd"]
    return results, (found["autograd_cache_hit"], found["autograd_cache_miss"])


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "change", [{"strategy": "recompute"}, {"logits": "keep"}, {"workspace": 1 << 14}, {"min_vocab": 1000}], ids=str
)
def test_options_are_part_of_the_key(change: dict[str, Any]) -> None:
    with fresh_cache():
        first, asked = compiled({})
        assert asked == (0, 1)
        other, asked = compiled(change)
        assert asked == (0, 1)
        again, asked = compiled({})
        assert asked == (1, 0)
    for a, b, c in zip(first, other, again, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_a_changed_option_compiles_again_in_one_process() -> None:
    torch._dynamo.reset()
    counters.clear()
    for number, options in enumerate(({"logits": "lazy"}, {"logits": "keep"}), 1):
        call = torch.compile(loss, backend="cce", options={"min_vocab": 0, "inner": "eager", **options})
        for _ in range(2):
            out, z = call(*tensors())
        assert isinstance(z, cce_fx.LazyLogits) == (options["logits"] == "lazy")
        assert counters["cce_fx"]["rewritten"] == number


def test_reset_compiles_again_and_gives_the_same() -> None:
    counters.clear()
    results = []
    call = torch.compile(loss, backend="cce", options={"min_vocab": 0, "inner": "eager"})
    for number in (1, 2):
        torch.compiler.reset()
        out, z = call(*tensors())
        results.append((out.detach(), z.detach() + 0))
        assert counters["cce_fx"]["rewritten"] == number
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


CHANGED = [
    "cce_fx/_version.py",
    "passes/rules/loss.py",
    "kernels/portable/tiles.py",
    "kernels/native/steps.cpp",
    "kernels/native/head.h",
]
DIGESTS = """
import sys
sys.path.insert(0, ".")
from cce_fx.passes import pipeline

print(pipeline.__file__)
print(pipeline.source_digest())
for name in sys.argv[1:]:
    with open(name, "a") as source:
        source.write("\\n# changed\\n")
    pipeline._source.cache_clear()
    print(pipeline.source_digest())
"""


def test_version_and_sources_are_part_of_the_key(tmp_path: Path) -> None:
    """The digest in every key is of the sources, those in other languages too, and the version's file among them."""
    for folder in ("cce_fx", "passes", "kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True)
    command = [sys.executable, "-c", DIGESTS, *CHANGED]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    place, *found = done.stdout.split()
    assert place.startswith(str(tmp_path))
    assert found[0] == source_digest() and len(set(found)) == 1 + len(CHANGED)


class Evaluation(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = torch.nn.Linear(D, V)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y)


def exported() -> tuple[torch.fx.GraphModule, Tensor, tuple[Tensor, Tensor]]:
    """The rewritten module of an exported evaluation loss, what eager gives, and the inputs."""
    from cce_fx.passes import Policy

    model, x, y = Evaluation().eval(), torch.randn(N, D), torch.randint(V, (N,))
    with torch.no_grad():
        gm, report = cce_fx.rewrite(torch.export.export(model, (x, y)).module(), None, Policy(min_vocab=0))  # type: ignore[arg-type]
        assert len(report.rewritten) == 1
        return gm, model(x, y), (x, y)


def test_an_exported_evaluation_loss_is_exported_again(tmp_path: Path) -> None:
    gm, expected, inputs = exported()
    with torch.no_grad():
        program = torch.export.export(gm, inputs)
        torch.export.save(program, tmp_path / "loss.pt2")
        loaded = torch.export.load(tmp_path / "loss.pt2")
        assert any("cce.linear_cross_entropy" in str(n.target) for n in loaded.graph.nodes)
        torch.testing.assert_close(loaded.module()(*inputs), expected)


@pytest.mark.slow
def test_aot_inductor_runs_it_where_python_is(tmp_path: Path) -> None:
    """In the process, or any other that has imported cce_fx: the operator is Python's, and the package calls it."""
    gm, expected, inputs = exported()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(gm, inputs), package_path=str(tmp_path / "loss.pt2")
        )
        torch.testing.assert_close(torch._inductor.aoti_load_package(path)(*inputs), expected)
