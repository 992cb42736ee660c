# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of `tests/gpu` in processes that have TRITON_INTERPRET=1 before triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parent.parent.parent


def interpreted(*paths: Path, markers: str, **environment: str) -> None:
    # An installed cce_fx is found as it is; in a checkout it is found at the root.
    path_list = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    env |= {"TRITON_INTERPRET": "1", "PYTHONPATH": path_list, **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", markers, *map(str, paths)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    # 5: every test of the file was left out by the markers.
    assert done.returncode in (0, 5), done.stdout[-6000:] + done.stderr[-2000:]


def test_a_sample_in_the_interpreter() -> None:
    """What every kernel is held to, and its use through torch.compile, with one case of each test in two hundred."""
    paths = (ROOT / "tests" / "gpu" / f"test_{name}.py" for name in ("contract", "interface", "compile"))
    interpreted(*paths, markers="gpu", CCE_FX_SAMPLE="200")


@pytest.mark.slow
@pytest.mark.parametrize("markers", ["gpu and not slow", "gpu and slow"])
@pytest.mark.parametrize("path", sorted((ROOT / "tests" / "gpu").glob("test_*.py")), ids=lambda p: p.stem)
def test_in_the_interpreter(path: Path, markers: str) -> None:
    interpreted(path, markers=markers)
