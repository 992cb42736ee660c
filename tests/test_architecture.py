# SPDX-License-Identifier: Apache-2.0
"""The arrows of docs/architecture.md: data goes down only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .mutation import FAULTS

ROOT = Path(__file__).parent.parent
# What a file of each folder may import of the project: the folder's own modules, and these.
ALLOWED = {
    "kernels": {"cce_fx.kernels"},
    "passes": {
        "cce_fx.passes",
        "cce_fx.functional",
        "cce_fx.distributed",
        "cce_fx.kernels.spec",
        "cce_fx._torch",
        "cce_fx._version",
    },
}
FILES = [p for folder in ALLOWED for p in sorted((ROOT / folder).rglob("*.py"))]


# The implementations of the contract in kernels/spec.py, which `kernels/choose.py` alone knows.
IMPLEMENTATIONS = ("portable", "native", "triton")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removeprefix("cce_fx."): path
    for folder in ("cce_fx", "passes", "kernels", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    # cce_fx/passes and cce_fx/kernels are links, and the package's own file imports its modules when they are asked for.
    if path.resolve() == path and path != ROOT / "cce_fx" / "__init__.py"
}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, absolute, those inside functions too."""
    package = ["cce_fx", *[part for part in path.relative_to(ROOT).parent.parts if part != "cce_fx"]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("cce_fx", "benchmarks")}


def imported(module: str) -> set[str]:
    """Those of `MODULES` that a module imports. A package imported for a name of one of its modules is that module."""
    named = {name.removeprefix("cce_fx.") for name in imports(MODULES[module])}
    return {n for n in named if n in MODULES and not any(m.startswith(n + ".") and m in MODULES for m in named)} - {
        module
    }


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
    wrong = {m for m in imports(path) if m != "cce_fx" and not any(m == a or m.startswith(a + ".") for a in allowed)}
    # `from ..kernels import spec` names the package besides the module.
    assert not {m for m in wrong if not any(a.startswith(m + ".") for a in allowed)}


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_of_the_contract_know_nothing_of_each_other(name: str) -> None:
    others = tuple(f"kernels.{other}" for other in IMPLEMENTATIONS if other != name)
    own = [m for m in MODULES if m == f"kernels.{name}" or m.startswith(f"kernels.{name}.")]
    assert len(own) > 1
    assert [(m, i) for m in own for i in imported(m) if i.startswith((*others, "kernels.choose"))] == []


def test_one_file_knows_all_implementations() -> None:
    """Those that import them, or name them to `importlib`."""
    shared = {m: MODULES[m] for m in MODULES if m.startswith("kernels.") and m.split(".")[1] not in IMPLEMENTATIONS}
    found = [m for m, p in shared.items() if any(f'"{name}"' in p.read_text() for name in IMPLEMENTATIONS)]
    found += [m for m in shared for i in imported(m) if i.split(".")[1] in IMPLEMENTATIONS]
    assert found == ["kernels.choose"]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules of which each imports the next and the last the first; none where there is no such circle."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module not in done:
            for other in sorted(graph[module]):
                if found := visit(other, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := visit(module, []))), [])


def test_modules_import_in_no_circle() -> None:
    assert circle({m: imported(m) for m in MODULES}) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_links_lead_to_the_folders() -> None:
    for folder in ALLOWED:
        assert (ROOT / "cce_fx" / folder).resolve() == ROOT / folder


def test_the_picture_names_what_is_there() -> None:
    """Every file and folder in the picture of docs/architecture.md exists."""
    picture = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    names = re.findall(r"\b(?:cce_fx|passes|kernels)/[\w*]*(?:\.py)?|\b[a-z_]+\.py\b", picture)
    assert len(names) >= 9
    missing = [n for n in names if not any(list(ROOT.glob(place)) for place in (n, f"passes/{n}"))]
    assert not missing


def test_the_map_of_contributing_names_what_is_there_and_every_folder() -> None:
    table = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are")[1].split("\n## ")[0]
    names = re.findall(r"`([\w./]+/[\w./]*)`", table)
    assert len(names) > 20
    assert [n for n in names if not (ROOT / n).exists()] == []
    folders = {p.parent for folder in ("cce_fx", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")}
    tops = {str(p.relative_to(ROOT)) + "/" for p in folders} - {"cce_fx/", "passes/"}
    assert [f for f in tops if f not in names and f"cce_fx/{f}" not in names] == []


def test_no_file_is_long() -> None:
    """A module is read in one go: 400 lines, or a reason here."""
    own = [p for folder in ("cce_fx", "passes", "kernels") for p in (ROOT / folder).rglob("*.py")]
    assert not [(p.name, n) for p in own if (n := len(p.read_text().splitlines())) > 400]


def test_every_deliberate_fault_is_of_code_that_is_there() -> None:
    assert [f.name for f in FAULTS if f.old not in (ROOT / f.path).read_text()] == []


def test_importing_the_package_imports_neither_torch_nor_kernels() -> None:
    code = "import sys, cce_fx; print([m for m in sys.modules if m == 'torch' or m.startswith('cce_fx.')])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/").stdout
    assert out.strip() == "['cce_fx._version']"
