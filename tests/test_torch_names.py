# SPDX-License-Identifier: Apache-2.0
"""Private names of torch: each is there in this torch, and none is used that is not listed."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from cce_fx import _torch

ROOT = Path(__file__).parent.parent
SOURCES = [p for folder in ("cce_fx", "passes", "kernels") for p in sorted((ROOT / folder).rglob("*.py"))]
SAMPLES = {
    "torch.autograd:forward_ad": torch.autograd.forward_ad,
    "torch.autograd:Function": torch.autograd.Function,
    "torch:Tensor": torch.empty(0),
    "torch:UntypedStorage": torch.empty(0).untyped_storage(),
    "torch.distributed.fsdp:FSDPState": FSDPState(),
    "torch.distributed.fsdp:FSDPParamGroup": FSDPParamGroup,
    "torch.nn:Module": torch.nn.Linear(1, 1),
    "torch.distributed.tensor:DTensor": DTensor,
    "torch.fx.experimental.symbolic_shapes:ShapeEnv": ShapeEnv(),
    "torch.fx:Graph": torch.fx.Graph(),
    "torch.fx:Node": next(iter(torch.fx.symbolic_trace(torch.nn.Linear(1, 1)).graph.nodes)),
    "torch._ops:OpOverload": torch.ops.aten.mm.default,
    "torch._ops:OpOverloadPacket": torch.ops.aten.mm,
}


@pytest.mark.parametrize("name", _torch.NAMES)
def test_this_torch_has(name: str) -> None:
    private = _torch.NAMES[name]
    assert getattr(_torch, name) is _torch.find(private.home), f"torch lost {private.home}: {private.why}"


@pytest.mark.parametrize(("owner", "name"), _torch.ATTRIBUTES)
def test_objects_of_this_torch_have(owner: str, name: str) -> None:
    assert hasattr(SAMPLES[owner], name), f"torch lost {owner}.{name}: {_torch.ATTRIBUTES[owner, name]}"


def test_the_parameters_of_fsdp_are_named_as_they_were() -> None:
    """Named by annotations alone, and looked for with a default."""
    assert {"_unsharded_param", "sharded_param"} <= set(FSDPParam.__annotations__)
    assert "fsdp_params" in inspect.getsource(FSDPParamGroup.__init__)


def test_the_tag_of_caches_is_there() -> None:
    """Without it a stale compiled graph could be taken from a cache on disk."""
    with _torch.compiler_config.patch(cache_key_tag="x"):
        assert _torch.compiler_config.cache_key_tag == "x"


def test_a_name_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_torch.NAMES, "gone", _torch.Private("torch._dynamo.utils:gone", "it was of use"))
    with pytest.raises(ImportError, match=r"has no torch._dynamo.utils.gone, which cce_fx needs \(it was of use\)"):
        from cce_fx._torch import gone  # type: ignore[attr-defined]  # noqa: F401


def is_private(part: str) -> bool:
    return part.startswith("_") and not (part.startswith("__") and part.endswith("__"))


def private_paths(tree: ast.AST) -> Iterator[str]:
    """Dotted paths below torch with a private part, as they are imported or spelt out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            yield from (f"{node.module}.{a.name}" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("torch."))
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_private_names_are_in_one_place(path: Path) -> None:
    if path.name == "_torch.py":
        return
    where = str(path.relative_to(ROOT))
    found = {
        p
        for p in private_paths(ast.parse(path.read_text()))
        if p.startswith("torch.") and any(is_private(part) for part in p.split(".")) and "(" not in p
    }
    assert {p for p in found if (where, p) not in _torch.ELSEWHERE} == set(), "list it in cce_fx/_torch.py"


NAMEDTUPLES = {"_asdict", "_fields", "_replace"}  # documented by Python


def own_names() -> set[str]:
    """Every private name that the project itself defines."""
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def attribute_of(node: ast.AST) -> str | None:
    """The name that `x.name` and `getattr(x, "name")` read."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if not isinstance(node, ast.Call) or ast.unparse(node.func) not in ("getattr", "hasattr"):
        return None
    name = node.args[1]
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else None


def test_private_attributes_are_listed() -> None:
    listed = (
        {name for _, name in (*_torch.ATTRIBUTES, *_torch.OPTIONAL)}
        | {p.split(".")[-1] for _, p in _torch.ELSEWHERE}
        | own_names()
        | NAMEDTUPLES
    )
    used: dict[str, str] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            name = attribute_of(node)
            if name is not None and is_private(name):
                used[name] = str(path.relative_to(ROOT))
    assert {name: where for name, where in used.items() if name not in listed} == {}
    text = "\n".join(p.read_text() for p in SOURCES if p.name != "_torch.py")
    assert [name for _, name in _torch.ATTRIBUTES if name not in text] == [], "no longer used"


def test_listed_names_are_used() -> None:
    text = "\n".join(p.read_text() for p in SOURCES if p.name != "_torch.py")
    assert [name for name in _torch.NAMES if name not in text] == []


def test_the_oldest_torch_is_the_one_that_is_asked_for() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={_torch.OLDEST}"' in text
    installed = tuple(int(n) for n in torch.__version__.split("+")[0].split(".")[:2])
    assert tuple(int(n) for n in _torch.OLDEST.split(".")) <= installed
