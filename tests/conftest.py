# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and where those marked `gpu` run.

They run on a GPU, or with TRITON_INTERPRET=1 on CPU tensors through Triton's interpreter: `python -m pytest -m gpu`. Where
there is neither, they are deselected. A test that takes the fixture `device` runs on the CPU, and once more marked `gpu`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

import pytest
import torch

from .device import INTERPRETED, accelerator, faster_interpreter, larger_tiles

LEFT_OUT = pytest.StashKey[int]()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)], scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the test's tensors lie."""
    return torch.device("cpu") if request.param == "cpu" else accelerator()


@pytest.fixture(scope="session")
def cuda(device: torch.device) -> torch.device:
    """A device with streams and an allocator of its own: the interpreter has none, and leaves these tests out."""
    assert device.type == "cuda"
    return device


@pytest.fixture(autouse=True, scope="session")
def _interpreter() -> Iterator[None]:
    with faster_interpreter() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def _tiles() -> Iterator[None]:
    with larger_tiles() if INTERPRETED else contextlib.nullcontext():
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    run, left = [], []
    for item in items:
        marked = item.get_closest_marker("gpu") is not None
        # `-m gpu` takes the place of the default `-m 'not slow'`, and means that as well.
        slow = item.get_closest_marker("slow") is not None and "slow" not in config.option.markexpr
        on_gpu = accelerator().type == "cuda"
        out = marked and (slow or not (on_gpu or INTERPRETED) or ("cuda" in item.fixturenames and not on_gpu))
        (left if out else run).append(item)
    if left:
        config.stash[LEFT_OUT] = len(left)
        config.hook.pytest_deselected(items=left)
        items[:] = run


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left = config.stash.get(LEFT_OUT, 0)
    if left and not INTERPRETED and accelerator().type == "cpu":
        terminalreporter.write_line(
            f"no GPU: {left} tests left out; `TRITON_INTERPRET=1 python -m pytest -m gpu` runs them on CPU tensors"
        )


# Wherever a graph is compiled, here or in a process that a test starts, the pass has to leave the program's guards alone.
os.environ["CCE_FX_DEBUG"] = "1"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT interrupts, though a process that a shell started in the background ignores it, and hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
