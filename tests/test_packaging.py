"""The wheel and the sdist: one top-level package, found by torch without an import."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

SCRIPT = """
import torch, torch.nn as nn, torch.nn.functional as F
V = 300
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, V)
    def forward(self, x, y):
        return F.cross_entropy(self.head(self.body(x)).view(-1, V), y.view(-1))
torch.manual_seed(0)
model, x, y = Model(), torch.randn(3, 5, 16), torch.randint(0, V, (3, 5))
seen = []
def inner(gm, inputs):
    seen.append(gm.code)
    return gm.forward
torch.testing.assert_close(torch.compile(model, backend="cce", options={"inner": inner})(x, y), model(x, y))
assert "cce.linear_cross_entropy" in seen[0]
import cce_fx
print(cce_fx.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, made from a copy of the repository's tracked and new files."""
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    names = ["pyproject.toml", "README.md", "LICENSE", "cce_fx", "passes", "kernels"]
    subprocess.run(["cp", "-a", *(str(ROOT / n) for n in names), str(source)], check=True)
    for kind in ("wheel", "sdist"):
        build(kind, source, out)
    return out


def build(kind: str, source: Path, out: Path) -> None:
    code = f"import setuptools.build_meta as b, sys; b.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, cwd=source, capture_output=True)


def test_the_wheel_has_one_top_level_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"cce_fx"}
    for needed in ("cce_fx/py.typed", "cce_fx/passes/rules/loss.py", "cce_fx/kernels/spec.py"):
        assert needed in names


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        tar.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    build("wheel", folder, tmp_path)
    (wheel,), (first,) = tmp_path.glob("*.whl"), built.glob("*.whl")
    assert sorted(zipfile.ZipFile(wheel).namelist()) == sorted(zipfile.ZipFile(first).namelist())


def test_an_installed_wheel_works_from_another_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    site, script = tmp_path / "site", tmp_path / "script.py"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")} == {"cce_fx"}
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    assert str(site) in run.stdout
