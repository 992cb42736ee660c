# SPDX-License-Identifier: Apache-2.0
"""The tests against every supported torch, each in an environment of its own: `nox`, `nox -s "smoke(2.11)"`, `nox -l`.

`compat/torch-X.txt` says what replaces the pins of constraints.txt for one torch, `compat/triton-X.txt` for one triton. A Python that is not on the machine is
reported and skipped; torch's wheels for Linux bring CUDA along, about 6 GB to an environment.
"""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import nox

ROOT = Path(__file__).parent
TORCHES = ("2.11", "2.12", "2.13", "2.15")
TRITONS = ("3.6", "3.9")  # what torch 2.11 and 2.15 bring
PYTHON = "3.11"  # what constraints.txt was made for
# Pythons beside it, with the oldest and the newest torch that have wheels for them. Pins of another Python may not exist.
PYTHONS = (("3.10", "2.11"), ("3.10", "2.13"), ("3.12", "2.15"), ("3.13", "2.15"))
SMOKE = [
    f"tests/test_{name}.py"
    for name in (
        "torch_names",
        "bad_inputs",
        "fuzz",
        "lifetime",
        "determinism",
        "caches",
        "semantics",
        "options",
        "forms",
    )
]
nox.options.sessions = ["smoke"]


def _name(line: str) -> str:
    return re.split(r"[=<>~! ]", line)[0].lower().replace("_", "-")


def _pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {_name(line): line for line in lines if line}


def _install(session: nox.Session, torch: str, extras: str, *, pinned: bool = True, triton: str = "") -> None:
    pins = _pins(ROOT / "compat" / f"torch-{torch}.txt")
    if triton:
        pins |= _pins(ROOT / "compat" / f"triton-{triton}.txt")
    if pinned:
        pins = _pins(ROOT / "constraints.txt") | pins
    merged = Path(session.create_tmp()) / "constraints.txt"
    merged.write_text("\n".join(pins.values()) + "\n")
    session.install("-c", str(merged), "-e", f".[{extras}]")


@nox.session(python=PYTHON)
@nox.parametrize("torch", TORCHES, ids=TORCHES)
def smoke(session: nox.Session, torch: str) -> None:
    """What depends on torch most, in a few minutes."""
    _install(session, torch, "smoke")
    session.run("python", "-m", "pytest", "-q", *(session.posargs or SMOKE))


@nox.session(python=PYTHON)
@nox.parametrize("torch", TORCHES, ids=TORCHES)
def tests(session: nox.Session, torch: str) -> None:
    """Everything."""
    _install(session, torch, "test,docs,dev,examples")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session
@nox.parametrize(("python", "torch"), PYTHONS)
def pythons(session: nox.Session, torch: str) -> None:
    """The smoke part on the other Pythons, with whatever versions of the rest there are for them."""
    _install(session, torch, "smoke", pinned=False)
    session.run("python", "-m", "pytest", "-q", *(session.posargs or SMOKE))


@nox.session(python=PYTHON)
def sanitized(session: nox.Session) -> None:
    """The native code under AddressSanitizer and UndefinedBehaviorSanitizer: the kernels' tests with 2,000 drawn problems."""
    _install(session, "2.13", "test")
    runtimes = [
        session.run("gcc", f"-print-file-name=lib{name}", external=True, silent=True).strip()
        for name in ("asan.so", "ubsan.so", "stdc++.so.6")
    ]
    env = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "CCE_FX_SANITIZE": "address,undefined",
        "CCE_FX_PROBLEMS": "2000",
        "TORCHINDUCTOR_CACHE_DIR": str(session.create_tmp()),
    }
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests/kernels"]), env=env)


@nox.session(python=PYTHON)
@nox.parametrize("triton", TRITONS, ids=TRITONS)
def static(session: nox.Session, triton: str) -> None:
    """What each triton makes of the GPU's kernels, and the kernels in its interpreter; no GPU is needed."""
    _install(session, "2.13", "test", triton=triton)
    session.run("python", "-m", "pytest", "-q", *(session.posargs or ["tests/triton"]))
    session.run("python", "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", env={"TRITON_INTERPRET": "1"})


@nox.session(python=False)
def aarch64(session: nox.Session) -> None:
    """Every step of the native code for 64-bit Arm under an emulator, without and with its products of bfloat16.

    Needs g++-aarch64-linux-gnu and qemu-user-static; clang++, where it is there, compiles the same.
    """
    source = ["-std=c++17", "-O2", "-ffp-contract=fast", "-I", "kernels/native", "tests/kernels/check_steps.cpp"]
    program = str(Path(session.create_tmp()) / "check_steps")
    for storage, processor in itertools.product(range(3), ("armv8-a", "armv8.6-a+bf16")):
        flags = [f"-march={processor}", f"-DSTORAGE={storage}", *source, "-o", program]
        if shutil.which("clang++"):
            session.run("clang++", "--target=aarch64-linux-gnu", "-c", *flags, external=True)
        session.run("aarch64-linux-gnu-g++", "-static", "-fopenmp", *flags, external=True)
        session.run("qemu-aarch64-static", "-cpu", "max", program, external=True)
