# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests, and where those marked `gpu` run.

They run on a GPU, or with TRITON_INTERPRET=1 on CPU tensors through Triton's interpreter: `python -m pytest -m gpu`. Where
there is neither, they are deselected. A test that takes the fixture `device` runs on the CPU, and once more marked `gpu`.

With `-n 2` of pytest-xdist the tests are divided among processes of one thread each; what shares an expensive start stays
together. A process that ends or hangs is not started again: its test has failed, and the other process does the rest.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .device import INTERPRETED, accelerator, faster_interpreter, larger_tiles
from .helpers import collect_rarely
from .selection import sampled

LEFT_OUT = pytest.StashKey[int]()
HERE = Path(__file__).parent
# Folders and files whose tests stay in one process: groups of processes that live on, a tokenizer, trl, and architectures.
TOGETHER = ("distributed", "stacks", "test_examples.py", "test_zoo.py", "test_docs.py")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Inductor compiles here: a pool of its own would be started for each of these processes, and torch imported in it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


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
def _takes_its_time(request: pytest.FixtureRequest) -> None:
    """What is known to take long is not ended by `faulthandler_timeout`."""
    if request.node.get_closest_marker("slow") is not None:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(autouse=True)
def _tiles() -> Iterator[None]:
    with larger_tiles() if INTERPRETED else contextlib.nullcontext():
        yield


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", "no") == "load":  # what `-n 2` alone means
        config.option.dist, config.option.maxworkerrestart = "loadgroup", "0"


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    for item in set(items) - set(sampled(items)):
        item.add_marker("slow")
    result = yield  # `-m` chooses
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
    kept = set(sampled(run, int(os.environ.get("CCE_FX_SAMPLE", "1"))))
    left += [item for item in run if item not in kept]
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in run if item in kept]
    for item in items:
        top = item.path.relative_to(HERE).parts[0]
        if top in TOGETHER:
            item.add_marker(pytest.mark.xdist_group(top))
    return result


def pytest_collection_finish() -> None:
    collect_rarely()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a process of pytest-xdist left out, for the summary."""
    output = getattr(node, "workeroutput", {})
    node.config.stash[LEFT_OUT] = max(output.get("left_out", 0), node.config.stash.get(LEFT_OUT, 0))


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, 0)


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
