# SPDX-License-Identifier: Apache-2.0
"""Files that are either whole or not there: every file is written beside its place and then moved into it."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a temporary path next to `path`, then move the result there in one step.

    A reader, or a run after a Ctrl-C, never sees half a file. The suffix is kept because savers look at it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        os.chmod(part, 0o644)  # mkstemp makes it private; a result is for everyone who may read the folder
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def default_cache() -> Path:
    """The folder for the tokenizer and the tokens, shared by the examples."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cce-examples"
