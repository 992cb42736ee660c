# SPDX-License-Identifier: Apache-2.0
"""Runs the same job several ways, each in a fresh process, and shows how far they are.

A child prints JSON objects on its standard output, one a line: {"step": .., "loss": .., "seconds": ..} after each step
and {"done": {...}} at the end. Everything else that it prints goes to a log, whose last lines are shown if it fails.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MODES = ("eager", "inductor", "cce")


class ChildFailed(RuntimeError):
    """A run ended without its closing line."""


def emit(**record) -> None:
    """The child's side: one record to the parent."""
    print(json.dumps(record), flush=True)


@contextmanager
def child_process(command: list[str], log) -> Iterator[subprocess.Popen]:
    """Start `command` as a group of its own and end all of it on the way out, whatever the way out is.

    In a group of its own, a Ctrl-C reaches the parent alone, and the compiler's helpers can be ended with the child.
    """
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=os.name == "posix"
    )
    try:
        yield process
        process.wait()
    finally:
        end_group(process)
        process.stdout.close()


def end_group(process: subprocess.Popen) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # no child writes a file that a reader looks for
    else:
        process.kill()
    process.wait()


def run_child(script: str, settings: dict, log_path: Path, on_step: Callable[[dict], None]) -> dict:
    """Run `script --child SETTINGS` to its end; returns what it measured, with every step under "steps"."""
    command = [sys.executable, script, "--child", json.dumps(settings)]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    steps, done = [], None
    with open(log_path, "w", encoding="utf-8") as log, child_process(command, log) as process:
        for line in process.stdout:
            record = json.loads(line) if line.startswith("{") else {}
            if "step" in record:
                steps.append(record)
                on_step(record)
            elif "done" in record:
                done = record["done"]
            else:
                log.write(line)
    if done is None:
        tail = "".join(log_path.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
        mode, status = settings["mode"], process.returncode
        raise ChildFailed(f"the {mode} run ended with status {status}; {log_path} ends:\n{tail}")
    return done | {"steps": steps}


def stop_on_sigterm() -> None:
    """Make a polite `kill` take the same way out as Ctrl-C, so that the children are ended then too."""

    def interrupt(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
