# SPDX-License-Identifier: Apache-2.0
"""The wheel and the sdist: one top-level package, found by torch without an import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import cce_fx
import cce_fx.passes
from cce_fx import __version__

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


# What a build needs, and nothing else of the repository.
SOURCES = ["pyproject.toml", "MANIFEST.in", "build_backend.py", "README.md", "CHANGELOG.md", "CITATION.cff", "SECURITY.md",
           "LICENSE", "cce_fx", "passes", "kernels"]  # fmt: skip
EPOCH = "1700000000"


def build(source: Path, out: Path) -> None:
    """sdist and wheel of a folder, by the hooks that a frontend calls."""
    environment = {**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "PYTHONPATH": str(source)}
    for kind in ("sdist", "wheel"):
        code = f"import build_backend as b, sys; b.build_{kind}(sys.argv[1])"
        command = [sys.executable, "-c", code, str(out)]
        subprocess.run(command, check=True, cwd=source, capture_output=True, env=environment)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel and sdist, made from a copy of the repository's tracked and new files."""
    out, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    subprocess.run(["cp", "-a", *(str(ROOT / n) for n in SOURCES), str(source)], check=True)
    build(source, out)
    return out


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it, and nothing else."""
    (wheel,), site = built.glob("*.whl"), tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True)
    return site


def test_the_wheel_has_one_top_level_package(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names if ".dist-info/" not in n}
    assert tops == {"cce_fx"}
    for needed in ("cce_fx/py.typed", "cce_fx/passes/rules/loss.py", "cce_fx/kernels/spec.py"):
        assert needed in names


def test_the_sdist_holds_what_a_build_needs_and_nothing_else(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {m.name.split("/", 1)[1] for m in tar if m.isfile()}
        assert all(m.uid == m.gid == 0 and m.uname == m.gname == "" for m in tar)
    extra = {"PKG-INFO", "setup.cfg", *SOURCES} - {"cce_fx", "passes", "kernels"}
    code = {n for n in names if n.startswith("cce_fx/")}
    files = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h"], capture_output=True, text=True, cwd=ROOT, check=True
    ).stdout.split()
    ours = {
        f if f.startswith("cce_fx/") else f"cce_fx/{f}"
        for f in files
        if f.startswith(("cce_fx/", "passes/", "kernels/"))
    }
    assert ours | {"cce_fx/py.typed"} <= code
    assert all(n.endswith((".py", ".cpp", ".h", "py.typed")) for n in code)
    assert {n for n in names - code if ".egg-info/" not in n} == extra


def test_builds_of_one_source_have_the_same_bytes(built: Path, tmp_path: Path) -> None:
    """From another folder, with other times and modes on its files, and from the sdist."""
    source, again, third = tmp_path / "source", tmp_path / "again", tmp_path / "third"
    source.mkdir()
    subprocess.run(["cp", "-rd", *(str(ROOT / n) for n in SOURCES), str(source)], check=True)
    shutil.rmtree(source / "kernels" / "__pycache__", ignore_errors=True)
    for path in source.rglob("*.py"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
        path.chmod(0o640)
    build(source, again)
    with tarfile.open(next(built.glob("*.tar.gz"))) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    build(next((tmp_path / "unpacked").iterdir()), third)
    for pattern, others in (("*.tar.gz", [again]), ("*.whl", [again, third])):
        (first,) = built.glob(pattern)
        for folder in others:
            assert next(folder.glob(pattern)).read_bytes() == first.read_bytes(), (pattern, folder.name)


def test_the_metadata_is_what_an_index_accepts(built: Path) -> None:
    files = [str(p) for p in built.iterdir()]
    done = subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_an_installed_wheel_works_from_another_folder(installed: Path, tmp_path: Path) -> None:
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"cce_fx"}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
    )
    assert run.returncode == 0, run.stderr
    assert str(installed) in run.stdout


def test_a_type_checker_knows_every_type_of_the_public_face(installed: Path, tmp_path: Path) -> None:
    """`--verifytypes` on the wheel; `kernels` is private and not counted."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--verifytypes", "cce_fx", "--ignoreexternal", "--outputjson"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "PATH": path},
    )
    symbols = json.loads(done.stdout)["typeCompleteness"]["symbols"]
    public = [s for s in symbols if s["isExported"] and not s["name"].startswith("cce_fx.kernels.")]
    face = {f"{m.__name__}.{n}" for m in (cce_fx, cce_fx.passes) for n in m.__all__ if not n.startswith("__")}
    assert face <= {s["name"] for s in symbols if s["isExported"]}
    assert not [s["name"] for s in public if not s["isTypeKnown"] or s["isTypeAmbiguous"]]


def test_the_citation_is_whole_and_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)  # what the format asks for
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_folder_of_the_package_s_name_beside_the_script_does_no_harm(tmp_path: Path) -> None:
    """A checkout, say: Python then takes it for the package, and finds the installed one's modules and no `__init__`."""
    (tmp_path / "cce_fx").mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.split("import cce_fx")[0])
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_every_source_file_names_its_licence() -> None:
    found = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.h"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    texts = {name: (ROOT / name).read_text(encoding="utf-8") for name in found.stdout.split()}
    assert len(texts) > 80
    line = "SPDX-License-Identifier: Apache-2.0\n"
    bare = [
        n for n, t in texts.items() if t and not t.startswith(("// " if n.endswith((".cpp", ".h")) else "# ") + line)
    ]
    assert not bare, "begin each with `# SPDX-License-Identifier: Apache-2.0`: " + " ".join(bare)
